"""Whole decode steps of TensorRT engines by the format of their cache."""
