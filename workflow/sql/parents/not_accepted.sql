-- KEPO (arXiv 2602.00400, its code, eq. 2): hints of groups without an accepted attempt. An attempt is one pass; it
-- is accepted where all its rollouts are right. Decided by prompt, not by batch (reconstructed).
-- param hint: string=hint, source of the hints
-- param attempt: string=hinted, source of the rollouts that read one
WITH accepted AS (
    SELECT group_id
    FROM scored
    WHERE source = $attempt
    GROUP BY group_id, pass
    HAVING bool_and(coalesce(correct, false))
)
SELECT rollout_id
FROM scored
WHERE source = $hint AND group_id NOT IN (SELECT group_id FROM accepted)
