-- SRPO (arXiv 2604.02288): a wrong rollout with a right sibling to the teacher that reads it, all others to the
-- policy's loss.
SELECT rollout_id,
       CASE WHEN NOT correct AND bool_or(correct) OVER (PARTITION BY group_id) THEN 'distill' ELSE 'policy' END AS route
FROM scored
