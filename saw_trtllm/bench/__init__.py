"""Speed beside peers: cases and targets, the run on a GPU, its record, and the tables and plots drawn from it."""
