"""A published model: its folder, the proof that it is what was published, and what computes with it."""
