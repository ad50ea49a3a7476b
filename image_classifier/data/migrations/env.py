"""Run by Alembic, on the connection that it was handed."""

from alembic import context

from image_classifier.data.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
