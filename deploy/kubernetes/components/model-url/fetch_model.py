"""Fetches a published model: the tar file at the address in MODEL_URL, which is shown nowhere, into a folder.

python fetch_model.py FOLDER
"""

from __future__ import annotations

import os
import sys
import tarfile
import urllib.request


def main() -> int:
    """Fetch and unpack it; return the exit status."""
    address, folder = os.environ["MODEL_URL"], sys.argv[1]
    if not address.startswith(("https://", "http://")):
        print("error: MODEL_URL takes an https or http address", file=sys.stderr)
        return 2
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            with tarfile.open(fileobj=answer, mode="r|*") as archive:
                archive.extractall(folder, filter="data")
    except (OSError, tarfile.TarError, ValueError) as error:
        print(
            f"error: the model cannot be fetched: {type(error).__name__}", getattr(error, "code", ""), file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
