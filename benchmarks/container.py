"""Size of the training image, what it is made of, and how long it takes to build it again after a change in the code.

    python -m benchmarks.container

Needs docker with an engine. Writes benchmarks/results/container.json and the table in docs/ci.md that comes from it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, save_result, summarize, write_table

IMAGE_NAME = "image-classifier-benchmark"
NUM_REBUILDS = 3
DOCUMENT = PROJECT / "docs" / "ci.md"

LIST_SIZES = """
import importlib.metadata as metadata, json
sizes = {}
for distribution in metadata.distributions(path=["/venv/lib/python3.11/site-packages"]):
    files = [file.locate() for file in distribution.files or []]
    sizes[distribution.name] = sum(file.stat().st_size for file in files if file.is_file())
print(json.dumps(sizes))
"""


def run(*words: str | Path, **variables: str) -> str:
    """Run a program and return what it printed."""
    line = [str(word) for word in words]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | variables).stdout


def build(project: Path) -> float:
    """Build the image of a project and return the seconds that it took."""
    began = time.perf_counter()
    run(project / "docker" / "build.sh", IMAGE_NAME=IMAGE_NAME)
    return time.perf_counter() - began


def measure() -> dict[str, Any]:
    """Build, look inside, and build again after changes."""
    image = f"{IMAGE_NAME}:latest"
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "image_classifier"
        run("git", "clone", "--quiet", PROJECT, copy)
        build(copy)
        (facts,) = json.loads(run("docker", "inspect", image))
        sizes = json.loads(run("docker", "run", "--rm", image, "python", "-c", LIST_SIZES))
        rebuilds = []
        for number in range(NUM_REBUILDS):
            with open(copy / "image_classifier" / "errors.py", "a", encoding="utf-8") as module:
                module.write(f"\n# change {number}\n")
            rebuilds.append(build(copy))
        starts = []
        for _ in range(NUM_REBUILDS):
            began = time.perf_counter()
            run("docker", "run", "--rm", image, "image_classifier", "--version")
            starts.append(time.perf_counter() - began)
    torch = {name: size for name, size in sizes.items() if re.match(r"torch$|triton$|nvidia|cuda", name)}
    return {
        "image_bytes": facts["Size"],
        "torch_bytes": sum(torch.values()),
        "other_distributions_bytes": sum(sizes.values()) - sum(torch.values()),
        "package_bytes": sizes["image-classifier"],
        "largest_distributions_bytes": dict(sorted(sizes.items(), key=lambda item: -item[1])[:10]),
        "rebuild_seconds": summarize(rebuilds),
        "start_seconds": summarize(starts),
    }


def build_table(result: dict[str, Any]) -> str:
    """Build the table of docs/ci.md from a result."""
    rebuild, start = result["rebuild_seconds"], result["start_seconds"]
    base = result["image_bytes"] - result["torch_bytes"] - result["other_distributions_bytes"]
    rows = [
        ("the image", f"{result['image_bytes'] / 1e9:.2f} GB"),
        ("torch, triton and NVIDIA's libraries", f"{result['torch_bytes'] / 1e9:.2f} GB"),
        ("other locked distributions", f"{result['other_distributions_bytes'] / 1e9:.2f} GB"),
        ("base image and bytecode", f"{base / 1e9:.2f} GB"),
        ("layer of the package", f"{result['package_bytes'] / 1e6:.2f} MB"),
        (
            "rebuild after a code change",
            f"{rebuild['mean']:.1f} s ({rebuild['least']:.1f} to {rebuild['most']:.1f})",
        ),
        ("start of `image_classifier --version`", f"{start['mean']:.1f} s"),
    ]
    lines = ["| size or time | measured |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    origin = f"{result['processor']}, {result['cores']} cores; {rebuild['runs']} builds, commit {result['commit'][:12]}"
    return "\n".join([*lines, "", f"Measured by `python -m benchmarks.container` on {origin}.", ""])


def main() -> None:
    """Measure, save, and write the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    save_result("container", measure())
    result = json.loads((PROJECT / "benchmarks" / "results" / "container.json").read_text())
    write_table(DOCUMENT, "container", build_table(result))


if __name__ == "__main__":
    main()
