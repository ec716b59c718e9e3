-- CoPG (arXiv 2406.19185): two completions of one prompt; samples 1 and 2, 3 and 4, ... of a group. The better
-- one is the chosen one, among equal rewards the lower sample; ties are kept, since the loss needs no ranking.
-- param per_group: int=1, most pairs of one group
WITH twos AS (
    SELECT rollout_id, group_id, sample, reward,
           (row_number() OVER (PARTITION BY group_id ORDER BY sample) + 1) // 2 AS i
    FROM scored
)
SELECT rollout_id, group_id || ':' || i AS pair_id,
       CASE row_number() OVER (PARTITION BY group_id, i ORDER BY reward DESC, sample)
            WHEN 1 THEN 'chosen' ELSE 'rejected' END AS role
FROM twos
WHERE i <= $per_group
QUALIFY count(*) OVER (PARTITION BY group_id, i) = 2
