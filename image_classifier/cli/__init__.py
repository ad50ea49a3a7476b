"""One file a command: parse, one call, exit status."""
