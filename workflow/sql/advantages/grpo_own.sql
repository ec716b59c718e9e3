-- GRPO's advantage (arXiv 2402.03300, section 4.1.1) among the policy's own rollouts. Other rows of a group,
-- explanations say (ExPO, arXiv 2507.02834), do not shift its mean and get 0.
-- param eps: double=1e-6, added to the standard deviation
-- param ddof: int=1 [0|1], divisor of the variance is G - ddof
SELECT rollout_id,
       CASE WHEN source <> 'policy' THEN 0.0
            WHEN max(reward) FILTER (source = 'policy') OVER g = min(reward) FILTER (source = 'policy') OVER g THEN 0.0
            ELSE (reward - avg(reward) FILTER (source = 'policy') OVER g)
                 / (CASE $ddof WHEN 0 THEN stddev_pop(reward) FILTER (source = 'policy') OVER g
                               ELSE stddev_samp(reward) FILTER (source = 'policy') OVER g END + $eps)
       END AS advantage
FROM scored
WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
