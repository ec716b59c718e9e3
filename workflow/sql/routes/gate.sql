-- KEPO's quality gate (arXiv 2602.00400, its code): rollouts whose reward reaches tau get the teacher's divergence
-- beside the policy's loss, the others the policy's loss alone. tau 0 lets every rollout through.
-- param tau: double=1.0, least reward of a rollout that is distilled
SELECT rollout_id, CASE WHEN reward >= $tau THEN 'both' ELSE 'policy' END AS route
FROM scored
