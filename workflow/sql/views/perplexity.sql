-- perplexity(logprobs): exp of the mean negative log-prob (nats) of a completion's tokens; NaN log-probs give NaN.
-- example: SELECT round, avg(perplexity(logprobs)) FROM rollouts GROUP BY round ORDER BY round
CREATE MACRO perplexity(logprobs) AS exp(-list_avg(logprobs));
