-- Supervised rows: experts' solutions and stored completions, whatever the policy itself sampled left out.
SELECT rollout_id
FROM scored
WHERE source <> 'policy'
