-- avg_at_k(n, c): share of right samples of one prompt, avg@n; equals pass_at_k(n, c, 1). c not in [0, n] is an error.
-- example: SELECT run, round, avg(avg_at_k(n, c)) FROM by_prompt GROUP BY ALL ORDER BY ALL
CREATE MACRO avg_at_k(n, c) AS CASE
    WHEN c NOT BETWEEN 0 AND n THEN error('avg_at_k: ' || c || ' right of ' || n || ' samples is impossible')
    ELSE c / n::DOUBLE
END;
