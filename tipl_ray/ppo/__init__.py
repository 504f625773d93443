"""PPO (Section 3.1): a group of trials in lock step. Knows nothing of prediction."""
