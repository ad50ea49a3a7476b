"""Commands that write to a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Sequence

from tests.conftest import PROJECT


def run_on_terminal(words: Sequence[str], *, lines: int, columns: int) -> tuple[str, str]:
    """Run a command whose stderr is a terminal; return what the terminal got, and stdout."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    with subprocess.Popen(words, cwd=PROJECT, stderr=terminal, stdout=subprocess.PIPE, text=True) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(controller, 65536)
            except OSError:  # the other side was closed
                break
            if not part:
                break
            shown += part
        output, _ = process.communicate(timeout=60)
    os.close(controller)
    assert process.returncode == 0, shown.decode()
    return shown.decode(), output
