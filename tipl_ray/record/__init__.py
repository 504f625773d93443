"""Anyone's training run as trials of the data set: recorded in any torch loop, and out again as modules and files."""
