-- judged: rollouts and whether they are right, as in `scored`, without rewards and advantages: half the work over many rows.
-- example: SELECT run, round, avg(correct::INT) AS right_share FROM judged WHERE source <> 'expert' GROUP BY ALL ORDER BY ALL
CREATE VIEW judged AS
SELECT r.run, r.home, r.round, r.pass, r.rollout_id, r.group_id, r.prompt_id, r.sample, r.source, r.parent_id, r.length, r.finish,
       coalesce(b.correct, s.correct) AS correct
FROM seen_rollouts AS r
LEFT JOIN (
    SELECT s.run, s.round, s.rollout_id, s.reward >= c.threshold AS correct
    FROM seen_scores AS s JOIN correctness AS c ON s.run = c.run AND s.scorer = c.scorer
) AS s ON r.run = s.run AND r.round = s.round AND r.rollout_id = s.rollout_id
LEFT JOIN (SELECT run, round, rollout_id, correct FROM seen_batch WHERE slot = 0) AS b
    ON r.run = b.run AND r.round = b.round AND r.rollout_id = b.rollout_id;
