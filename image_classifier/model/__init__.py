"""The networks, one file a family, and the catalog that finds them by name."""
