"""Several runs of one recipe: variants, splits, seeds and folds, and what they reached."""
