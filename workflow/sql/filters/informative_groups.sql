-- Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): groups with both right and wrong rollouts.
SELECT rollout_id
FROM scored
WINDOW g AS (PARTITION BY group_id)
QUALIFY bool_or(correct) OVER g AND NOT bool_and(correct) OVER g
