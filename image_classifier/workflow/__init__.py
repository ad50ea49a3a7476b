"""A workflow from data to a promoted model, as a Metaflow flow into which a class of one's own plugs."""
