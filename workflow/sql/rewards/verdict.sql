-- OVD (arXiv 2601.21968): the reward is what the teacher says of the whole rollout: the score of the scorer `judge`.
SELECT rollout_id, judge AS reward
FROM scored
