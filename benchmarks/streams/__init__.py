"""The same requests to one engine, bare and by way of each server."""
