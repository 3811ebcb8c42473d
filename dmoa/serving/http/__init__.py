"""The HTTP edge: OpenAI's routes over a swarm."""
