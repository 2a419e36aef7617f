"""The CPU reference in plain PyTorch: the oracle of the tests and the backend where there is no GPU."""
