"""Files that convlens writes or opens: models, states of a run, its records, tensors of others."""
