-- Dr.GRPO (arXiv 2503.20783, section 3.2): the reward minus the mean of its group, without division by the standard
-- deviation.
SELECT rollout_id,
       CASE WHEN max(reward) OVER g = min(reward) OVER g THEN 0.0 ELSE reward - avg(reward) OVER g END AS advantage
FROM scored
WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
