"""Conformance tests for networks, optimizers and data sources of other packages."""
