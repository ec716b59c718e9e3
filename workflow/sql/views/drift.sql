-- drift(run_a, round_a, run_b, round_b): how far two evaluated policies are apart on each held-out prompt, in their samples.
-- Evaluations draw with the same noise, so two policies write the same tokens until they differ enough: `shared` is the
-- share of a's tokens before the first difference. On these tokens both log-probs are known: log_ratio is the mean of
-- log b - log a, gap the mean of its absolute value (nats per token). They are those of text on which the two agree.
-- A policy that was not evaluated is an error.
-- example: SELECT avg(shared) AS shared, avg(gap) AS gap, avg(same_answer) AS same FROM drift('grpo-s0', 0, 'grpo-s0', 1)
-- after: shared_prefix, not_evaluated
CREATE MACRO drift(run_a, round_a, run_b, round_b) AS TABLE
WITH pairs AS (
    SELECT a.prompt_id, a.answer = b.answer AS same, a.correct AS right_a, b.correct AS right_b, len(a.tokens) AS length,
           shared_prefix(a.tokens, b.tokens) AS prefix, a.logprobs AS la, b.logprobs AS lb
    FROM seen_evals AS a JOIN seen_evals AS b ON a.prompt_id = b.prompt_id AND a.sample = b.sample
    WHERE a.run = run_a AND a.round = round_a AND b.run = run_b AND b.round = round_b
), ratios AS (
    SELECT *, [pair[2] - pair[1] for pair in list_zip(la[:prefix], lb[:prefix])] AS ratio FROM pairs
)
SELECT prompt_id, count(*)::INTEGER AS samples, avg(same::INT) AS same_answer, sum(prefix) / sum(length) AS shared,
       sum(list_sum(ratio)) / sum(prefix) AS log_ratio, sum(list_sum([abs(r) for r in ratio])) / sum(prefix) AS gap,
       avg(right_a::INT) AS right_a, avg(right_b::INT) AS right_b
FROM ratios
GROUP BY prompt_id
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
WHERE not_evaluated('drift', run_a, round_a, run_b, round_b);
