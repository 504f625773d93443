"""Training on Ray Train, what it is trained on, and what is left of it."""
