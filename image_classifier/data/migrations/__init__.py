"""Alembic's migrations, in the package: `image_classifier data upgrade` applies them."""
