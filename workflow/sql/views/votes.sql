-- votes: the distinct answers to each held-out prompt by round: votes of n samples, and the share of them judged right.
-- Answers are compared as maj@k does: `normalised`.
-- example: SELECT prompt_id, answer, votes, n, right_share FROM votes WHERE round = 0 ORDER BY votes DESC, prompt_id, answer LIMIT 3
-- after: normalised
CREATE VIEW votes AS
SELECT run, round, prompt_id, answer, count(*)::INTEGER AS votes,
       sum(count(*)) OVER (PARTITION BY run, round, prompt_id)::INTEGER AS n, avg(correct::INT) AS right_share
FROM (
    SELECT run, round, prompt_id, correct, normalised(answer) AS answer FROM seen_evals
)
GROUP BY run, round, prompt_id, answer;
