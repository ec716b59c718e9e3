-- Supervised rows: experts' solutions and stored completions. What the policy itself sampled is left out, and so are
-- derived rollouts (hints, revisions), whoever wrote them.
SELECT rollout_id
FROM scored
WHERE source IN ('expert', 'offline', 'teacher')
