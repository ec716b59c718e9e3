-- Preference pairs for DPO (arXiv 2305.18290): the best against the worst rollout of a group, equal rewards by sample.
-- Groups whose rewards are all equal give none.
SELECT rollout_id, group_id AS pair_id, CASE WHEN reward = max(reward) OVER g THEN 'chosen' ELSE 'rejected' END AS role
FROM scored
WINDOW g AS (PARTITION BY group_id)
QUALIFY max(reward) OVER g > min(reward) OVER g
        AND (reward = max(reward) OVER g OR reward = min(reward) OVER g)
        AND row_number() OVER (PARTITION BY group_id, reward ORDER BY sample) = 1
