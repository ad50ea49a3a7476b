"""Many runs: a search over settings."""
