-- PF-PPO's sampling mode (arXiv 2409.06957): as many draws with replacement, by weight, as there are rows; what is
-- drawn then counts 1. A draw is a uniform number from a hash, and the row where the running sum of weights passes it.
-- allows: repeats
-- param seed: int, seed of the run (given by the workflow)
-- param round: int, round (given by the workflow)
WITH cumulated AS (
    SELECT rollout_id, weight, sum(weight) OVER (ORDER BY rollout_id ROWS UNBOUNDED PRECEDING) AS upper
    FROM scored
    WHERE weight > 0
), intervals AS (
    SELECT rollout_id, lag(upper, 1, 0.0) OVER (ORDER BY rollout_id) AS lower FROM cumulated
), draws AS (
    SELECT (md5_number_lower(concat_ws(':', $seed, $round, rollout_id)) >> 11)::DOUBLE / 2.0 ^ 53
           * (SELECT max(upper) FROM cumulated) AS u
    FROM scored
)
SELECT intervals.rollout_id, 1.0 AS weight
FROM draws ASOF JOIN intervals ON draws.u >= intervals.lower
