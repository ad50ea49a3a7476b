"""One script a claim: each measures it and writes `results/<script>.json`."""
