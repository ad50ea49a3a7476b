"""Weights by torchvision's registry, from a server that has a real file of its resnet18; and state_dicts as files."""

from __future__ import annotations

import functools
import hashlib
import http.server
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import Weights, WeightsEnum, get_model_weights, resnet18
from torchvision.models._api import BUILTIN_MODELS, register_model
from torchvision.transforms._presets import ImageClassification

from image_classifier.cli.train import main
from image_classifier.data.download import UnreachableError
from image_classifier.errors import DownloadError, ModelError, StorageError
from image_classifier.model.catalog import build_classifier
from image_classifier.model.classifier import Classifier
from image_classifier.tracking.pretrained import Pretrained, check_pretrained, load_pretrained, start_from
from image_classifier.tracking.torchvision_weights import NETWORKS, fetch_weights, find_weights
from tests.tiny import make_training, write_tiny_dataset

CLASSES = ("tench", "cat", "crane", "crane", "dog")
"""Two of one name, as ImageNet has them."""

REFERENCE = Path("torchvision:small_resnet18@V1")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    def log_message(self, format: str, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of a resnet18 of five classes, registered with torchvision, and served at the address that it has there.

    Its tensors are parameters, as in torchvision's oldest files, and its batch norms count no batches.
    """
    folder = tmp_path_factory.mktemp("server")
    torch.manual_seed(3)
    state = resnet18(num_classes=len(CLASSES)).state_dict(keep_vars=True)
    torch.save({name: each for name, each in state.items() if "num_batches" not in name}, folder / "weights")
    digest = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()
    file = (folder / "weights").rename(folder / f"small_resnet18-{digest[:8]}.pth")
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        register(f"http://127.0.0.1:{server.server_address[1]}/{file.name}")
        yield file
        del BUILTIN_MODELS["small_resnet18"]
        server.shutdown()
        thread.join()


def register(url: str) -> None:
    """Register a network and its weights with torchvision, as its own are."""

    class SmallResNet18Weights(WeightsEnum):  # type: ignore[misc]  # torchvision has no types
        V1 = Weights(url, functools.partial(ImageClassification, crop_size=24), {"categories": list(CLASSES)})

    def small_resnet18(*, weights: SmallResNet18Weights | None = None, **options: Any) -> torch.nn.Module:
        network: torch.nn.Module = resnet18(**options)
        return network

    small_resnet18.__annotations__["weights"] = SmallResNet18Weights | None
    register_model()(small_resnet18)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGE_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(num_classes: int) -> Classifier:
    """Build a classifier whose network has torchvision's names."""
    network = resnet18(num_classes=num_classes)
    return Classifier(network, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 24, num_classes)


def test_the_registry_says_address_classes_scaling_and_size() -> None:
    weights = find_weights("resnet18", "IMAGENET1K_V1")
    entry = get_model_weights("resnet18").IMAGENET1K_V1
    assert weights.url == entry.url and weights.network == NETWORKS["resnet18"] == "resnet18_imagenet"
    assert len(weights.classes) == 1000 and weights.classes[0] == "tench" and weights.image_size == 224
    assert (weights.input_mean, weights.input_std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_published_weights_are_downloaded_once_and_taken_over_by_name(published: Path, cache: Path) -> None:
    pretrained = load_pretrained(REFERENCE)
    kept = cache / "weights" / published.name
    assert kept.read_bytes() == published.read_bytes()
    assert pretrained.digest == hashlib.sha256(published.read_bytes()).hexdigest()
    assert (pretrained.path, pretrained.model, pretrained.classes) == (REFERENCE, None, CLASSES)
    assert (pretrained.image_size, pretrained.scaled_to, pretrained.input_mean) == (None, 24, (0.485, 0.456, 0.406))

    classifier = build(3)
    drawn = classifier.network.state_dict()["fc.weight"].clone()
    start_from(classifier, pretrained, ("crane", "dog", "cat"))
    state, theirs = classifier.network.state_dict(), torch.load(published, weights_only=True)
    assert torch.equal(state["fc.weight"], torch.stack([drawn[0], theirs["fc.weight"][4], theirs["fc.weight"][1]]))
    assert torch.equal(state["fc.bias"][1:], theirs["fc.bias"][[4, 1]])
    assert all(torch.equal(state[name], each) for name, each in theirs.items() if not name.startswith("fc."))
    assert pretrained.describe(("crane", "dog", "cat"), ())["kept_classes"] == ["dog", "cat"]

    published.rename(published.with_suffix(".gone"))
    try:
        assert load_pretrained(REFERENCE).digest == pretrained.digest  # from the cache
        kept.write_bytes(b"damaged")
        with pytest.raises(DownloadError, match=f"HTTP status 404 .*; download it elsewhere and put it into {cache}"):
            load_pretrained(REFERENCE)
    finally:
        published.with_suffix(".gone").rename(published)
    assert load_pretrained(REFERENCE).digest == pretrained.digest and kept.read_bytes() == published.read_bytes()


def test_what_is_not_published_or_not_what_it_says_is_refused(
    published: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reference, reason in (
        ("torchvision:resnet19@V1", "torchvision knows no network 'resnet19'"),
        ("torchvision:small_resnet18@V2", "no weights 'V2' for small_resnet18; it has: V1"),
        ("torchvision:fasterrcnn_resnet50_fpn@COCO_V1", "are not those of an image classifier"),
    ):
        with pytest.raises(ModelError, match=reason):
            load_pretrained(Path(reference))
    weights = find_weights("small_resnet18", "V1")
    other = weights.url.replace(published.stem[-8:], "00000000")
    with pytest.raises(ModelError, match="its name has no digest"):
        fetch_weights(type(weights)(**{**vars(weights), "url": weights.url.replace("-", "_")}))
    published.with_name(other.rpartition("/")[2]).write_bytes(published.read_bytes())
    with pytest.raises(DownloadError, match="sent a file with the sha256 .* instead of 00000000: it was removed"):
        fetch_weights(type(weights)(**{**vars(weights), "url": other}))
    unreachable = type(weights)(**{**vars(weights), "url": f"http://127.0.0.1:1/{published.name}"})
    with pytest.raises(UnreachableError, match="cannot be reached .*check the network, or download it elsewhere"):
        fetch_weights(unreachable)
    assert not cache.exists()
    monkeypatch.setenv("IMAGE_CLASSIFIER_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody")
    with pytest.raises(StorageError, match="IMAGE_CLASSIFIER_CACHE"):
        fetch_weights(weights)


def write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors in single precision as the format has them."""
    parts, body = [], b""
    for name, tensor in state.items():
        content = tensor.detach().numpy().astype(np.float32).tobytes()
        offsets = f"[{len(body)},{len(body) + len(content)}]"
        parts.append(f'"{name}":{{"dtype":"F32","shape":{list(tensor.shape)},"data_offsets":{offsets}}}')
        body += content
    header = ("{" + ",".join(parts) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def write_states(folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """Write the state_dict of a residual network of five classes in both formats."""
    network = build_classifier("resnet", 5, input_mean=(0.5,) * 3, input_std=(0.5,) * 3, seed=7).network
    state = {name: each for name, each in network.state_dict().items() if each.is_floating_point()}
    write_safetensors(folder / "state.safetensors", state)
    torch.save({name: each.double() for name, each in state.items()}, folder / "state.pth")
    return state, [folder / "state.safetensors", folder / "state.pth"]


def test_a_state_dict_in_a_file_is_taken_over_and_its_head_is_new(tmp_path: Path) -> None:
    state, paths = write_states(tmp_path)
    for path in paths:
        pretrained = load_pretrained(path)
        assert (pretrained.model, pretrained.classes, pretrained.input_mean) == (None, (), None)
        classifier = build_classifier("resnet", 3, input_mean=(0.5,) * 3, input_std=(0.5,) * 3, seed=1)
        drawn = {name: each.clone() for name, each in classifier.network.state_dict().items()}
        start_from(classifier, pretrained, ("a", "b", "c"))
        for name, each in classifier.network.state_dict().items():
            expected = drawn[name] if name.startswith("head.") else state.get(name, drawn[name])
            assert torch.equal(each, expected)
        check_pretrained(pretrained, make_training(model="resnet", input_mean=(0.1, 0.2, 0.3)))


@pytest.mark.parametrize("number", [0, 1])
def test_the_network_of_a_state_dict_must_be_named_and_be_the_right_one(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, paths = write_states(tmp_path)
    dataset = write_tiny_dataset(tmp_path / "set", num_train=40, num_test=20)
    words = ["--experiments_folder", tmp_path / "e", "--experiment_name", "e", "--run_name", "r", "--num_epochs", 1]
    words += ["--dataset_folder", dataset, "--recipe", "notebook", "--pretrained_model", paths[number]]
    words += ["--batch_size", 10, "--num_threads", 1, "--device", "cpu"]
    for options, reason in (
        ([], "does not name its network: name it with --model"),
        (["--model", "lenet"], "belongs to another architecture: "),
    ):
        assert main([*map(str, words), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line and not (tmp_path / "e").exists()
    assert main([*map(str, words), "--model", "resnet"]) == 0
    assert "the head keeps no row; it is new for circle, ring" in capsys.readouterr().err


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    for name, content, reason in (
        ("a.safetensors", b"rubbish", "a.safetensors cannot be read: it has no header"),
        ("a.pth", b"rubbish", "is not a model file, or is damaged"),
        ("empty.pth", {}, "it has no format_version"),
        ("nested.pth", {"state_dict": {"a": torch.zeros(1)}}, "it has no format_version"),
    ):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ModelError, match=reason):
            load_pretrained(path)
    state = build(5).network.state_dict()
    for name, wrong in (
        ("fc.bias", torch.tensor(0.5)),
        ("fc.weight", torch.zeros(5, 3)),
        ("fc.bias", state["bn1.bias"]),
    ):
        other = Pretrained(Path("x.pth"), "", {**state, name: wrong.int() if wrong.ndim == 1 else wrong})
        with pytest.raises(ModelError, match=f"x.pth belongs to another architecture: {name} has the shape"):
            start_from(build(3), other, ("a", "b", "c"))
    fewer = Pretrained(Path("x.pth"), "", state, classes=("a", "b"))
    with pytest.raises(ModelError, match="x.pth has 5 rows of fc.weight for 2 classes"):
        start_from(build(3), fewer, ("a", "b", "c"))
