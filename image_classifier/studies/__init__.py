"""Studies of many runs: hyperparameter search."""
