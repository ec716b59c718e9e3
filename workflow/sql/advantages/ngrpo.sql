-- NGRPO (arXiv 2509.18851, eq. 6): the reward standardised as if the group held further samples with the maximum
-- reward, so that an all-wrong group is pushed down; a group whose rewards all are the maximum carries no signal.
-- param r_max: double=1.0, reward of the virtual samples
-- param virtual: int=1, number of virtual samples (m)
-- param ddof: int=1 [0|1], divisor of the variance is G + m - ddof (released code: 1, paper: 0)
-- param eps: double=1e-6, added to the standard deviation
WITH means AS (
    SELECT rollout_id, group_id, sample, reward, count(*) OVER g + $virtual AS n,
           (sum(reward) OVER g + $virtual * $r_max) / (count(*) OVER g + $virtual) AS mean,
           min(reward) OVER g = $r_max AND max(reward) OVER g = $r_max AS solved
    FROM scored
    WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
)
SELECT rollout_id,
       CASE WHEN solved THEN 0.0
            ELSE (reward - mean)
                 / (sqrt((sum((reward - mean) ^ 2) OVER g + $virtual * ($r_max - mean) ^ 2) / (n - $ddof)) + $eps)
       END AS advantage
FROM means
WINDOW g AS (PARTITION BY group_id ORDER BY sample ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
