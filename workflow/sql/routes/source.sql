-- Rows routed by whose they are: experts' solutions to `expert`, whatever a policy sampled (stored, too) to `policy`.
SELECT rollout_id, CASE WHEN source = 'expert' THEN 'expert' ELSE 'policy' END AS route
FROM scored
