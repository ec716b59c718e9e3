-- Every rollout that the policy sampled for the task's prompts, whatever it came to: a revision of each (SD-Zero, arXiv
-- 2604.12002).
SELECT rollout_id FROM scored WHERE source = 'policy'
