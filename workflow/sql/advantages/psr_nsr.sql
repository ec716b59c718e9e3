-- PSR, NSR and W-REINFORCE (arXiv 2506.01347): one constant for right rollouts, another for wrong ones.
-- PSR adds the filter correct_only, NSR wrong_only; W-REINFORCE keeps all rows with positive: 0.1.
-- param positive: double=1.0, advantage of right rollouts (lambda of W-REINFORCE)
-- param negative: double=-1.0, advantage of wrong rollouts
SELECT rollout_id, CASE correct WHEN true THEN $positive WHEN false THEN $negative END AS advantage
FROM scored
