-- SPIN (arXiv 2401.01335): the expert's solution of a group against each of what the policy sampled of the same prompt.
-- Groups without an expert, or of an expert alone, give none.
-- param per_group: int=1, most pairs of one group
-- allows: repeats
WITH sampled AS (
    SELECT rollout_id, group_id, row_number() OVER (PARTITION BY group_id ORDER BY sample) AS i
    FROM scored
    WHERE source <> 'expert'
),
twos AS (
    SELECT e.group_id || ':' || s.i AS pair_id, e.rollout_id AS chosen, s.rollout_id AS rejected
    FROM scored e
    JOIN sampled s ON e.group_id = s.group_id AND s.i <= $per_group
    WHERE e.source = 'expert'
)
SELECT unnest([chosen, rejected]) AS rollout_id, pair_id, unnest(['chosen', 'rejected']) AS role
FROM twos
