"""What all benchmarks share: records, environment, tables and plots."""
