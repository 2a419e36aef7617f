"""The backends: siblings that implement one protocol, which only the registry knows together."""
