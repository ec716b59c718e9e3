-- The policy's wrong rollouts of a pass: what a teacher, or the policy, makes of their beginnings (SCOPE's diagnostic, arXiv
-- 2604.10688).
SELECT rollout_id FROM scored WHERE source = 'policy' AND NOT coalesce(correct, false)
