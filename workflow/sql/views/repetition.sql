-- repetition(items, n): share of the n-grams of a list (tokens, or the words of a text) that stood in it before, in [0, 1].
-- 1 - distinct n-grams / n-grams, as seq-rep-n (arXiv 1908.04319, eq. 9); NULL for lists shorter than n.
-- example: SELECT rollout_id, repetition(tokens, 4) AS repeated, text FROM rollouts WHERE round = 0 ORDER BY repeated DESC, rollout_id LIMIT 3
CREATE MACRO repetition(items, n) AS CASE WHEN len(items) >= n THEN
    1 - len(list_distinct([items[i:i + n - 1] for i in range(1, len(items) - n + 2)])) / (len(items) - n + 1)
END;
