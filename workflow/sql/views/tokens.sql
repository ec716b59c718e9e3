-- tokens: one row per token of a completion, as each run sees it; name a run and a round, or all tokens there are get read.
-- position counts from 0; logprob and entropy in nats; trained: false on tokens that the policy did not write.
-- example: SELECT position, count(*) AS n, avg(logprob) AS logprob, avg(entropy) AS entropy FROM tokens WHERE round = 0 GROUP BY position ORDER BY position LIMIT 5
CREATE VIEW tokens AS
SELECT run, round, rollout_id, group_id, prompt_id, sample, unnest(range(len(tokens)))::INTEGER AS position,
       unnest(tokens) AS token, unnest(logprobs) AS logprob, unnest(entropy) AS entropy, unnest(train_mask) AS trained
FROM seen_rollouts;
