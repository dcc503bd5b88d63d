"""What a run needs around its steps: checkpoints, optimizers, callbacks, faults."""
