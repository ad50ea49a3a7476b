"""The package's kernels for operations where torch is slow, and their loader."""
