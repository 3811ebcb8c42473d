"""Policies: who is asked next."""
