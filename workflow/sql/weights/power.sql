-- PPO-pow-k (arXiv 2409.06957): weights proportional to |R|^k over the whole buffer; all alike where every reward is 0.
-- param k: double (0, inf), the power
SELECT rollout_id,
       CASE WHEN sum(abs(reward) ^ $k) OVER b > 0 THEN abs(reward) ^ $k / sum(abs(reward) ^ $k) OVER b
            ELSE 1.0 / count(*) OVER b END AS weight
FROM scored
WINDOW b AS (ORDER BY rollout_id ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
