"""Conformance suites for networks, optimizers and data sources of other packages, to be called by their own tests."""
