-- Wrong rollouts to the teacher, right ones to the policy's own loss (SCOPE, arXiv 2604.10688).
SELECT rollout_id, CASE WHEN correct THEN 'policy' ELSE 'distill' END AS route
FROM scored
