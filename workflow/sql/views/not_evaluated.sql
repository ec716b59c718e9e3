-- not_evaluated(asker, of_run, of_round): an error in the name of the macro `asker` where other policies were evaluated and
-- this one was not; else false.
-- example: SELECT not_evaluated('example', run, round) AS never FROM evals LIMIT 1
CREATE MACRO not_evaluated(asker, of_run, of_round) AS CASE
    WHEN EXISTS (FROM seen_evals AS e WHERE e.run = of_run AND e.round = of_round) THEN false
    WHEN EXISTS (FROM seen_evals)
    THEN error(asker || ': run ' || of_run || ' has no evaluation of round ' || of_round || '; see SELECT run, round FROM learning')
    ELSE false
END;
