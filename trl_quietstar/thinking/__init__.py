"""Thoughts written and read: sampling, scoring, generation, likelihood."""
