-- REINFORCE++ with baseline (arXiv 2501.03262): the reward minus the mean of its group; the trainer whitens it over the
-- batch's tokens (train.advantage: {kind: whiten}).
SELECT rollout_id,
       CASE WHEN max(reward) OVER g = min(reward) OVER g THEN 0.0 ELSE reward - avg(reward) OVER g END AS advantage
FROM scored
WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
