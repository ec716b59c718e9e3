-- not_evaluated(asker, run_a, round_a, run_b, round_b): an error in the name of the macro `asker` where policies were evaluated
-- and one of these two was not; else false.
-- example: SELECT not_evaluated('example', run, round, run, round) AS never FROM learning LIMIT 1
CREATE MACRO not_evaluated(asker, run_a, round_a, run_b, round_b) AS (
    SELECT CASE
        WHEN count(*) = 0 THEN false
        WHEN count(*) FILTER (e.run = run_a AND e.round = round_a) = 0
        THEN error(asker || ': run ' || run_a || ' has no evaluation of round ' || round_a || '; see SELECT run, round FROM learning')
        WHEN count(*) FILTER (e.run = run_b AND e.round = round_b) = 0
        THEN error(asker || ': run ' || run_b || ' has no evaluation of round ' || round_b || '; see SELECT run, round FROM learning')
        ELSE false
    END
    FROM seen_evals AS e
);
