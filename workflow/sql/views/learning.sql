-- learning: held-out pass@k by run and round; NULL where some prompt has fewer than k samples. Intervals are in `metrics`.
-- example: SELECT round, pass_1, pass_4 FROM learning WHERE run = 'grpo-s0' ORDER BY round
-- after: by_prompt
CREATE VIEW learning AS
SELECT run, round, count(*) AS prompts, min(n) AS samples,
       avg(avg_at_k(n, c)) AS pass_1,
       CASE WHEN min(n) >= 2 THEN avg(pass_at_k(n, c, least(n, 2))) END AS pass_2,
       CASE WHEN min(n) >= 4 THEN avg(pass_at_k(n, c, least(n, 4))) END AS pass_4,
       CASE WHEN min(n) >= 8 THEN avg(pass_at_k(n, c, least(n, 8))) END AS pass_8,
       CASE WHEN min(n) >= 16 THEN avg(pass_at_k(n, c, least(n, 16))) END AS pass_16,
       avg(reward) AS reward, avg(length) AS length, avg(truncated) AS truncated
FROM by_prompt
GROUP BY run, round;
