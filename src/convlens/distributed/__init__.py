"""Training in several processes: process group helpers on `torch.distributed`."""
