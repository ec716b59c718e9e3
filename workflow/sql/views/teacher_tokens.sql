-- teacher_tokens: one row per token that a teacher scored, as each run sees it; name a run and a round, or all get read.
-- gap: logprob - teacher_logprob in nats, positive where the teacher likes the token less than whoever sampled it. topk_ids and
-- topk_logprobs: the teacher's likeliest tokens; tail: the probability of the others. NULL where the scorer stores none.
-- example: SELECT position, count(*) AS n, avg(gap) AS gap, avg(teacher_entropy) AS entropy FROM teacher_tokens WHERE round = 0 GROUP BY position ORDER BY position LIMIT 5
CREATE VIEW teacher_tokens AS
SELECT *, logprob - teacher_logprob AS gap,
       greatest(0.0, 1.0 - list_sum(list_transform(topk_logprobs, lambda x: exp(x)))) AS tail
FROM (
    SELECT r.run, r.round, s.scorer, r.rollout_id, r.group_id, r.prompt_id, r.sample,
           unnest(range(len(r.tokens)))::INTEGER AS position, unnest(r.tokens) AS token, unnest(r.logprobs) AS logprob,
           unnest(s.teacher_logprob) AS teacher_logprob, unnest(s.teacher_entropy) AS teacher_entropy,
           unnest(s.teacher_topk_ids) AS topk_ids, unnest(s.teacher_topk_logprobs) AS topk_logprobs,
           unnest(r.train_mask) AS trained
    FROM seen_rollouts AS r
    JOIN seen_scores AS s ON r.run = s.run AND r.round = s.round AND r.rollout_id = s.rollout_id
    WHERE s.teacher_logprob IS NOT NULL
);
