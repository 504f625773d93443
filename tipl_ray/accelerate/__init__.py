"""Update epochs replaced by inference: jumps, and the contenders that try them."""
