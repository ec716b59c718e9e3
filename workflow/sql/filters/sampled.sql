-- The policy's own rollouts: neither experts' solutions nor those of derived passes, which are then only recorded.
SELECT rollout_id FROM scored WHERE source = 'policy'
