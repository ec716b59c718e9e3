-- duplicates: by group of rollouts, how many different texts its samples are: distinct_texts, copies of the most frequent
-- one, and share, the samples beyond the first of each text. Texts are compared by a 64-bit hash. Experts are left out.
-- example: SELECT run, round, sum(samples - distinct_texts) / sum(samples) AS repeated FROM duplicates GROUP BY ALL ORDER BY ALL
CREATE VIEW duplicates AS
SELECT run, round, pass, group_id, prompt_id, sum(copies)::INTEGER AS samples, count(*)::INTEGER AS distinct_texts,
       max(copies)::INTEGER AS copies, 1 - count(*) / sum(copies) AS share
FROM (
    SELECT run, round, pass, group_id, prompt_id, count(*) AS copies
    FROM seen_rollouts
    WHERE source <> 'expert'
    GROUP BY run, round, pass, group_id, prompt_id, hash(text)
)
GROUP BY run, round, pass, group_id, prompt_id;
