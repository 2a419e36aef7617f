"""Goodput of conversations that come back, against the bytes of the KV pool."""
