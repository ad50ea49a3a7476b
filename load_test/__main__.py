"""Serves a model, loads it with Locust, and ends both: `python -m load_test [--model MODEL] [Locust's options]`.

Without a model it trains one in seconds, on shapes that it draws. The report and the history as CSV go to
`load_test/results/`. The exit status is 0 where every answer was as it should be.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PROGRAM = (sys.executable, "-m", "image_classifier")
START_S = 60


def run(*words: str | Path) -> None:
    """Run a command of the package, and show what it says only where it fails."""
    result = subprocess.run([*PROGRAM, *map(str, words)], cwd=PROJECT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {' '.join(map(str, words))}: {result.stderr.strip()}")


def make_model(folder: Path) -> Path:
    """Train a small network on drawn shapes and publish it; return the published folder."""
    data, runs = folder / "data", folder / "experiments"
    run("data", "prepare", "--source", "sample", "--num_train", "1000", "--num_test", "200", "--dataset_folder", data)
    names = ("--experiment_name", "load_test", "--run_name", "model")
    options = ("--recipe", "notebook", "--num_epochs", "1", "--batch_size", "50")
    run("train", "--experiments_folder", runs, *names, "--dataset_folder", data, *options)
    run("publish", runs / "load_test" / "model")
    return runs / "load_test" / "model" / "published"


@contextmanager
def serving(model: str | Path, folder: Path, key: str) -> Iterator[str]:
    """Serve a model to whoever has the key until the block ends; yield the address."""
    keys, log = folder / "keys", folder / "log"
    keys.write_text(f"load_test:{hashlib.sha256(key.encode()).hexdigest()}\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*PROGRAM, "serve", str(model), "--port", str(port), "--api_keys_file", str(keys), "--drain_s", "0"]
    with open(log, "wb") as file:
        process = subprocess.Popen(words, cwd=PROJECT, stdout=file, stderr=file)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not is_ready(address):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server does not answer:\n{log.read_text()}")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        status = process.wait(60)
    if status:
        sys.exit(f"the server ended with status {status}:\n{log.read_text()}")


def is_ready(address: str) -> bool:
    """Say whether a server wants requests."""
    try:
        with urllib.request.urlopen(f"{address}/health/ready", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Load a model as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser("python -m load_test", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="published folder, or ONNX file")
    arguments, options = parser.parse_known_args(argv)
    (PROJECT / "load_test" / "results").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder, key = Path(name), secrets.token_hex(16)
        model = Path(arguments.model).absolute() if arguments.model else make_model(folder)
        with serving(model, folder, key) as address:
            words = [sys.executable, "-m", "locust", "--config", "load_test/locust.conf", "--host", address, *options]
            return subprocess.run(words, cwd=PROJECT, env=os.environ | {"LOAD_TEST_KEY": key}).returncode


if __name__ == "__main__":
    sys.exit(main())
