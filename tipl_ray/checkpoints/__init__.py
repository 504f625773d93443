"""Checkpoints of anybody's training run, reduced to the inner products of its displacements and asked how predictable
they are."""
