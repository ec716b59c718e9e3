-- CoPG with k completions (arXiv 2406.19185; the Command A report, 2504.00698): every two completions of a
-- group. The better one is the chosen one, among equal rewards the lower sample. Groups of one give none.
-- allows: repeats
WITH twos AS (
    SELECT a.group_id || ':' || a.sample || ':' || b.sample AS pair_id, a.rollout_id AS chosen, b.rollout_id AS rejected
    FROM scored a
    JOIN scored b ON a.group_id = b.group_id
                 AND (a.reward > b.reward OR (a.reward = b.reward AND a.sample < b.sample))
)
SELECT unnest([chosen, rejected]) AS rollout_id, pair_id, unnest(['chosen', 'rejected']) AS role
FROM twos
