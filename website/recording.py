"""Record commands at a terminal, and write what it showed as an animated picture.

    python -m website.recording

Trains on the generated sample set and verifies the run, in a temporary folder, at a real pseudo-terminal. Every line
appears at the time at which it was printed. Writes `docs/pictures/training.svg`.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from website.pictures import FOLDER, PROJECT

PREPARE = "data prepare --source sample --dataset_folder data/sample --num_train 2000 --num_test 500"
COMMANDS = (
    "train --experiment_name shapes --run_name first --dataset_folder data/sample --recipe small --num_epochs 7",
    "verify experiments/shapes/first",
)
PAUSE_S = 1.0
"""Between a command and the one before, in which the command is read."""
END_S = 4.0
COLUMNS = 100
LINE_HEIGHT, CHARACTER = 19, 7.85
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

STYLE = """
  .screen { fill: #f6f8fa; stroke: #d0d7de; }
  text { font-family: ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; font-size: 13px; fill: #1f2328;
         white-space: pre; }
  .command { fill: #1f5fa8; font-weight: 600; }
  .verdict { fill: #1a6f37; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .screen { fill: #0d1117; stroke: #30363d; }
    text { fill: #e6edf3; }
    .command { fill: #6cb0f5; }
    .verdict { fill: #56d364; }
  }
"""


@dataclass(frozen=True)
class Line:
    """A text that a row of the screen shows, from when to when in seconds; until the end where that is None."""

    row: int
    text: str
    begins_s: float
    ends_s: float | None = None


def record(words: Sequence[str], folder: Path) -> list[tuple[float, str]]:
    """Run a command at a pseudo-terminal: the pieces of its output, and the seconds after which each came."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "PYTHONPATH": str(PROJECT), "TERM": "xterm"}
    started = time.perf_counter()
    process = subprocess.Popen(words, stdin=follower, stdout=follower, stderr=follower, cwd=folder, env=environment)
    os.close(follower)
    pieces = []
    while True:
        try:
            data = os.read(leader, 4096)
        except OSError:  # the terminal was closed with the last process that had it
            break
        if not data:
            break
        pieces.append((time.perf_counter() - started, data.decode()))
    os.close(leader)
    if process.wait():
        raise SystemExit(f"{shlex.join(words)} failed: {''.join(text for _, text in pieces)}")
    return pieces


def lay_out(pieces: Sequence[tuple[float, str]], first_row: int, begins_s: float) -> list[Line]:
    """Lay the output out in rows; what a carriage return writes over was there until then."""
    lines: list[Line] = []
    shown, row, column, text = 0.0, first_row, 0, ""
    for seconds, piece in pieces:
        for word in re.findall(r"\r\n|[\r\n]|[^\r\n]+", _CONTROL.sub("", piece)):
            if word in ("\r\n", "\n"):
                lines.append(Line(row, text, shown))
                row, column, text = row + 1, 0, ""
            elif word == "\r":
                column = 0
            else:
                if text.strip() and column == 0:
                    lines.append(Line(row, text, shown, begins_s + seconds))
                if not text or column == 0:
                    shown = begins_s + seconds
                text = text[:column] + word + text[column + len(word) :]
                column += len(word)
    return [line for line in lines if line.text.strip()]


def draw(lines: Sequence[Line], seconds: float, commands: int) -> str:
    """Draw the screen. Without animation, or where a reader wants none, it shows what is left at the end."""
    rows = max(line.row for line in lines) + 1
    width, height = round(COLUMNS * CHARACTER + 40), rows * LINE_HEIGHT + 30
    rules, texts = [], []
    for number, line in enumerate(lines):
        begins, ends = line.begins_s / seconds * 100, (line.ends_s or seconds) / seconds * 100
        end = f"{ends:.2f}%{{visibility:hidden}}" if line.ends_s is not None else ""
        rules.append(
            f"@keyframes k{number}{{0%{{visibility:hidden}}{begins:.2f}%{{visibility:visible}}{end}}}"
            f".k{number}{{animation:k{number} {seconds:.1f}s step-end infinite"
            f"{';visibility:hidden' if line.ends_s is not None else ''}}}"
        )
        is_command = line.text.startswith(("$ ", "    --"))
        kind = "command" if is_command else "verdict" if "IDENTICAL" in line.text else "output"
        y = 28 + line.row * LINE_HEIGHT
        texts.append(f'<text class="{kind} k{number}" x="20" y="{y}">{escape(line.text.rstrip())}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-labelledby="title">\n'
        f'<title id="title">A recording of {commands} commands at a terminal: a training, and its verification, which '
        "says IDENTICAL</title>\n"
        f"<style>{STYLE}{' '.join(rules)}\n"
        "@media (prefers-reduced-motion: reduce) { text { animation: none !important; } }\n</style>\n"
        f'<rect class="screen" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
        + "\n".join(texts)
        + "\n</svg>\n"
    )


def main() -> None:
    """Record and draw."""
    program = [sys.executable, "-m", "image_classifier"]
    lines: list[Line] = []
    now, row = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        record([*program, *shlex.split(PREPARE)], Path(folder))
        for command in COMMANDS:
            words = f"$ image_classifier {command}"
            cut = textwrap.wrap(words, COLUMNS - 2, subsequent_indent="    ", break_on_hyphens=False)
            cut[:-1] = [f"{part} \\" for part in cut[:-1]]
            lines += [Line(row + number, text, now + 0.2) for number, text in enumerate(cut)]
            pieces = record([*program, *shlex.split(command)], Path(folder))
            lines += lay_out(pieces, row + len(cut), now + PAUSE_S)
            now = max(line.begins_s for line in lines) + PAUSE_S
            row = max(line.row for line in lines) + 2
    seconds = now + END_S
    (FOLDER / "training.svg").write_text(draw(lines, seconds, len(COMMANDS)), encoding="utf-8")
    print(f"{seconds:.1f} s, {row - 1} rows")


if __name__ == "__main__":
    main()
