"""The engine contract: what a builder writes and a runtime reads."""
