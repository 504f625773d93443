"""Jumps tuned for return."""
