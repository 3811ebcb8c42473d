"""The `transformers` engine: a language model in this process."""
