-- SD-Zero, phase 1 (arXiv 2604.12002, eq. 1 to 4): every kept revision is two rows of the same ids. `completion` trains
-- the revision alone (eq. 1), `turn` the whole assistant's turn, first answer and phrase included (eq. 2). Weights make
-- the sum of the two losses (eq. 3) of one mean over the batch, with `aggregate.weights: numerator`.
-- param per: string=tokens [tokens|trajectories], means over tokens (token_mean) or sums per row (seq_mean_token_sum)
-- allows: repeats
-- allows: drops
WITH spans AS (
    SELECT rollout_id, 'completion' AS span, length AS tokens FROM scored WHERE prefix_length IS NOT NULL
    UNION ALL
    SELECT rollout_id, 'turn', length + prefix_length FROM scored WHERE prefix_length IS NOT NULL
)
SELECT rollout_id, span,
       CASE WHEN $per = 'trajectories' THEN 2.0
            ELSE CAST(sum(tokens) OVER () AS DOUBLE) / sum(tokens) OVER (PARTITION BY span) END AS weight
FROM spans
