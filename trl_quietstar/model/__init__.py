"""What a model gains: heads, embeddings of its own, an LM head that computes in blocks."""
