-- RFT (arXiv 2308.01825): right rollouts without duplicate texts, at most so many per prompt, the first samples first.
-- param per_prompt: int=1000000, most rollouts of one prompt
WITH right_ones AS (
    SELECT rollout_id, prompt_id, group_id, sample
    FROM scored
    WHERE correct
    QUALIFY row_number() OVER (PARTITION BY prompt_id, text_hash ORDER BY group_id, sample, rollout_id) = 1
)
SELECT rollout_id
FROM right_ones
QUALIFY row_number() OVER (PARTITION BY prompt_id ORDER BY group_id, sample, rollout_id) <= $per_prompt
