-- pass_at_k(n, c, k): unbiased pass@k of one prompt with c right among n samples (arXiv 2107.03374, eq. 1), a double in [0, 1].
-- 1 - C(n-c, k) / C(n, k), through log-gammas; k > n is an error: there is no unbiased estimate.
-- example: SELECT avg(pass_at_k(n, c, 4)) FROM (SELECT count(*) n, count(*) FILTER (correct) c FROM evals GROUP BY run, round, prompt_id)
CREATE MACRO pass_at_k(n, c, k) AS CASE
    WHEN k > n THEN error('pass_at_k: k = ' || k || ' exceeds the ' || n || ' samples; take a smaller k')
    WHEN c = 0 THEN 0.0
    WHEN n - c < k THEN 1.0
    ELSE 1.0 - exp(lgamma(n - c + 1) + lgamma(n - k + 1) - lgamma(n - c - k + 1) - lgamma(n + 1))
END;
