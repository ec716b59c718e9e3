-- flips(run_a, round_a, run_b, round_b): held-out prompts that both policies answered, with their shares of right samples.
-- flip: right where less than half were right before and at least half are after; wrong the other way round; else same.
-- A policy that was not evaluated is an error.
-- example: SELECT flip, count(*) AS prompts FROM flips('grpo-s0', 0, 'grpo-s0', 1) GROUP BY flip ORDER BY flip
-- after: by_prompt, not_evaluated
CREATE MACRO flips(run_a, round_a, run_b, round_b) AS TABLE
SELECT a.prompt_id, avg_at_k(a.n, a.c) AS right_a, avg_at_k(b.n, b.c) AS right_b,
       CASE WHEN 2 * a.c < a.n AND 2 * b.c >= b.n THEN 'right' WHEN 2 * a.c >= a.n AND 2 * b.c < b.n THEN 'wrong' ELSE 'same' END
           AS flip
FROM by_prompt AS a JOIN by_prompt AS b ON a.prompt_id = b.prompt_id
WHERE a.run = run_a AND a.round = round_a AND b.run = run_b AND b.round = round_b
UNION ALL
SELECT NULL, NULL, NULL, NULL
WHERE not_evaluated('flips', run_a, round_a, run_b, round_b);
