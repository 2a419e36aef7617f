"""Decode steps of one model's engines over several numbers of GPUs, and the sums between the GPUs."""
