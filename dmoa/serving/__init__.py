"""The swarm on Ray Serve, behind one OpenAI-compatible name."""
