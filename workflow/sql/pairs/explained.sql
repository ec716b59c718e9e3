-- ExPO's preference pairs (arXiv 2507.02834, eq. 5): a group's first explanation against its first wrong rollout of the
-- policy's own. Which explanations are usable is the business of filters/explained.
-- param source: string=explanation, source of the explanations
WITH firsts AS (
    SELECT rollout_id, group_id, source = $source AS explains
    FROM scored
    WHERE source = $source OR (source = 'policy' AND NOT correct)
    QUALIFY row_number() OVER (PARTITION BY group_id, explains ORDER BY sample) = 1
)
SELECT rollout_id, group_id AS pair_id, CASE WHEN explains THEN 'chosen' ELSE 'rejected' END AS role
FROM firsts
QUALIFY count(*) OVER (PARTITION BY group_id) = 2
