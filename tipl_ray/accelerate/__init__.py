"""Update epochs replaced by inference: jumps, and the variants of PPO that use them."""
