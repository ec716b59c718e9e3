-- pass_at_k(n, c, k): unbiased pass@k of one prompt with c right among n samples (arXiv 2107.03374, eq. 1), a double in [0, 1].
-- 1 - C(n-c, k) / C(n, k), through log-gammas. Errors: k > n, where there is no unbiased estimate; k < 1; c not in [0, n].
-- example: SELECT avg(pass_at_k(n, c, 4)) FROM (SELECT count(*) n, count(*) FILTER (correct) c FROM evals GROUP BY run, round, prompt_id)
CREATE MACRO pass_at_k(n, c, k) AS CASE
    WHEN k < 1 THEN error('pass_at_k: k = ' || k || '; k must be at least 1')
    WHEN c NOT BETWEEN 0 AND n THEN error('pass_at_k: ' || c || ' right of ' || n || ' samples is impossible')
    WHEN k > n THEN error('pass_at_k: k = ' || k || ' exceeds the ' || n || ' samples; take a smaller k')
    WHEN c = 0 THEN 0.0
    WHEN n - c < k THEN 1.0
    ELSE 1.0 - exp(lgamma(n - c + 1) + lgamma(n - k + 1) - lgamma(n - c - k + 1) - lgamma(n + 1))
END;
