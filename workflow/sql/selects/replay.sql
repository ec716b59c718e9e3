-- Reuse of earlier rounds (R2VPO, arXiv 2601.03320): all groups of this round, and as many drawn from earlier rounds
-- as make the wanted share of the batch. Advantages are those of generation, since groups never mix rounds.
-- needs: curate.replay >= max_age
-- param share: double=0.5 (0, 1), share of replayed groups in the batch
-- param max_age: int=4 [1, inf), oldest groups that are replayed, in rounds
-- param seed: int, seed of the run (given by the workflow)
-- param round: int, round (given by the workflow)
WITH lots AS (
    SELECT group_id, max(age) AS age, md5(concat_ws(':', $seed, $round, group_id)) AS lot
    FROM scored
    WHERE age <= $max_age
    GROUP BY group_id
), drawn AS (
    SELECT group_id, age, row_number() OVER (PARTITION BY age > 0 ORDER BY lot, group_id) AS place,
           count(*) FILTER (age = 0) OVER () AS fresh
    FROM lots
)
SELECT rollout_id
FROM scored JOIN drawn USING (group_id)
WHERE drawn.age = 0 OR place <= floor(fresh * $share / (1.0 - $share) + 0.5)
