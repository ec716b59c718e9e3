"""Comparisons: runs by what they reach on held-out prompts, recipes by their gradients on the same rollouts."""
