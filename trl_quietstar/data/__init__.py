"""A user's data as rows of tokens."""
