-- Rewards made binary: 1 from a threshold on, another value below it.
-- param threshold: double, least reward that counts as success
-- param below: double=0.0, reward of the others
SELECT rollout_id, CASE WHEN reward >= $threshold THEN 1.0::DOUBLE ELSE $below END AS reward
FROM scored
