-- NSR (arXiv 2506.01347): the wrong rollouts.
SELECT rollout_id
FROM scored
WHERE NOT correct
