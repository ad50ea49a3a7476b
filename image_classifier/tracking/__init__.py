"""What a run leaves: its folder, its record, its checkpoints, and who it is."""
