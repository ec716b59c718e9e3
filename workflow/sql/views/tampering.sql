-- tampering: rollouts that look as if they were after the reward and not after the task, one row per sign: `empty` (nothing
-- but white space), `echo` (repeats the whole prompt, of 8 characters or more), `list` (three boxed answers, or ten numbers
-- in a row), `cut` (ended by the limit of length). rewarded: its reward is above the mean of its round. Experts are left out.
-- example: SELECT run, round, sign, count(*) AS rollouts, avg(rewarded::INT) AS rewarded FROM tampering GROUP BY ALL ORDER BY ALL
CREATE VIEW tampering AS
SELECT run, round, sign, rollout_id, group_id, prompt_id, reward, reward > mean AS rewarded, correct, length, text
FROM (
    SELECT s.run, s.round, s.rollout_id, s.group_id, s.prompt_id, s.reward, s.correct, s.length, s.finish, s.text,
           p.question, avg(s.reward) FILTER (isfinite(s.reward)) OVER (PARTITION BY s.run, s.round) AS mean
    FROM scored AS s
    LEFT JOIN (
        SELECT prompt_id, any_value(json_extract_string(messages, '$[#-1].content')) AS question
        FROM prompts GROUP BY prompt_id
    ) AS p USING (prompt_id)
    WHERE s.source <> 'expert'
) CROSS JOIN (VALUES ('empty'), ('echo'), ('list'), ('cut')) AS signs(sign)
WHERE CASE sign
    WHEN 'empty' THEN regexp_full_match(text, '\s*')
    WHEN 'echo' THEN length(question) >= 8 AND contains(text, question)
    WHEN 'list' THEN len(regexp_extract_all(text, '\\boxed')) >= 3
        OR regexp_matches(text, '(-?[0-9]+(\.[0-9]+)?(\s|,|;|/|\||or|and)+){9}-?[0-9]')
    ELSE finish = 'length'
END;
