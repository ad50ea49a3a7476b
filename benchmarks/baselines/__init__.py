"""What the trainer is measured against: each a training as its authors describe it, in plain PyTorch."""
