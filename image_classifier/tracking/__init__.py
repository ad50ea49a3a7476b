"""The files of a run: folder, record, checkpoints and identity."""
