"""Each part that CONTRIBUTING.md tells how to add, added to a copy of the package in the files that it names."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT, run_program
from tests.documents import get_section

NEW_FILES = {
    "image_classifier/model/NAME.py": """
from torch import Tensor, nn


class Linear(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.abs().flatten(1))
        return logits
""",
    "image_classifier/data/NAME.py": """
import numpy as np

from image_classifier.data.content import Content


def read(path, metadata, reading):
    with np.load(path) as arrays:
        train, test = ([(arrays[f"{part}_images"], arrays[f"{part}_labels"])] for part in ("train", "test"))
        return Content("toy", ("dark", "light"), {"train": train, "validation": [], "test": test})
""",
    "image_classifier/cli/NAME.py": """
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import build_parser, execute


def main(argv=None):
    return execute(greet, argv)


def build_toy_parser():
    parser = build_parser("toy", "Greet somebody.")
    parser.add_argument("name", type=str, help="who is greeted")
    return parser


def greet(argv):
    print(f"hello {parse_arguments(build_toy_parser(), argv).name}")
    return 0


PARSERS = (build_toy_parser,)
""",
}
CHANGES = {
    "image_classifier/plugins.py": (
        "NETWORKS = {\n",
        'NETWORKS = {\n    "toy": Network("image_classifier.model.toy:Linear", image_sizes=range(32, 33)),\n',
    ),
    "image_classifier/data/source.py": (
        "        if path.is_dir():\n            parquet_folders",
        """        if path.suffix == ".npz":
            from image_classifier.data import toy

            return [Source("arrays", path.parent, (path.name,), partial(toy.read, path))]
        if path.is_dir():
            parquet_folders""",
    ),
    "image_classifier/cli/commands.py": ("COMMANDS = {\n", 'COMMANDS = {\n    "toy": "greet somebody",\n'),
    "image_classifier/metrics.py": (
        '        "accuracy": to_float(accuracy),\n',
        '        "accuracy": to_float(accuracy),\n        "num_wrong": int(num_images - right.sum()),\n',
    ),
    "image_classifier/kernels/kernels.h": (
        "struct relu {",
        "struct absolute {\n    float *out;\n    const float *values;\n    int64_t count;\n};\n\nstruct relu {",
    ),
    "image_classifier/kernels/small.c": (
        "void relu(const struct relu *a) {",
        """void absolute(const struct absolute *a) {
    for (int64_t i = 0; i < a->count; i++)
        a->out[i] = a->values[i] < 0 ? -a->values[i] : a->values[i];
}

void relu(const struct relu *a) {""",
    ),
    "image_classifier/training/small_steps.py": (
        "COMPUTE: dict[",
        """def _compute_abs(steps: Steps, values: Tensor) -> Any:
    out = steps.make(torch.empty_like, values)
    steps.call("absolute", {"out": out}, values=values, count=values.numel())
    return out


COMPUTE: dict[""",
    ),
}
ENTRY = "    _aten.relu.default: (_compute_relu, _FLOATS),\n"

CHECK = """
import contextlib, io, json, sys
from pathlib import Path

import numpy as np

from image_classifier import __main__, main
from image_classifier.kernels import builder, library

level = sys.argv[1]
architecture = builder.TARGETS[builder.get_target()][1]
builder.LEVELS[architecture] = {level: builder.LEVELS[architecture][level]}
builder.build_libraries(builder.FOLDER, builder.get_target())
called = []
prepare = library.Kernels.prepare
library.Kernels.prepare = lambda kernels, name, **values: called.append(name) or prepare(kernels, name, **values)

labels = np.arange(60) % 2
images = np.repeat(labels * 200, 3 * 32 * 32).reshape(60, 3, 32, 32).astype(np.uint8)
parts = {"train_images": images, "train_labels": labels, "test_images": images[:10], "test_labels": labels[:10]}
np.savez("toy.npz", **parts)
words = "--recipe notebook --model toy --dataset_folder toy.npz --experiment_name e --run_name r --num_epochs 1"
words += f" --batch_size 20 --num_threads 1 --instruction_set {level}"
assert main.main(words.split()) == 0
evaluation = json.loads(Path("experiments/e/r/evaluation.json").read_text())
with contextlib.redirect_stdout(io.StringIO()) as said:
    assert __main__.main(["toy", "world"]) == 0
record = json.loads(Path("experiments/e/r/run.json").read_text())
print(json.dumps({
    "network": record["settings"]["model"], "data": record["data"]["name"], "command": said.getvalue(),
    "metric": evaluation["num_wrong"] == round(10 * (1 - evaluation["accuracy"])), "kernel": "absolute" in called,
}))
"""


def list_files() -> list[str]:
    """List the files that CONTRIBUTING.md names for all parts."""
    return re.findall(r"\| `(image_classifier/\S+)` \|", get_section("CONTRIBUTING.md", "Add a part"))


def test_a_toy_of_each_part_is_added_in_the_files_that_the_list_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(list_files()) == sorted([*NEW_FILES, *CHANGES])
    shutil.copytree(
        PROJECT / "image_classifier",
        tmp_path / "image_classifier",
        ignore=shutil.ignore_patterns("__pycache__", "*.so"),
    )
    for name, content in NEW_FILES.items():
        (tmp_path / name.replace("NAME", "toy")).write_text(content)
    for name, (old, new) in CHANGES.items():
        text = (tmp_path / name).read_text()
        assert text.count(old) == 1, f"{name} has another form than this test knows"
        (tmp_path / name).write_text(text.replace(old, new))
    steps = tmp_path / "image_classifier" / "training" / "small_steps.py"
    steps.write_text(steps.read_text().replace(ENTRY, f"    _aten.abs.default: (_compute_abs, _FLOATS),\n{ENTRY}"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = run_program(sys.executable, "-c", CHECK, "avx2", cwd=tmp_path)
    assert json.loads(said.splitlines()[-1]) == {
        "network": "toy",
        "data": "toy",
        "command": "hello world\n",
        "metric": True,
        "kernel": True,
    }
