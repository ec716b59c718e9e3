-- PSR (arXiv 2506.01347): the right rollouts.
SELECT rollout_id
FROM scored
WHERE correct
