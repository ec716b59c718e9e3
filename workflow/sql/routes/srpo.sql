-- SRPO (arXiv 2604.02288): a wrong rollout of which the teacher has something to say (a right sibling, feedback) to the
-- teacher, all others to the policy's loss.
SELECT rollout_id, CASE WHEN NOT correct AND has_teacher THEN 'distill' ELSE 'policy' END AS route
FROM scored
