-- Rows of one source to the imitation term of the objective, all others to the policy's loss (ExPO, arXiv 2507.02834).
-- param source: string=explanation, whose log-likelihood is raised
SELECT rollout_id, CASE WHEN source = $source THEN 'imitate' ELSE 'policy' END AS route
FROM scored
