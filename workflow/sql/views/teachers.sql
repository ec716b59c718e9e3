-- teachers: by run, round and scorer of kind teacher: how many rollouts it scored, and means over their tokens in nats. gap is
-- the log-prob of whoever sampled minus the teacher's, on-policy an estimate of KL(policy || teacher); right_gap and wrong_gap
-- the same over right and over wrong rollouts. A teacher that knows better has a larger gap on wrong ones.
-- after: teacher_tokens, judged
-- example: SELECT run, round, scorer, rollouts, gap, right_gap, wrong_gap FROM teachers ORDER BY ALL LIMIT 3
CREATE VIEW teachers AS
SELECT t.run, t.round, t.scorer, count(DISTINCT t.rollout_id) AS rollouts, avg(t.teacher_logprob) AS teacher_logprob,
       avg(t.teacher_entropy) AS teacher_entropy, avg(t.gap) AS gap, avg(t.gap) FILTER (j.correct) AS right_gap,
       avg(t.gap) FILTER (NOT j.correct) AS wrong_gap
FROM teacher_tokens AS t
LEFT JOIN judged AS j ON t.run = j.run AND t.round = j.round AND t.rollout_id = j.rollout_id
WHERE t.trained AND isfinite(t.gap)
GROUP BY ALL;
