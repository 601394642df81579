"""What the training loop needs: out of memory, numerical safety, several processes."""
