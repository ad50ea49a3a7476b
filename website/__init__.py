"""What makes the documentation: pictures, the recording of a terminal, the reference, the checks of prose.

Nothing of it is installed with the package. `mkdocs.yml` names `hooks.py`; the pages are in `docs/`.
"""
