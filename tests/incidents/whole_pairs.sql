-- For tests: pairs of which neither rollout was truncated. A choice of single rows would tear pairs apart.
SELECT rollout_id
FROM scored
QUALIFY NOT bool_or(finish = 'length') OVER (PARTITION BY pair_id)
