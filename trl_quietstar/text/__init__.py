"""What a batch is: its text, the thoughts in it and the branches they run in."""
