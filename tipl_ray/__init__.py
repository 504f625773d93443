"""TIPL as a distributed job system: policy weights over PPO training, as trajectories to model (arXiv 2503.04074)."""

__version__ = "0.1.0"
