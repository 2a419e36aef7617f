"""``saw-bench engine``: whole decode steps of a TensorRT engine by the format of its cache, needing no PyTorch."""
