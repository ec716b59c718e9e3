-- GKD (arXiv 2306.13649, algorithm 1): of each group what the policy sampled, with probability lam, or else the data's
-- completions (experts'). One coin per group, a uniform number from a hash; lam 1 keeps the policy's, 0 the data's.
-- param lam: double=0.5 [0, 1], share of groups whose own samples are trained on
-- param seed: int, seed of the run (given by the workflow)
-- param round: int, round (given by the workflow)
SELECT rollout_id
FROM scored
WHERE (source = 'expert')
      = ((md5_number_lower(concat_ws(':', $seed, $round, group_id)) >> 11)::DOUBLE / 2.0 ^ 53 >= $lam)
