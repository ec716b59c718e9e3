-- GRPO (arXiv 2402.03300, section 4.1.1): the reward standardised within its group; equal rewards carry no signal.
-- param eps: double=1e-6, added to the standard deviation
-- param ddof: int=1 [0|1], divisor of the variance is G - ddof
SELECT rollout_id,
       CASE WHEN max(reward) OVER g = min(reward) OVER g THEN 0.0
            ELSE (reward - avg(reward) OVER g)
                 / (CASE $ddof WHEN 0 THEN stddev_pop(reward) OVER g ELSE stddev_samp(reward) OVER g END + $eps)
       END AS advantage
FROM scored
WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
