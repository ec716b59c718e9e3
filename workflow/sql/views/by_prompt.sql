-- by_prompt: held-out samples counted by prompt: n samples, c of them right.
-- example: SELECT prompt_id, round, c, n FROM by_prompt WHERE run = 'grpo-s0' ORDER BY ALL
CREATE VIEW by_prompt AS
SELECT run, round, prompt_id, count(*)::INTEGER AS n, (count(*) FILTER (correct))::INTEGER AS c,
       avg(reward) AS reward, avg(length) AS length, avg((finish = 'length')::INT) AS truncated
FROM seen_evals
GROUP BY run, round, prompt_id;
