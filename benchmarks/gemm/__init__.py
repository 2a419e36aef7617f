"""Products of few rows with weights of 4 and 8 bits, beside cuBLASLt's and TensorRT's own."""
