"""Jumps tuned for the returns that follow them."""
