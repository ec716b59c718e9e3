-- solved: by run and round, how many training prompts were asked so far, and how many of them were solved at least once.
-- Experts' solutions (rollout.experts) and derived rollouts (rollout.derive) solve nothing: the figures are those of what was sampled.
-- example: SELECT round, solved, asked FROM solved WHERE run = 'grpo-s0' ORDER BY round
-- after: judged
CREATE VIEW solved AS
WITH prompts_of AS (
    SELECT run, prompt_id, min(round) AS asked_in, min(round) FILTER (correct) AS solved_in
    FROM judged
    WHERE source <> 'expert' AND NOT (pass > 0 AND parent_id IS NOT NULL)
    GROUP BY run, prompt_id
), rounds_of AS (
    SELECT DISTINCT run, round FROM seen_rollouts
)
SELECT run, round, count(*) AS asked, count(*) FILTER (solved_in <= round) AS solved
FROM rounds_of JOIN prompts_of USING (run)
WHERE asked_in <= round
GROUP BY run, round;
