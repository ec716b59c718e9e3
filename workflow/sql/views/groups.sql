-- groups: one row per group of rollouts, as each run sees it. signal: rewards differ, so that the group can teach something.
-- Experts' solutions (rollout.experts) are left out: the figures are those of what was sampled.
-- example: SELECT run, round, avg(signal::INT) AS signal_share FROM groups GROUP BY ALL ORDER BY ALL
CREATE VIEW groups AS
SELECT run, round, pass, group_id, any_value(prompt_id) AS prompt_id, count(*) AS samples,
       count(*) FILTER (correct) AS right_samples,
       avg(reward) AS reward, stddev_samp(reward) AS reward_std, min(reward) AS reward_min, max(reward) AS reward_max,
       max(reward) > min(reward) AS signal,
       avg(length) AS length, avg((finish = 'length')::INT) AS truncated,
       max_by(rollout_id, reward) AS best, min_by(rollout_id, reward) AS worst
FROM scored
WHERE source <> 'expert'
GROUP BY run, round, pass, group_id;
