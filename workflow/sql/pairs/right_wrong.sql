-- Preference pairs from a verifier: the i-th right rollout of a group against its i-th wrong one.
-- param per_group: int=1, most pairs of one group
WITH numbered AS (
    SELECT rollout_id, group_id, correct, row_number() OVER (PARTITION BY group_id, correct ORDER BY sample) AS i,
           count(*) FILTER (correct) OVER g AS right_ones, count(*) FILTER (NOT correct) OVER g AS wrong_ones
    FROM scored
    WHERE correct IS NOT NULL
    WINDOW g AS (PARTITION BY group_id)
)
SELECT rollout_id, group_id || ':' || i AS pair_id, CASE WHEN correct THEN 'chosen' ELSE 'rejected' END AS role
FROM numbered
WHERE i <= least(right_ones, wrong_ones, $per_group)
