"""A system that is read-only, temporary folders included: each command works there, or says what it needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from image_classifier.tracking.checking import check_finished
from tests.conftest import PROJECT, leave_out_coverage, report_lack

ENTER = """
import ctypes, json, os, sys

def check(status):
    if status != 0:
        print(os.strerror(ctypes.get_errno()), file=sys.stderr)
        sys.exit(99)

libc = ctypes.CDLL(None, use_errno=True)
written, words = json.loads(sys.argv[1])
user, group = os.geteuid(), os.getegid()
check(libc.unshare(0x20000 | (0 if user == 0 else 0x10000000)))  # of mounts, and of users for who is not root
if user != 0:
    for name, content in {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
check(libc.mount(b"none", b"/", None, ctypes.c_ulong(1 << 14 | 1 << 18), None))  # what is mounted here stays here
for folder in written:
    check(libc.mount(folder.encode(), folder.encode(), None, ctypes.c_ulong(1 << 12), None))
for folder, recursive, attributes in [("/", 0x8000, (1, 0)), *((folder, 0, (0, 1)) for folder in written)]:
    structure = (ctypes.c_uint64 * 4)(*attributes)  # set, or clear, MOUNT_ATTR_RDONLY
    check(libc.syscall(442, -100, folder.encode(), recursive, structure, ctypes.sizeof(structure)))  # mount_setattr
os.execv(words[0], words)
"""
"""Runs a command in a mount namespace in which everything is read-only but some folders."""

VARIABLES = (
    "HOME",
    "TMPDIR",
    "TEMP",
    "TMP",
    "MPLCONFIGDIR",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "IMAGE_CLASSIFIER_CACHE",
)


class System:
    """What is prepared on it before it becomes read-only.

    Attributes:
        experiments: holds the finished and published run experiment/run, and a copy of it, experiment/other.
        dataset: the run's data set, with its snapshot.
    """

    def __init__(self, folder: Path, experiments: Path, dataset: Path) -> None:
        self.folder = folder
        self.experiments = Path(shutil.copytree(experiments, folder / "experiments"))
        self.dataset = dataset
        self.run = self.experiments / "experiment" / "run"
        self.other = Path(shutil.copytree(self.run, self.run.with_name("other")))
        self.image = folder / "image.png"
        Image.new("RGB", (32, 32), (200, 0, 0)).save(self.image)

    def call(self, *words: str | Path, written: tuple[Path, ...] = (), **variables: str) -> tuple[int, str, str]:
        """Run a command; return its exit status and what it said. It must not end in a trace."""
        environment = {name: value for name, value in leave_out_coverage().items() if name not in VARIABLES}
        command = [sys.executable, "-m", "image_classifier", *map(str, words)]
        arguments = json.dumps([[*map(str, written)], command])
        result = subprocess.run(
            [sys.executable, "-c", ENTER, arguments],
            cwd="/",
            env={**environment, "HOME": "/nonexistent", "PYTHONPATH": str(PROJECT), **variables},
            capture_output=True,
            text=True,
            timeout=250,
        )
        if result.returncode == 99:
            report_lack(f"this process may not make its system read-only: {result.stderr.strip()}")
        assert "Traceback" not in result.stderr, (words, result.stderr)
        return result.returncode, result.stdout, result.stderr

    def train(self, name: str, *words: str | Path) -> list[str | Path]:
        """Build the command that trains a tiny run."""
        training = f"--experiment_name experiment --run_name {name} --recipe notebook --num_epochs 1 --batch_size 50"
        folders: list[str | Path] = ["--experiments_folder", self.experiments, "--dataset_folder", self.dataset]
        return ["train", *training.split(), "--num_threads", "1", *folders, *words]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, published_run: Path, sample_dataset: Path) -> System:
    return System(tmp_path_factory.mktemp("system"), published_run.parents[2], sample_dataset)


def test_what_only_reads_works_without_a_word_about_folders(system: System) -> None:
    published = system.run / "published"
    commands: list[list[str | Path]] = [
        ["evaluate", system.run, "--dataset_folder", system.dataset],
        ["evaluate", published, "--dataset_folder", system.dataset],
        ["predict", system.run, system.image],
        ["predict", published, system.image],
        ["compare", system.run, system.other],
        ["data", "info", "--dataset_folder", system.dataset],
        ["registry", "check", system.run],
        ["verify", system.run, "--files_only"],
    ]
    for words in commands:
        status, output, errors = system.call(*words)
        assert (status, errors) == (0, ""), (words, errors)
        assert output


def test_what_writes_is_refused_in_one_line_with_the_remedy(system: System) -> None:
    other = Path(shutil.copytree(system.dataset, system.folder / "other", ignore=shutil.ignore_patterns(".snapshots")))
    new = system.folder / "new"
    written, temporary, cache = (
        "choose a writable folder",
        "set TMPDIR to a writable folder",
        "set IMAGE_CLASSIFIER_CACHE to a writable folder",
    )
    refusals: list[tuple[list[str | Path], str]] = [
        (system.train("new"), written),
        (["verify", system.run, "--anyway", "--dataset_folder", system.dataset], temporary),
        (["evaluate", system.run, "--dataset_folder", other], cache),
        (["predict", system.run, system.image, "--output", new], written),
        (["compare", system.run, system.other, "--output", new], written),
        (["report", system.run], written),
        (["publish", system.run, "--overwrite"], written),
        (["data", "info", "--dataset_folder", other], cache),
        (["data", "info", "--dataset_folder", system.dataset, "--output", new], written),
        (["data", "prepare", "--source", "sample", "--dataset_folder", new], written),
        (["data", "prepare", "--dataset_folder", other], cache),
        (["data", "prune", "--dataset_folder", system.dataset], written),
        (["data", "export", system.dataset, "--output", new], written),
        (["data", "ingest", other, "--dataset", "d", "--dataset_folder", new], "choose another folder"),
        (["registry", "list", "--experiments_folder", system.experiments], written),
        (["registry", "add", system.run, "--name", "m", "--experiments_folder", system.experiments], temporary),
    ]
    for words, remedy in refusals:
        status, _, errors = system.call(*words)
        assert status == 2, (words, errors)
        assert errors.splitlines()[-1].startswith("error: ") and remedy in errors.splitlines()[-1], (words, errors)
        assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1
    assert sorted(path.name for path in system.folder.iterdir()) == ["experiments", "image.png", "other"]


def test_a_run_needs_its_experiments_folder_alone(system: System) -> None:
    written = (system.experiments,)
    commands: list[list[str | Path]] = [
        system.train("here", "--profile"),
        ["verify", system.run, "--dataset_folder", system.dataset],
        ["compare", system.run, system.other, "--output", system.experiments / "c.png"],
        ["report", system.run],
        ["publish", system.experiments / "experiment" / "here"],
    ]
    for words in commands:
        variables = {"TMPDIR": str(system.experiments)} if words[0] == "verify" else {}
        status, _, errors = system.call(*words, written=written, **variables)
        assert status == 0, (words, errors)
    check_finished(system.experiments / "experiment" / "here")
    assert not [*system.experiments.rglob(".tmp-*"), *system.experiments.glob("image-classifier-*")]
    assert sorted(os.listdir(system.experiments)) == ["c.png", "experiment"]
