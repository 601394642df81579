"""Training: resolve a recipe, build the job, train it, and save and resume the run."""
