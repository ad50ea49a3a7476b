"""Networks, optimizers and data sources of other packages: through a whole life, and what is refused of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from image_classifier.cli.predict import main as predict_here
from image_classifier.cli.publish import main as publish_here
from image_classifier.cli.train import main as train_here
from image_classifier.cli.verify import main as verify_here
from image_classifier.tracking.reading import read_manifest, read_record
from tests import forked
from tests.conftest import PROJECT, leave_out_coverage, make_once, run_program, wait_until
from tests.serving import PIXELS, serving
from tests.tiny import write_tiny_dataset

NETWORKS = '''
"""Small networks of torchvision's families."""

from torchvision.models import ConvNeXt, VisionTransformer
from torchvision.models.convnext import CNBlockConfig


def build_convnext(num_classes):
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.2, num_classes=num_classes)


def build_vit(num_classes, image_size):
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return VisionTransformer(image_size, 8, **sizes, dropout=0.1, num_classes=num_classes)
'''
TINY = "--recipe notebook --batch_size 20 --learning_rate 0.01 --device cpu --digest_every 10 --num_workers 0".split()


@pytest.fixture(scope="module")
def plugins(shared_folder: Path) -> Path:
    """A folder to import from, into which the examples were installed."""

    def make(folder: Path) -> None:
        shutil.copytree(PROJECT / "examples", folder / "examples")
        words = "-m pip install --quiet --no-deps --no-index --no-build-isolation --target".split()
        examples = sorted((folder / "examples").iterdir())
        run_program(sys.executable, *words, folder / "installed", *examples, cwd=folder)
        (folder / "installed" / "small_networks.py").write_text(NETWORKS)

    return make_once(shared_folder / "plugins", make) / "installed"


@pytest.fixture(scope="module")
def csv_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that the example's source reads: 60 images to train and 20 to test with, of 10 classes."""
    folder = tmp_path_factory.mktemp("data") / "listed"
    folder.mkdir()
    lines = ["file,class,part"]
    images = np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3), dtype=np.uint8)
    for number, pixels in enumerate(images):
        pixels[:, :, number % 3] //= 1 + number % 10
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,class{number % 10},{'train' if number < 60 else 'test'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny", num_train=60, num_test=20)


def call(plugins: Path, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Call a command where the plug-ins can be imported."""
    variables = {"PYTHONPATH": os.pathsep.join([str(plugins), str(PROJECT)]), **variables}
    return forked.run("image_classifier", *words, cwd=plugins, variables=variables)


def train(plugins: Path, experiments: Path, name: str, *options: object, **variables: str) -> Path:
    """Train to the end and return the run's folder."""
    words = ["--experiments_folder", str(experiments), "--experiment_name", "e", "--run_name", name]
    result = call(plugins, "train", *words, *options, **variables)
    assert result.returncode == 0, result.stderr
    return experiments / "e" / name


def train_killed(plugins: Path, experiments: Path, name: str, *options: object) -> Path:
    """Train up to the first checkpoints, and be killed."""
    words = ["--experiments_folder", experiments, "--experiment_name", "e", "--run_name", name, *options]
    line = [sys.executable, "-m", "image_classifier.main", *map(str, words)]
    environment = {**leave_out_coverage(), "PYTHONPATH": os.pathsep.join([str(plugins), str(PROJECT)])}
    folder = experiments / "e" / name
    pipe = subprocess.PIPE
    with subprocess.Popen(line, cwd=plugins, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        wait_until(lambda: len(list(folder.glob("checkpoints/step-*/manifest.json"))) > 1, process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (folder / "manifest.json").exists()
    return folder


LIVES = {
    "own": ("own_network", ["--optimizer", "own_adamw", "--num_epochs", "20", "--shards", "2"]),
    "convnext": ("small_networks:build_convnext", ["--num_epochs", "10", "--shards", "2", "--engine", "eager"]),
    "vit": ("small_networks:build_vit", ["--num_epochs", "10", "--shards", "2"]),
    "mobilenet": ("torchvision.models:mobilenet_v3_small", ["--num_epochs", "6", "--learning_rate", "0.05"]),
}


@pytest.mark.parametrize("name", LIVES)
def test_a_network_is_trained_killed_resumed_verified_published_and_served(
    name: str,
    plugins: Path,
    csv_dataset: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, options = LIVES[name]
    dataset = csv_dataset if name == "own" else tiny_dataset
    words = [*TINY, "--dataset_folder", str(dataset), "--model", model, *options]
    monkeypatch.syspath_prepend(plugins)
    if name != "own":
        monkeypatch.setenv("IMAGE_CLASSIFIER_PLUGINS", model)
    experiment = ["--experiments_folder", str(tmp_path), "--experiment_name", "e", "--run_name"]
    assert train_here([*experiment, "whole", *words, "--num_threads", "2"]) == 0
    whole = tmp_path / "e" / "whole"

    killed = train_killed(plugins, tmp_path, "killed", *words, "--num_threads", "1")
    assert train_here([*experiment, "killed", "--resume"]) == 0
    for key in ("weights_digest", "chain_head"):
        assert read_manifest(killed)[key] == read_manifest(whole)[key]
    plugin = read_record(whole)["plugins"]["model"]
    assert plugin["name"] == model and len(plugin["digest"]) == 64
    assert plugin["distribution"] == {"own": "own-network", "mobilenet": "torchvision"}.get(name)

    capsys.readouterr()
    assert verify_here([str(whole), "--num_threads", "1"]) == 0
    assert capsys.readouterr().out.startswith("IDENTICAL")
    assert publish_here([str(whole)]) == 0
    assert plugin["digest"] in (whole / "published" / "MODEL_CARD.md").read_text()
    capsys.readouterr()
    assert predict_here([str(whole), str(csv_dataset / "0.png")]) == 0
    header, row = (line.split(",")[3:] for line in capsys.readouterr().out.splitlines())
    image = np.asarray(Image.open(csv_dataset / "0.png"))
    with serving(whole / "published", tmp_path / "log") as server:  # which needs none of the code
        answer = httpx.post(f"{server.url}/predict?top_k=10", content=image.tobytes(), headers=PIXELS).json()
    shares = {score["class"]: score["probability"] for score in answer["predictions"][0]["top_k"]}
    assert [shares[label] for label in header] == pytest.approx([float(cell) for cell in row], abs=1e-4)


BAD_NETWORKS = """
import random, torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear = nn.Linear(3, num_classes)

    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)))


class OtherShape(Net):
    def forward(self, images):
        return super().forward(images)[:, :-1]


class Random(Net):
    def forward(self, images):
        return super().forward(images) * random.random()


def build_lazily(num_classes):
    raise RuntimeError("there is no such network today")


def build_for_32(num_classes, image_size):
    if image_size != 32:
        raise ValueError(f"takes 32 pixels, not {image_size}")
    return Net(num_classes)


class Arranged(Net):
    def arrange_weights(self):
        self.linear.bias.data.zero_()


number = 7


def build_slowly(parameters, settings):
    return torch.optim.SGD(parameters[:1], lr=0.1)
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model bad_nets:OtherShape", "gives float32 [4, 9] for images of 32 pixels instead of logits [4, 10]"),
        ("--model bad_nets:Random", "gives other answers to the same images"),
        ("--model bad_nets:build_lazily", "cannot be built for 10 classes and images of 32 pixels: RuntimeError"),
        ("--model bad_nets:build_for_32 --image_sizes 24", "ValueError: takes 32 pixels, not 24"),
        ("--model bad_nets:number", "is int, not a callable"),
        ("--model bad_nets:absent", "error: model bad_nets:absent cannot be imported: AttributeError"),
        ("--model no_such_package:build", "No module named 'no_such_package'; install its package, or name the folder"),
        ("--model broken_net:build", "cannot be imported: SyntaxError"),
        ("--model leaving_net:build", "cannot be imported: SystemExit: 3"),
        ("--model own_netwok", "got: own_netwok (did you mean own_network?)"),
        ("--model own_network:", "got: own_network:"),
        (
            "--model bad_nets:Net --optimizer muon --nesterov true",
            "--optimizer muon has rates for the airbench networks",
        ),
        (
            "--model resnet --optimizer bad_nets:build_slowly",
            "must optimize exactly the 4 parameters that it was given",
        ),
        ("--model resnet --optimizer own_adamw --instruction_set portable", "portable has kernels for the package's"),
        ("--model bad_nets:Net --instruction_set portable", "torch draws the weights of"),
    ],
)
def test_what_a_plugin_lacks_is_said_in_one_line_and_nothing_is_written(
    options: str,
    message: str,
    plugins: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad_nets.py").write_text(BAD_NETWORKS)
    (tmp_path / "broken_net.py").write_text("def build(:\n")
    (tmp_path / "leaving_net.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(plugins)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--experiments_folder", str(tmp_path / "experiments"), "--experiment_name", "e", "--run_name", "r"]
    assert train_here([*words, *TINY, "--dataset_folder", str(tiny_dataset), *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "experiments").exists()


def test_a_portable_run_of_a_network_whose_weights_are_arranged_is_verified(
    plugins: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad_nets.py").write_text(BAD_NETWORKS.replace("images.mean(dim=(2, 3))", "images.amax(dim=(2, 3))"))
    name = "bad_nets:Arranged"
    variables = {"PYTHONPATH": os.pathsep.join(map(str, [tmp_path, PROJECT])), "IMAGE_CLASSIFIER_PLUGINS": name}
    words = [*TINY, "--dataset_folder", tiny_dataset, "--model", name, "--instruction_set", "portable"]
    run = train(plugins, tmp_path, "r", *words, **variables)
    verified = call(plugins, "verify", run, **variables)
    assert verified.returncode == 0 and verified.stdout.startswith("IDENTICAL"), verified.stdout + verified.stderr


def test_code_is_imported_only_where_the_user_or_an_installed_package_names_it(
    plugins: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """A run of a stranger names a module that leaves a mark when it is imported."""
    mark = tmp_path / "mark"
    network = NETWORKS + f"\nopen({str(mark)!r}, 'a').close()\n"
    (tmp_path / "marking.py").write_text(network)
    name = "marking:build_vit"
    here = {"PYTHONPATH": os.pathsep.join(map(str, [tmp_path, PROJECT]))}
    words = [*TINY, "--dataset_folder", tiny_dataset, "--model", name]
    run = train(plugins, tmp_path, "r", *words, **here)
    mark.unlink()

    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    experiment = ["--experiments_folder", tmp_path, "--experiment_name", "e"]
    commands: list[list[object]] = [
        ["predict", run, image],
        ["evaluate", run],
        ["publish", run],
        ["verify", run],
        ["train", *experiment, "--run_name", "r", "--resume"],
        ["train", *experiment, "--run_name", "other", *words[:-1], "resnet18", "--pretrained_model", "e/r/model.pth"],
    ]
    for command in commands:
        result = call(plugins, *command, **here)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, (command, result.stderr)
        assert f"names {name}, code that would be imported" in result.stderr and not mark.exists(), command
    assert not (tmp_path / "e" / "other").exists()
    others = call(plugins, "predict", run, image, IMAGE_CLASSIFIER_PLUGINS="marking:build_convnext", **here)
    assert others.returncode == 2 and not mark.exists()

    allowed = call(plugins, "predict", run, image, IMAGE_CLASSIFIER_PLUGINS=f"a:b {name}", **here)
    assert allowed.returncode == 0 and mark.exists(), allowed.stderr
    words += ["--pretrained_model", "e/r/model.pth", "--num_epochs", "0"]
    assert train(plugins, tmp_path, "named", *words, **here)  # the command names it


def test_other_code_than_was_trained_is_refused_or_said(plugins: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    code = tmp_path / "changing.py"
    code.write_text(NETWORKS)
    name = "changing:build_vit"
    here = {"PYTHONPATH": os.pathsep.join(map(str, [tmp_path, PROJECT])), "IMAGE_CLASSIFIER_PLUGINS": name}
    run = train(plugins, tmp_path, "r", *TINY, "--dataset_folder", tiny_dataset, "--model", name, **here)
    code.write_text(NETWORKS + "\n")

    verified = call(plugins, "verify", run, **here)
    assert verified.returncode == 2 and "different plugins: model was changing:build_vit " in verified.stderr
    assert "--allow_code_change trains it nevertheless" in verified.stderr
    verified = call(plugins, "verify", run, "--allow_code_change", **here)
    assert verified.returncode == 0 and verified.stdout.startswith("IDENTICAL")
    evaluated = call(plugins, "evaluate", run, **here)
    assert evaluated.returncode == 0 and "its predictions may differ" in evaluated.stderr
    published = call(plugins, "publish", run, **here)
    assert published.returncode == 2 and "install the other, or train again" in published.stderr
    assert not (run / "published").exists()
    (run / "manifest.json").unlink()
    words = ["--experiments_folder", tmp_path, "--experiment_name", "e", "--run_name", "r", "--resume"]
    resumed = call(plugins, "train", *words, **here)
    assert resumed.returncode == 2 and "its plugins changed: model was changing:build_vit" in resumed.stderr
    assert call(plugins, "train", *words, "--allow_code_change", **here).returncode == 0
    assert read_record(run)["changes"][0]["plugins"]

    code.unlink()
    missing = call(plugins, "predict", run, PROJECT / "docs" / "example.png", **here)
    assert missing.returncode == 2 and "No module named 'changing'" in missing.stderr


def test_a_source_is_asked_first_and_read_again_when_its_code_changes(
    plugins: Path, csv_dataset: Path, tmp_path: Path
) -> None:
    dataset, installed = tmp_path / "listed", tmp_path / "installed"
    shutil.copytree(csv_dataset, dataset, ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(plugins, installed)
    here = {"PYTHONPATH": os.pathsep.join(map(str, [installed, PROJECT]))}
    first = call(installed, "data", "info", "--dataset_folder", dataset, **here)
    assert first.returncode == 0 and "read by own_source:CsvSource (own-source 0.1.0)" in first.stdout + first.stderr
    assert len(list((dataset / ".snapshots" / "index").iterdir())) == 1
    module = installed / "own_source.py"
    module.write_text(module.read_text().replace("sorted({", "sorted({'other', *{").replace("(path)})", "(path)}})"))
    again = call(installed, "data", "info", "--dataset_folder", dataset, **here)
    assert again.returncode == 0 and "other" in again.stdout, again.stderr
    without = call(tmp_path, "data", "info", "--dataset_folder", dataset, PYTHONPATH=str(PROJECT))
    assert without.returncode == 2 and "no data set in" in without.stderr


def test_the_examples_pass_their_own_tests_and_are_short(plugins: Path) -> None:
    examples = plugins.parent / "examples"
    for folder in (PROJECT / "examples").iterdir():
        assert sum(len(path.read_text().splitlines()) for path in folder.glob("*.py")) < 60
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(plugins), str(PROJECT)])}
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(examples), str(examples)]
    result = subprocess.run(line, cwd=examples, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "4 passed" in result.stdout, result.stdout + result.stderr


def test_several_processes_draw_what_one_does(plugins: Path, csv_dataset: Path, tmp_path: Path) -> None:
    words = [*TINY, "--dataset_folder", csv_dataset, "--model", "own_network", "--optimizer", "own_adamw"]
    words += ["--num_epochs", "2", "--shards", "5", "--num_threads", "1"]
    one = train(plugins, tmp_path, "one", *words)
    line = [sys.executable, *"-m torch.distributed.run --nproc_per_node 2 --max_restarts 0 -m".split()]
    line += ["image_classifier.main", *map(str, words), "--experiments_folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(plugins), str(PROJECT)])}
    result = subprocess.run(
        [*line, "--experiment_name", "e", "--run_name", "two"], cwd=plugins, env=environment, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    assert read_manifest(tmp_path / "e" / "two")["chain_head"] == read_manifest(one)["chain_head"]
