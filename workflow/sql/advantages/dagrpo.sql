-- DaGRPO (arXiv 2512.06337): advantages of the group with its anchors, 0 where a rollout is not distinct. A positive
-- must beat the best negative's judge score by delta, a negative must lie delta below the worst positive's.
-- Masked rows stay in the batch, so that the loss's denominator counts them. Needs a scorer named judge.
-- param delta: double=3.0, margin on the judge's scale
-- param std: bool=false, also divide by the standard deviation of the group
-- param eps: double=1e-6, added to the standard deviation
WITH mixed AS (
    SELECT rollout_id, group_id, sample, judge,
           CASE WHEN max(reward) OVER g = min(reward) OVER g THEN 0.0
                ELSE (reward - avg(reward) OVER g)
                     / CASE WHEN $std THEN stddev_samp(reward) OVER g + $eps ELSE 1.0 END
           END AS a
    FROM scored
    WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
)
SELECT rollout_id,
       CASE WHEN a > 0 AND judge - max(judge) FILTER (a < 0) OVER g >= $delta THEN a
            WHEN a < 0 AND min(judge) FILTER (a > 0) OVER g - judge >= $delta THEN a
            ELSE 0.0 END AS advantage
FROM mixed
WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
