-- maj_at_k(k): by run and round, the chance that the most frequent answer of k samples is right (arXiv 2203.11171).
-- Exact over all draws of k of a prompt's n samples, ties by lot, as the metric maj@k; prompts with n < k are left out.
-- Errors: k < 1, and k beyond the samples of every prompt.
-- For every size m of the winning vote, answer by answer: ways to draw `total` samples so that no answer has more than m
-- and `tied` answers have m; good weighs them by the sum of the tied answers' right shares.
-- example: SELECT run, round, maj FROM maj_at_k(2) ORDER BY ALL
-- after: votes
CREATE MACRO maj_at_k(k) AS TABLE
WITH RECURSIVE of_prompt AS (
    SELECT run, round, list(struct_pack(v := votes, s := right_share) ORDER BY votes, right_share) AS answers, any_value(n) AS n
    FROM votes
    GROUP BY run, round, prompt_id
), asked AS (
    -- Prompts whose votes are alike are counted once.
    SELECT answers, n FROM of_prompt
    WHERE CASE
        WHEN k < 1 THEN error('maj_at_k: k = ' || k || '; k must be at least 1')
        WHEN (SELECT max(n) FROM of_prompt) < k
            THEN error('maj_at_k: k = ' || k || ' exceeds the samples of every prompt, at most ' ||
                (SELECT max(n) FROM of_prompt) || '; take a smaller k')
        ELSE n >= k
    END
    GROUP BY ALL
), drawn AS (
    SELECT answers, unnest(range(1, k + 1)) AS m, 0 AS done, 0 AS total, 0 AS tied, 1.0::DOUBLE AS ways, 0.0::DOUBLE AS good
    FROM asked
    UNION ALL
    SELECT answers, m, done + 1, total + d, tied + (d = m)::INT, sum(ways * c),
           sum(c * (good + CASE WHEN d = m THEN answers[done + 1].s * ways ELSE 0 END))
    FROM (
        SELECT *, unnest(range(0, least(answers[done + 1].v, m, k - total) + 1)) AS d,
               round(exp(lgamma(answers[done + 1].v + 1) - lgamma(d + 1) - lgamma(answers[done + 1].v - d + 1))) AS c
        FROM drawn WHERE done < len(answers)
    )
    GROUP BY ALL
), chance AS (
    SELECT answers, sum(good / tied) AS wins
    FROM drawn
    WHERE done = len(answers) AND total = k AND tied > 0
    GROUP BY answers
)
SELECT run, round, count(*) AS prompts,
       avg(least(1, wins / round(exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1))))) AS maj
FROM of_prompt JOIN chance USING (answers)
GROUP BY run, round;
