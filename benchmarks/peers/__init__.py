"""The servers that benchmarks.serving puts beside this one, each the way its own documents show."""
