-- DaGRPO (arXiv 2512.06337), flag: expert anchors only in groups whose other rollouts mostly fail.
-- param at_most: double=0.25, mean reward of the other rollouts up to which a group gets its anchors
SELECT rollout_id
FROM scored
WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
QUALIFY source <> 'expert' OR avg(reward) FILTER (source <> 'expert') OVER g <= $at_most
