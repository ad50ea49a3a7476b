"""A workflow from data to a promoted model, as a Metaflow flow that a user's class can extend."""
