-- routes: by run and round, how many rows of the batch each route has, and their share: which loss gets how much of it.
-- example: SELECT round, route, row_count, share FROM routes ORDER BY ALL LIMIT 4
CREATE VIEW routes AS
SELECT run, round, route, count(*) AS row_count, count(*) / sum(count(*)) OVER (PARTITION BY run, round) AS share
FROM seen_batch
WHERE route IS NOT NULL
GROUP BY run, round, route;
