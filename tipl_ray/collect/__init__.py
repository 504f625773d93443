"""Trials on Ray: which run where, and their way to the data set."""
