"""Agents: prompts, tools, summarizers, the encoder, and the pool put together from its file."""
