-- SCOPE (arXiv 2604.10688, eq. 4 and 5): softmax within a group's right rollouts of their own perplexity, so that
-- surprising ones count more, and within its wrong ones of the inverse of the teacher's (scorer `teacher`); each sums
-- to 1. The perplexity of a rollout without tokens is 1.
-- param tau: double=1.0 [1e-6, 1e9), temperature of both; larger is more even
-- param student_sign: int=1 [1|-1], -1 turns the right ones' order round, as the released code does
-- param mean_one: bool=false, times the size of the set, so that weights average 1 (the released code)
WITH logits AS (
    SELECT rollout_id, group_id, sample, correct,
           CASE WHEN correct THEN -$student_sign * coalesce(mean_logprob, 0.0) ELSE teacher END / $tau AS z
    FROM scored
), below AS (
    SELECT rollout_id, group_id, sample, correct, exp(z - max(z) OVER (PARTITION BY group_id, correct)) AS e FROM logits
)
SELECT rollout_id,
       e / sum(e) OVER s * CASE WHEN $mean_one THEN count(*) OVER s ELSE 1 END AS weight
FROM below
WINDOW s AS (PARTITION BY group_id, correct ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
