-- The overlong filter (DAPO, arXiv 2503.14476, section 3.4): truncated rollouts count in their group's statistics,
-- but are not trained on.
SELECT rollout_id
FROM scored
WHERE finish <> 'length'
