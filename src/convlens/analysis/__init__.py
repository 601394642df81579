"""What is wrong with a run: rules with stated thresholds on its curves and measurements."""
