-- Rollouts that ended by themselves. As a filter this runs before the advantage: truncated rollouts leave their group's
-- mean, too. The overlong filter of DAPO (arXiv 2503.14476) only takes them out of the loss: the select of this name.
SELECT rollout_id
FROM scored
WHERE finish <> 'length'
