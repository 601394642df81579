"""What a run keeps so that it can be killed at any moment, and how it goes on."""
