-- A weight that differs from rollout to rollout, whatever their rewards.
SELECT rollout_id, 1.0 + sample AS weight
FROM scored
