"""Ways to run a model over a text and the branches that leave it."""
