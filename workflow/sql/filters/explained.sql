-- ExPO (arXiv 2507.02834): the policy's rollouts, and of each group the first explanation that ends in the right answer
-- and says more than it (reconstructed).
-- param least: int=4 [1, inf), fewest tokens of an explanation, its end included: shorter ones only restate the answer
-- param failing: bool=false, only in groups without a right rollout of the policy
-- param source: string=explanation, source of the explanations
WITH usable AS (
    SELECT rollout_id, group_id, sample, source,
           source = $source AND coalesce(correct, false) AND length >= $least
           AND NOT ($failing AND coalesce(bool_or(correct) FILTER (source = 'policy') OVER g, false)) AS explains
    FROM scored
    WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
)
SELECT rollout_id
FROM usable
QUALIFY source = 'policy' OR (explains AND row_number() OVER (PARTITION BY group_id, explains ORDER BY sample) = 1)
