-- DistiLLM-2 (arXiv 2503.07067), curriculum (reconstructed): the policy's own rows weigh 2 b and experts' 2 (1 - b), b
-- from `start` to `end` in a line. With b = 1/2 all weigh 1.
-- param start: double=0.5 [0, 1], share of the policy's rows at the start
-- param end: double [0, 1], share of them once curate.horizon rounds are over
-- param progress: double [0, 1], from 0 to 1 over curate.horizon (given by the workflow)
SELECT rollout_id,
       2.0 * CASE WHEN source = 'expert' THEN 1.0 - ($start + ($end - $start) * $progress)
                  ELSE $start + ($end - $start) * $progress END AS weight
FROM scored
