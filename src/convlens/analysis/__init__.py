"""Analysis of trained runs: comparison, diagnosis, and label errors in their data."""
