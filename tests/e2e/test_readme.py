"""The commands of the README, the tutorial and the guide to own images, in their order, in a copy just set up.

Blocks marked bash and python are executed, unless a comment before says why not; what is slow on purpose (all tests) is
asked for and not carried out. The data is the sample set: the address of CIFAR-10 cannot be reached.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from image_classifier.data.dataset import load_snapshot
from tests.conftest import require_program, run_program
from tests.documents import DATA, EXECUTED, Block, iterate_blocks, list_run_files
from tests.tiny import write_tiny_dataset

BLOCKS = [block for document in EXECUTED for block in iterate_blocks(document) if block.language not in DATA]


@pytest.fixture(scope="module")
def checkout(developed_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has after `git clone`, in which `.venv` is there already, and images by class."""
    snapshot = load_snapshot(write_tiny_dataset(tmp_path_factory.mktemp("sample") / "set", num_train=600, num_test=10))
    for number, (image, label) in enumerate(zip(*snapshot.train, strict=True)):
        if (name := snapshot.classes[label]) in ("circle", "ring", "star"):
            (developed_copy / "my_images" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(developed_copy / "my_images" / name / f"{number:04}.png")
    return developed_copy


@pytest.fixture(autouse=True)
def short_and_offline(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten every training through the environment, and let every address be out of reach."""
    monkeypatch.setenv("PATH", str(checkout / ".venv" / "bin"), prepend=":")
    for setting, value in {
        "MODEL": "airbench_small",
        "NUM_EPOCHS": "10",
        "BATCH_SIZE": "100",
        "NUM_THREADS": "1",
        "NUM_TRAIN": "1000",
        "NUM_TEST": "200",
    }.items():
        monkeypatch.setenv(f"IMAGE_CLASSIFIER_{setting}", value)
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_make_train_goes_from_a_clone_to_a_trained_network(checkout: Path) -> None:
    output = run_program(require_program("make"), "train", cwd=checkout)
    folder = checkout / "experiments" / "quickstart" / "run-1"
    record, evaluation = (json.loads((folder / name).read_text()) for name in ("run.json", "evaluation.json"))
    assert (folder / "manifest.json").is_file()
    assert record["data"]["name"] == "sample"  # and nobody takes it for CIFAR-10
    assert "experiments/quickstart/run-1" in output
    assert f"{evaluation['accuracy']:.2%}" in output
    assert not (checkout / "data" / "cifar_dataset").exists()

    run_program(require_program("make"), "train", "OPTIONS=--num_epochs 0", cwd=checkout)
    assert (checkout / "experiments" / "quickstart" / "run-2" / "manifest.json").is_file()


def test_the_readme_begins_with_both_commands() -> None:
    assert [block.code for block in BLOCKS[:2]] == ["make train\n", "make test\n"]


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.comment], ids=str)
def test_the_documents_do_what_they_say(checkout: Path, block: Block) -> None:
    dataset = checkout / "data" / "cifar_dataset"
    if not dataset.exists():
        words = ("data", "prepare", "--source", "sample", "--num_train", "1000", "--num_test", "200")
        run_program("image_classifier", *words, "--dataset_folder", dataset, cwd=checkout)
    if block.language == "python":
        run_program("python", "-W", "error", "-c", block.code, cwd=checkout)
    elif block.code == "make test\n":
        assert "python -m pytest --cov" in run_program("make", "--dry-run", "test", cwd=checkout)
    elif block.code != "make train\n":  # which has a test of its own
        # What a block that fails has started in the background would keep its output open, and hide the reason.
        ending = "trap 'jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true' EXIT\n"
        run_program("bash", "-euo", "pipefail", "-c", ending + block.code, cwd=checkout)


def test_what_the_documents_promise_is_there(checkout: Path) -> None:
    """After their commands: every file that the table names, a prediction of the picture, equal weights."""
    folder = checkout / "experiments" / "tutorial" / "first"
    names = list_run_files()
    assert "manifest.json" in names
    for name in names:
        assert (folder / name).exists(), name
    rows = [(checkout / f"{name}.csv").read_text().splitlines() for name in ("predictions", "published")]
    assert [len(lines) for lines in rows] == [1 + 1, 1 + 1]
    manifests = [checkout / "experiments" / "proof" / run / "manifest.json" for run in ("whole", "killed")]
    whole, killed = (json.loads(manifest.read_text())["weights_digest"] for manifest in manifests)
    assert whole == killed
