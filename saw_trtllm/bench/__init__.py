"""What a user measures on an engine of their own: its throughput under load, and its latency."""
