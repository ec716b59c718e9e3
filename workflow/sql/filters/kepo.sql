-- KEPO (arXiv 2602.00400, its code, eq. 3): in groups with an accepted attempt (all its hinted rollouts right) these m
-- rollouts in place of m of the group's own, drawn without replacement by a hash. Hints, other attempts are left out.
-- param attempt: string=hinted, source of the rollouts that read a hint
-- param seed: int, seed of the run (given by the workflow)
-- param round: int, round (given by the workflow)
WITH accepted AS (
    SELECT group_id, pass, count(*) AS m
    FROM scored
    WHERE source = $attempt
    GROUP BY group_id, pass
    HAVING bool_and(coalesce(correct, false))
    QUALIFY row_number() OVER (PARTITION BY group_id ORDER BY pass) = 1
),
own AS (
    SELECT rollout_id, group_id,
           row_number() OVER (PARTITION BY group_id
                              ORDER BY md5_number_lower(concat_ws(':', $seed, $round, rollout_id)), rollout_id) AS place
    FROM scored
    WHERE source = 'policy'
)
SELECT rollout_id FROM own LEFT JOIN accepted USING (group_id) WHERE place > coalesce(m, 0)
UNION ALL
SELECT rollout_id FROM scored JOIN accepted USING (group_id, pass) WHERE source = $attempt
