"""A published model over HTTP: loaded and checked, batched, guarded, observed. Never imports torch."""
