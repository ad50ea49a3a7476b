"""A file a migration, in their order."""
