"""What a reader in a process of its own may do: for tests of who waits for it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from image_classifier.confinement import Confinement
from image_classifier.errors import DataError


def main(deed: str) -> None:
    """Send a frame, and then do as the word says."""
    with Confinement(computing_s=2) as confinement:
        confinement.send(b"first")
        if deed == "environment":
            confinement.send(json.dumps(dict(os.environ)).encode())
        elif deed == "refuse":
            raise DataError("is refused")
        elif deed == "raise":
            raise RuntimeError("of no use\nto anybody")
        elif deed == "memory":
            bytearray(2**31)
        elif deed == "pieces of memory":
            _ = [bytes(range(256)) * 2**18 for _ in range(2**6)]
        elif deed == "computing":
            while True:
                pass
        elif deed == "progress":
            for _ in range(4):  # 4 s altogether
                until = time.process_time() + 1
                while time.process_time() < until:
                    pass
                confinement.send(b"more")
        elif deed == "crash":
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGSEGV)
        elif deed == "leave":
            sys.stdout.flush()
            os._exit(3)
        elif deed == "large frame":
            confinement.send(bytes(101))
        elif deed == "torn frame":
            sys.stdout.buffer.write(b"D\x20\0\0\0torn")
            sys.stdout.flush()
            os._exit(0)
        elif deed == "wait":
            confinement.send(str(os.getpid()).encode())
            sys.stdout.flush()
            time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1])
