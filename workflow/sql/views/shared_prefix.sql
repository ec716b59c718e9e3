-- shared_prefix(a, b): how many elements two lists have in common before the first difference.
-- example: SELECT a.prompt_id, shared_prefix(a.tokens, b.tokens) AS same FROM evals AS a JOIN evals AS b USING (run, prompt_id, sample) WHERE a.round = 0 AND b.round = 1 ORDER BY ALL LIMIT 3
CREATE MACRO shared_prefix(a, b) AS CASE WHEN a IS NOT NULL AND b IS NOT NULL THEN coalesce(
    nullif(list_position([pair[1] <> pair[2] for pair in list_zip(a, b, true)], true), 0) - 1, least(len(a), len(b))
) END;
