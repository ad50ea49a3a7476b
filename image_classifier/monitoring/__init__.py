"""What captured requests say about the world: whether it drifts, and how right the answers are. Free of torch."""
