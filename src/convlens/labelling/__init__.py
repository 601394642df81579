"""Wrong labels in a data set: out-of-fold probabilities, confident learning, sheets to review."""
