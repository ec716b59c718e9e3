-- REINFORCE (Williams 1992): the reward itself, or minus the mean reward of the batch.
-- param baseline: string=none [none|batch], what is subtracted
SELECT rollout_id,
       CASE WHEN $baseline = 'none' THEN reward
            WHEN max(reward) OVER b = min(reward) OVER b THEN 0.0
            ELSE reward - avg(reward) OVER b END AS advantage
FROM scored
WINDOW b AS (ORDER BY rollout_id ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
