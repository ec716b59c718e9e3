-- One group of those that there are.
SELECT rollout_id
FROM scored
WHERE group_id = 'a'
