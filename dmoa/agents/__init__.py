"""Agents: prompts, tools, engines, the pool, and the embedder."""
