"""Several runs of one recipe: settings, splits, seeds and folds, and what they reached."""
