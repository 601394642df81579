"""The training loop and inference: a step, out of memory, non-finite losses, several processes."""
