-- One group of those that there are, where a rollout may stand in several pairs.
SELECT rollout_id, slot
FROM scored
WHERE group_id = 'a'
