-- The policy's first rollout of a group, whose prompt a derived pass words anew: of all groups (ExPO, arXiv 2507.02834),
-- of those without a right rollout, or of those in which no reward is anything but 0 (KEPO's trigger, arXiv 2602.00400).
-- param groups: string=all [all|failing|unrewarded], which groups
-- param every: int=1 [1, inf), only in rounds whose number is a multiple of it
-- param round: int, round (given by the workflow)
SELECT rollout_id
FROM scored
WHERE source = 'policy' AND $round % $every = 0
WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
QUALIFY sample = min(sample) OVER g
    AND CASE $groups WHEN 'failing' THEN NOT bool_or(correct) OVER g
                     WHEN 'unrewarded' THEN max(abs(reward)) OVER g = 0 ELSE true END
