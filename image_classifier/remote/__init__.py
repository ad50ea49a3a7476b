"""Remote folders, by URL. `store.py` asks fsspec, `cache.py` fetches, `target.py` copies out."""
