-- PPO-top, top-random and top-bottom (arXiv 2409.06957): rewards from a threshold on, and half of the rest or those at
-- the bottom; normalised over the whole buffer, all alike where nothing is kept.
-- param keep: string [top|top_random|top_bottom], what is kept besides the top
-- param high: double, least reward of the top
-- param low: double when keep=top_bottom, greatest reward of the bottom
WITH kept AS (
    SELECT rollout_id,
           CASE WHEN reward >= $high THEN 1.0 WHEN $keep = 'top_random' THEN 0.5
                WHEN $keep = 'top_bottom' AND reward <= $low THEN 1.0 ELSE 0.0 END AS w
    FROM scored
)
SELECT rollout_id,
       CASE WHEN sum(w) OVER b > 0 THEN (w / sum(w) OVER b)::DOUBLE ELSE 1.0 / count(*) OVER b END AS weight
FROM kept
WINDOW b AS (ORDER BY rollout_id ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
