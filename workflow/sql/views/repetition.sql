-- repetition(items, n): share of the n-grams of a list (tokens, or the words of a text) that stood in it before, in [0, 1].
-- 1 - distinct n-grams / n-grams, as seq-rep-n (arXiv 1908.04319, eq. 9); n from 1 to 8; NULL for lists shorter than n.
-- example: SELECT rollout_id, repetition(tokens, 4) AS repeated, text FROM rollouts WHERE round = 0 ORDER BY repeated DESC, rollout_id LIMIT 3
CREATE MACRO repetition(items, n) AS CASE
    WHEN n NOT BETWEEN 1 AND 8 THEN error('repetition: n = ' || n || '; it goes from 1 to 8')
    -- Shifted copies side by side: slices taken one by one would copy the list for every n-gram.
    WHEN len(items) >= n THEN 1 - len(list_distinct(list_zip(
        items, if(n > 1, items[2:], items[:0]), if(n > 2, items[3:], items[:0]), if(n > 3, items[4:], items[:0]),
        if(n > 4, items[5:], items[:0]), if(n > 5, items[6:], items[:0]), if(n > 6, items[7:], items[:0]),
        if(n > 7, items[8:], items[:0]))[:len(items) - n + 1])) / (len(items) - n + 1)
END;
