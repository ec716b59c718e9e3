-- DAPO (arXiv 2503.14476, section 3.4, eq. 13): soft overlong punishment, 0 up to limit - cache tokens, then linear to
-- -1 at the limit; and, as in the paper, rewards of +1 and -1: a wrong rollout loses 1.
-- param limit: int, L_max in tokens (rollout.sampling.max_tokens unless the recipe gives it)
-- param cache_share: double=0.2, L_c / L_max (paper: 4096 of 20480)
-- param signed: bool=true, take 1 off the reward of wrong rollouts
SELECT rollout_id,
       reward - CASE WHEN $signed AND NOT correct THEN 1.0 ELSE 0.0 END
              + least(0.0, greatest(-1.0, ($limit * (1.0 - $cache_share) - length) / ($limit * $cache_share))) AS reward
FROM scored
