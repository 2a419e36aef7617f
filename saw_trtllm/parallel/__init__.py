"""Tensor parallel engines: a process for each rank, and the executor that leads them."""
