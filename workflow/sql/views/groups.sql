-- groups: one row per group of rollouts, as each run sees it. signal: rewards differ, so that the group can teach something.
-- best and worst: by reward, of equals the first sample. Rewards that are no finite number count in none of these figures.
-- Experts' solutions (rollout.experts) and derived rollouts (rollout.derive) are left out: the figures are those of what was sampled
-- for the task's prompts.
-- example: SELECT run, round, avg(signal::INT) AS signal_share FROM groups GROUP BY ALL ORDER BY ALL
CREATE VIEW groups AS
SELECT run, round, pass, group_id, any_value(prompt_id) AS prompt_id, count(*) AS samples,
       count(*) FILTER (correct) AS right_samples,
       avg(finite) AS reward, stddev_samp(finite) AS reward_std, min(finite) AS reward_min, max(finite) AS reward_max,
       max(finite) > min(finite) AS signal,
       avg(length) AS length, avg((finish = 'length')::INT) AS truncated,
       max_by(rollout_id, {reward: finite, first: -sample}) FILTER (finite IS NOT NULL) AS best,
       min_by(rollout_id, {reward: finite, first: sample}) FILTER (finite IS NOT NULL) AS worst
FROM (SELECT *, CASE WHEN isfinite(reward) THEN reward END AS finite FROM scored
      WHERE source <> 'expert' AND NOT (pass > 0 AND parent_id IS NOT NULL))
GROUP BY run, round, pass, group_id;
