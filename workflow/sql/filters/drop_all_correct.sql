-- NGRPO (arXiv 2509.18851): drops a group only where every rollout has the maximum reward; all-wrong groups stay.
-- param r_max: double=1.0, the maximum reward
SELECT rollout_id
FROM scored
QUALIFY min(reward) OVER (PARTITION BY group_id) < $r_max
