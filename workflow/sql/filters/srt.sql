-- SD-Zero, phase 1 (arXiv 2604.12002, eq. 4): revisions that are right, whatever the answer was that they revise.
SELECT rollout_id FROM scored WHERE prefix_length IS NOT NULL AND correct
