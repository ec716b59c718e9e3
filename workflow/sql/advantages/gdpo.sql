-- GDPO (arXiv 2601.05242): every scorer's reward standardised within the group on its own, then summed with the weights
-- of score.reward, so that rewards of different scale do not drown each other; the sum is standardised over the batch.
-- param eps: double=1e-6 [0, inf), added to both standard deviations
-- param whiten: bool=true, standardise the sum over the batch
WITH parts AS (
    SELECT rollout_id, group_id, sample, i, reward_parts[i].weight AS w, reward_parts[i].reward AS part
    FROM (
        SELECT rollout_id, group_id, sample, reward_parts, unnest(range(1, len(reward_parts) + 1)) AS i FROM scored
    )
), standard AS (
    SELECT rollout_id, i,
           CASE WHEN max(part) OVER g = min(part) OVER g THEN 0.0
                ELSE w * (part - avg(part) OVER g) / (stddev_samp(part) OVER g + $eps) END AS a
    FROM parts
    WINDOW g AS (PARTITION BY group_id, i ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
), summed AS (
    SELECT rollout_id, sum(a ORDER BY i) AS a FROM standard GROUP BY rollout_id
)
SELECT rollout_id,
       CASE WHEN NOT $whiten THEN a
            WHEN max(a) OVER b = min(a) OVER b THEN 0.0
            ELSE (a - avg(a) OVER b) / (stddev_samp(a) OVER b + $eps) END AS advantage
FROM summed
WINDOW b AS (ORDER BY rollout_id ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
