"""The training loop and its parts; they do no input or output."""
