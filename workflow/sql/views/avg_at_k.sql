-- avg_at_k(n, c): share of right samples of one prompt, avg@n; equals pass_at_k(n, c, 1).
-- example: SELECT run, round, avg(avg_at_k(n, c)) FROM by_prompt GROUP BY ALL ORDER BY ALL
CREATE MACRO avg_at_k(n, c) AS c / n::DOUBLE;
