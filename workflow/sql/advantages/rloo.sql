-- RLOO (arXiv 2402.14740): the reward minus the mean of the others of its group, G / (G - 1) (R_i - mean R).
SELECT rollout_id,
       CASE WHEN max(reward) OVER g = min(reward) OVER g THEN 0.0
            ELSE count(*) OVER g / (count(*) OVER g - 1.0) * (reward - avg(reward) OVER g) END AS advantage
FROM scored
WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
