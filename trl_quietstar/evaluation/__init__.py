"""What thoughts are good for: validation, inspection, tasks."""
