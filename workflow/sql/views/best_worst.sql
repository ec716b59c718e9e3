-- best_worst: the best and the worst rollout of every group whose rewards differ, side by side; of equals the first sample.
-- Experts' solutions (rollout.experts) and derived rollouts are left out, and rewards that are no finite number.
-- example: SELECT group_id, best_reward, best_text, worst_reward, worst_text FROM best_worst WHERE round = 0 ORDER BY ALL LIMIT 3
CREATE VIEW best_worst AS
SELECT run, round, pass, group_id, prompt_id, best.reward AS best_reward, worst.reward AS worst_reward,
       best.rollout_id AS best, worst.rollout_id AS worst, best.text AS best_text, worst.text AS worst_text
FROM (
    SELECT run, round, pass, group_id, any_value(prompt_id) AS prompt_id,
           max_by({rollout_id: rollout_id, reward: reward, text: text}, {reward: reward, first: -sample}) AS best,
           min_by({rollout_id: rollout_id, reward: reward, text: text}, {reward: reward, first: sample}) AS worst
    FROM scored
    WHERE source <> 'expert' AND NOT (pass > 0 AND parent_id IS NOT NULL) AND isfinite(reward)
    GROUP BY run, round, pass, group_id
)
WHERE best.reward > worst.reward;
