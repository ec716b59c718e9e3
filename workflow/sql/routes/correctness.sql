-- Rows routed by the verifier: right or wrong.
SELECT rollout_id, CASE correct WHEN true THEN 'right' WHEN false THEN 'wrong' END AS route
FROM scored
