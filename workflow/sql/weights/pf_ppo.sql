-- PF-PPO (arXiv 2409.06957): weights by rank of reward within the group, equal rewards by sample; they sum to 1.
-- BoN keeps the best, BR half of it and a random other, BW the best and the worst.
-- param keep: string [none|bon|br|bw], the filter; none: all alike
WITH ranked AS (
    SELECT rollout_id, row_number() OVER (PARTITION BY group_id ORDER BY reward DESC, sample) AS rank,
           count(*) OVER (PARTITION BY group_id) AS n
    FROM scored
)
SELECT rollout_id,
       CASE WHEN n = 1 THEN 1.0
            WHEN $keep = 'none' THEN 1.0 / n
            WHEN rank = 1 THEN CASE $keep WHEN 'bon' THEN 1.0 ELSE 0.5 END
            WHEN $keep = 'br' THEN 0.5 / (n - 1)
            WHEN $keep = 'bw' AND rank = n THEN 0.5
            ELSE 0.0 END AS weight
FROM ranked
