-- Cuts the surplus of dynamic sampling (DAPO, arXiv 2503.14476; NGRPO, arXiv 2509.18851): of this round's groups that the
-- filter left, the first ones, earlier passes before later ones. Only rollout.refill.oversample above 1 makes a surplus.
-- param groups: int, most groups of this round that stay: rollout.prompts
WITH numbered AS (
    SELECT rollout_id, age, dense_rank() OVER (PARTITION BY age ORDER BY pass, group_id) AS place
    FROM scored
)
SELECT rollout_id
FROM numbered
WHERE age > 0 OR place <= $groups
