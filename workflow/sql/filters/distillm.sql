-- DistiLLM (arXiv 2402.03898): of a share phi of this round's groups what the policy wrote, of the others the data's
-- completions (experts'). phi rises by `step` for each round in sight whose rollouts lie further from the teacher than
-- those of the round before: their mean of mean_logprob - teacher, of prompts not yet trained on, stands for the
-- validation loss. A share `progress` of the policy's groups gives way to groups of earlier rounds, as far as there
-- are as many: the buffer of old outputs. Needs a scorer named teacher.
-- needs: curate.replay >= max_age
-- param start: double=0.0 [0, 1], phi where no loss has risen
-- param step: double=0.25 (0, 1], what a rise adds to phi
-- param margin: double=0.0 [0, inf), nats that a loss must rise by to count
-- param progress: double [0, 1], share of replayed groups (from 0 to 1 over curate.horizon; or a number)
-- param max_age: int=4 [1, inf), oldest groups that are replayed, in rounds
-- param seed: int, seed of the run (given by the workflow)
-- param round: int, round (given by the workflow)
WITH lots AS (
    SELECT group_id, max(age) AS age,
           (md5_number_lower(concat_ws(':', $seed, $round, group_id)) >> 11)::DOUBLE / 2.0 ^ 53 AS coin,
           (md5_number_lower(concat_ws(':', $seed, $round, group_id, 'buffer')) >> 11)::DOUBLE / 2.0 ^ 53 AS lot
    FROM scored
    WHERE age <= $max_age
    GROUP BY group_id
), losses AS (
    SELECT age, avg(mean_logprob - teacher) AS loss
    FROM scored
    WHERE source <> 'expert' AND age <= $max_age
    GROUP BY age
), rises AS (
    SELECT loss > lead(loss) OVER (ORDER BY age) + $margin AS rose FROM losses
), share AS (
    SELECT least(1.0, $start + $step * count(*) FILTER (rose)) AS phi FROM rises
), own AS (
    SELECT group_id, lot < $progress AS gives_way,
           row_number() OVER (PARTITION BY lot < $progress ORDER BY lot, group_id) AS place
    FROM lots, share
    WHERE age = 0 AND coin < phi
), old AS (
    SELECT group_id, row_number() OVER (ORDER BY lot, group_id) AS place FROM lots WHERE age > 0
), swapped AS (
    SELECT least((SELECT count(*) FROM own WHERE gives_way), (SELECT count(*) FROM old)) AS n
)
SELECT rollout_id
FROM scored
LEFT JOIN own USING (group_id)
LEFT JOIN old USING (group_id)
CROSS JOIN swapped
WHERE CASE WHEN source = 'expert' THEN age = 0 AND own.place IS NULL
           WHEN age = 0 THEN own.place IS NOT NULL AND NOT (own.gives_way AND own.place <= n)
           ELSE coalesce(old.place <= n, false) END
