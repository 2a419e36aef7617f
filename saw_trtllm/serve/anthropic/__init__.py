"""Anthropic's ``/v1/messages`` over the same models, for agents that speak it."""
