"""What leaves a results folder: a policy as a Hugging Face folder, rollouts as a dataset of other trainers."""
