"""Checkpoints of any training run, reduced to the inner products of its displacements; how predictable they are."""
