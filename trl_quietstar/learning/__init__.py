"""What a thought is worth and what is learned from it, as functions of tensors."""
