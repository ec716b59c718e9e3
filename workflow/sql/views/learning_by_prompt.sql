-- learning_by_prompt: how a run learnt each prompt: its share of right samples in every round that asked it, first to last.
-- split: heldout (from evals) or train (from what was sampled for training; experts' solutions are left out). gain: last - first.
-- example: SELECT prompt_id, rounds, shares, gain FROM learning_by_prompt WHERE split = 'heldout' ORDER BY gain DESC, prompt_id LIMIT 3
-- after: by_prompt, judged
CREATE VIEW learning_by_prompt AS
SELECT run, split, prompt_id, list(round ORDER BY round) AS rounds, list(share ORDER BY round) AS shares,
       first(share ORDER BY round) AS first, last(share ORDER BY round) AS last,
       last(share ORDER BY round) - first(share ORDER BY round) AS gain
FROM (
    SELECT run, 'heldout' AS split, prompt_id, round, avg_at_k(n, c) AS share FROM by_prompt
    UNION ALL
    SELECT run, 'train' AS split, prompt_id, round, avg(correct::INT) AS share FROM judged
    WHERE source <> 'expert' AND NOT (pass > 0 AND parent_id IS NOT NULL) AND correct IS NOT NULL GROUP BY run, round, prompt_id
)
GROUP BY run, split, prompt_id;
