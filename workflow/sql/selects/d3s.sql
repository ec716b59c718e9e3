-- D3S (arXiv 2509.22115), rows: those whose advantages have the largest variance, first within each group, then over
-- the batch. The best subset always is the k largest and the n - k smallest; ties take the smallest k, equal advantages
-- the lower sample. Advantages are not standardised again.
-- param progress: double, share of the training behind us (given by the workflow where curate.horizon is set)
-- param n_init: double, rollouts kept per group at the start
-- param n_final: double, rollouts kept per group at the end
-- param keep_share: double=0.75, share of those rollouts kept in the batch (c)
-- param pool: string=union [union|all], all: the second choice alone, over the whole batch
WITH sorted AS (
    SELECT rollout_id, group_id, sample, advantage AS a, row_number() OVER s AS r, sum(advantage) OVER s AS s1,
           sum(advantage * advantage) OVER s AS s2, count(*) OVER (PARTITION BY group_id) AS size
    FROM scored
    WINDOW s AS (PARTITION BY group_id ORDER BY advantage DESC, sample, rollout_id ROWS UNBOUNDED PRECEDING)
), ranked AS (
    SELECT rollout_id, group_id, sample, a, r, s1, s2, size,
           CASE WHEN $pool = 'all' THEN size
                ELSE least(size, greatest(2, floor((1 - $progress) * $n_init + $progress * $n_final + 0.5))) END AS n
    FROM sorted
), edges AS (
    SELECT group_id, size, n, r, s1, s2 FROM ranked
    UNION ALL SELECT DISTINCT group_id, size, n, 0, 0.0, 0.0 FROM ranked
), splits AS (
    SELECT top.group_id, top.r AS k,
           (top.s2 + total.s2 - low.s2) / top.n - ((top.s1 + total.s1 - low.s1) / top.n) ^ 2 AS variance
    FROM edges top
    JOIN edges low ON low.group_id = top.group_id AND low.r = top.r + top.size - top.n
    JOIN edges total ON total.group_id = top.group_id AND total.r = top.size
    WHERE top.r <= top.n
), best AS (
    SELECT group_id, min(k) AS k
    FROM (SELECT group_id, k FROM splits QUALIFY variance >= max(variance) OVER (PARTITION BY group_id) - 1e-9)
    GROUP BY group_id
), survivors AS (
    SELECT rollout_id, row_number() OVER s AS r, sum(a) OVER s AS s1, sum(a * a) OVER s AS s2, count(*) OVER () AS size
    FROM ranked JOIN best USING (group_id)
    WHERE r <= k OR r > k + size - n
    WINDOW s AS (ORDER BY a DESC, group_id, sample, rollout_id ROWS UNBOUNDED PRECEDING)
), pool AS (
    SELECT rollout_id, r, s1, s2, size, least(size, greatest(2, floor($keep_share * size + 0.5))) AS n FROM survivors
), pool_edges AS (
    SELECT size, n, r, s1, s2 FROM pool
    UNION ALL SELECT DISTINCT size, n, 0, 0.0, 0.0 FROM pool
), pool_splits AS (
    SELECT top.r AS k, (top.s2 + total.s2 - low.s2) / top.n - ((top.s1 + total.s1 - low.s1) / top.n) ^ 2 AS variance
    FROM pool_edges top
    JOIN pool_edges low ON low.r = top.r + top.size - top.n
    JOIN pool_edges total ON total.r = top.size
    WHERE top.r <= top.n
), pool_best AS (
    SELECT min(k) AS k FROM pool_splits WHERE variance >= (SELECT max(variance) FROM pool_splits) - 1e-9
)
SELECT rollout_id
FROM pool CROSS JOIN pool_best
WHERE r <= k OR r > k + size - n
