"""Benchmarks against peers, and the records and pages that come of them: ``python -m benchmarks``."""
