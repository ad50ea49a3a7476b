"""The networks, one file per family, and the catalogue that finds them by name."""
