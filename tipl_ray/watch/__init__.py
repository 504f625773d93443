"""A recorded policy at work: an episode, its return, and a video of it."""
