"""The backends: siblings behind one protocol, which only the registry knows together."""
