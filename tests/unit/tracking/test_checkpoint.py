"""Checkpoints are whole or not there, the last good one is never lost; model files are read without running them."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from image_classifier.errors import ImageClassifierError, ModelError, RunError, StorageError
from image_classifier.image_sizes import ImageSize
from image_classifier.model.catalog import build_classifier
from image_classifier.storage import FaultyDisk
from image_classifier.tracking.checkpoint import Checkpoints, Model, load_model, load_state, serialize_model
from image_classifier.tracking.run import RunFolder
from tests.crash import is_harmless

CLASSES = ("cat", "dog", "ship")


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def build_state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((100,), float(step)), "note": f"step {step}"}


def save(checkpoints: Checkpoints, *steps: int, keep: int = 3) -> None:
    for step in steps:
        checkpoints.save(step, build_state(step), keep)


def list_damages(content: bytes) -> list[bytes]:
    lengths = [len(content) * part // 16 for part in range(16)]
    flipped = [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in lengths]
    return [*(content[:length] for length in lengths), bytes(len(content)), *flipped, content + b"\0"]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def test_a_state_is_loaded_as_it_was_saved(checkpoints: Checkpoints) -> None:
    assert checkpoints.list_steps() == [] and checkpoints.load_newest() is None
    save(checkpoints, 7)
    state = checkpoints.load_newest()
    assert state is not None and state["step"] == 7 and state["note"] == "step 7"
    assert torch.equal(state["weights"], build_state(7)["weights"])


def test_the_newest_are_kept_and_the_newest_of_them_is_loaded(checkpoints: Checkpoints) -> None:
    save(checkpoints, 100, 20, 3_000_000_000, 4, keep=2)
    assert checkpoints.list_steps() == [100, 3_000_000_000]
    assert (checkpoints.load_newest() or {})["step"] == 3_000_000_000


def test_a_step_that_has_a_checkpoint_keeps_it(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5, keep=1)
    disk = FaultyDisk(refuse, 0)
    Checkpoints(checkpoints.folder, disk).save(5, build_state(6), keep=1)
    assert disk.calls == [] and checkpoints.load(5)["note"] == "step 5"


@pytest.mark.parametrize("name", ["state.pth", "manifest.json"])
def test_a_damaged_checkpoint_is_set_aside_with_a_warning_and_the_one_before_it_loaded(
    name: str, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    save(checkpoints, 1)
    for damaged in list_damages((checkpoints.get_path(1) / name).read_bytes()):
        save(checkpoints, 2)
        path = checkpoints.get_path(2) / name
        assert path.read_bytes() != damaged
        path.write_bytes(damaged)
        caplog.clear()
        assert (checkpoints.load_newest() or {})["step"] == 1
        assert checkpoints.list_steps() == [1] and (checkpoints.folder / "bad-step-00000002" / name).exists()
        (message,) = caplog.messages
        assert "step-00000002 is damaged" in message and "it was renamed to bad-step-00000002" in message


def build_frozen_state(step: int) -> dict[str, Any]:
    weights = {"body.weight": torch.arange(5000.0), "head.weight": torch.full((5,), float(step)), "body.bias": CONSTANT}
    return {"classifier": weights, "note": f"step {step}"}


CONSTANT = torch.ones(1000)
FROZEN = {"body.weight", "body.bias"}


def test_frozen_weights_are_written_once_and_loaded_with_each_checkpoint(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        checkpoints.save(step, build_frozen_state(step), 3, FROZEN)
    (shared,) = checkpoints.folder.glob("frozen-*.pth")
    assert shared.stat().st_size > 24_000 > 5 * (checkpoints.get_path(3) / "state.pth").stat().st_size
    checkpoints.copy(2, tmp_path / "copy")
    for place, step in ((checkpoints, 3), (Checkpoints(tmp_path / "copy"), 2)):
        state, expected = place.load(step), build_frozen_state(step)
        assert list(state["classifier"]) == list(expected["classifier"]) and state["format_version"] == 2
        assert all(torch.equal(state["classifier"][name], each) for name, each in expected["classifier"].items())
    save(checkpoints, 4)
    assert checkpoints.load(4)["format_version"] == 1, "earlier versions read what has no frozen weights"


def test_damaged_frozen_weights_are_written_anew_or_refused(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, build_frozen_state(1), 3, FROZEN)
    (shared,) = checkpoints.folder.glob("frozen-*.pth")
    content = shared.read_bytes()
    shared.write_bytes(content[:-1])
    with pytest.raises(ModelError, match=r"frozen-.*\.pth is damaged: its content is not what its name says"):
        checkpoints.load(1)
    checkpoints.save(2, build_frozen_state(2), 3, FROZEN)
    assert shared.read_bytes() == content and (checkpoints.load_newest() or {})["step"] == 2
    shared.unlink()
    assert checkpoints.load_newest() is None and checkpoints.list_steps() == [], "all need them"


@pytest.mark.parametrize("digest", ["../../etc/passwd", "0" * 63, 5, None])
def test_a_checkpoint_names_no_file_but_frozen_weights(digest: Any, checkpoints: Checkpoints) -> None:
    checkpoints.save(1, {**build_frozen_state(1), "frozen": digest}, 1)
    with pytest.raises(ModelError, match="is damaged: it names no frozen weights"):
        checkpoints.load(1)


@pytest.mark.parametrize("fault_at", range(1, 12))
def test_a_disk_that_fills_while_frozen_weights_are_written_leaves_none(
    fault_at: int, checkpoints: Checkpoints
) -> None:
    checkpoints.folder.mkdir()
    disk = FaultyDisk(refuse, fault_at, partly=True)
    with suppress(StorageError):  # what cannot be removed is no error
        Checkpoints(checkpoints.folder, disk).save(1, build_frozen_state(1), 1, FROZEN)
    assert len(disk.calls) >= fault_at
    for path in checkpoints.folder.glob("frozen-*.pth"):
        assert len(path.read_bytes()) > 24_000, "whole or not there"
    checkpoints.save(1, build_frozen_state(1), 1, FROZEN)
    assert (checkpoints.load_newest() or {})["step"] == 1


@pytest.mark.parametrize("name", ["state.pth", "manifest.json"])
def test_a_checkpoint_that_lacks_a_file_is_set_aside(name: str, checkpoints: Checkpoints) -> None:
    save(checkpoints, 1, 2)
    (checkpoints.get_path(2) / name).unlink()
    assert (checkpoints.load_newest() or {})["step"] == 1


def test_a_checkpoint_that_the_run_cannot_go_on_from_is_set_aside(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1, 2, 3)

    def check(state: dict[str, Any]) -> None:
        if state["step"] > 1:
            raise RunError("its lines are lost")

    assert (checkpoints.load_newest(check) or {})["step"] == 1
    assert checkpoints.list_steps() == [1]


def test_other_folders_among_the_checkpoints_are_left_alone(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    for name in ("step-notes", "step-1", "other", ".tmp-step-00000002"):
        (checkpoints.folder / name).mkdir()
    save(checkpoints, 2, keep=1)
    assert checkpoints.list_steps() == [2]
    checkpoints.remove_unfinished()
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step-notes", "step-1", "other", "step-00000002"}


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_that_fails_at_any_call_loses_nothing_and_leaves_nothing_begun(keep: int, tmp_path: Path) -> None:
    def list_calls() -> list[tuple[str, Path]]:
        checkpoints = Checkpoints(tmp_path / "count")
        save(checkpoints, 1, 2)
        checkpoints.disk = disk = FaultyDisk(refuse, 0)
        save(checkpoints, 3, keep=keep)
        return disk.calls

    calls = list_calls()
    assert len(calls) >= 9
    newest = set()
    for number, last_call in enumerate(calls, start=1):
        for partly in (False, True):
            checkpoints = Checkpoints(tmp_path / f"{number} {partly}")
            save(checkpoints, 1, 2)
            checkpoints.disk = FaultyDisk(refuse, number, partly=partly)
            refusal = pytest.raises(StorageError, match=r"^cannot \w+ .*: No space left on device; free some space$")
            with nullcontext() if is_harmless(*last_call) else refusal:
                save(checkpoints, 3, keep=keep)
            steps = checkpoints.list_steps()
            assert steps[-2:] in ([1, 2], [2, 3]) or steps == [3]
            for step in steps:
                assert checkpoints.load(step)["note"] == f"step {step}"
            newest.add(steps[-1])
            checkpoints.disk = FaultyDisk(refuse, 0)
            checkpoints.remove_unfinished()
            save(checkpoints, 4, keep=keep)
            checkpoints.remove_old(keep)
            assert len(list(checkpoints.folder.iterdir())) == keep
    assert newest == {2, 3}


@pytest.mark.parametrize("number", [1, 2])
def test_a_first_save_without_a_folder_that_fails_is_reported(number: int, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="^cannot write .*/checkpoints: No space left"):
        save(Checkpoints(tmp_path / "checkpoints", FaultyDisk(refuse, number)), 1)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_disk_that_refuses_to_set_a_checkpoint_aside_is_reported(number: int, checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    (checkpoints.get_path(1) / "state.pth").write_bytes(b"")
    checkpoints.disk = FaultyDisk(refuse, number)
    with pytest.raises(StorageError, match="bad-step-00000001: No space left"):
        checkpoints.load_newest()


def test_a_disk_that_does_not_keep_what_is_written_costs_no_older_checkpoint(checkpoints: Checkpoints) -> None:
    class ForgetfulDisk(FaultyDisk):
        def write_file(self, path: Path, content: bytes | memoryview) -> None:
            super().write_file(path, bytes(content[:-1]) + b"?" if path.name == "state.pth" else content)

    save(checkpoints, 1)
    checkpoints.disk = ForgetfulDisk(refuse, 0)
    with pytest.raises(StorageError, match="differs from what was written"):
        save(checkpoints, 2, keep=1)
    assert (checkpoints.load_newest() or {})["step"] == 1


# Model files.


def write_model(path: Path, **changes: Any) -> Path:
    """Write a model file of LeNet; changes replace parts of its content."""
    classifier = build_classifier("lenet", len(CLASSES), input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=1)
    written = io.BytesIO(serialize_model(Model(classifier, "lenet", CLASSES, "mirror", {"run_name": "r"})))
    content = torch.load(written, weights_only=True)
    torch.save({key: value for key, value in {**content, **changes}.items() if value is not None}, path)
    return path


def test_a_model_is_rebuilt_as_it_was(tmp_path: Path) -> None:
    classifier = build_classifier("resnet", 3, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=1)
    (tmp_path / "model.pth").write_bytes(serialize_model(Model(classifier, "resnet", CLASSES, "mirror", {"a": "b"})))
    model = load_model(tmp_path / "model.pth")
    assert (model.name, model.classes, model.views, model.run) == ("resnet", CLASSES, "mirror", {"a": "b"})
    assert not model.classifier.training
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(model.classifier.state_dict()[name], tensor)


def test_the_size_of_the_images_is_kept_and_the_default_one_goes_unsaid(tmp_path: Path) -> None:
    classifier = build_classifier("resnet", 3, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=1, image_size=48)
    path = tmp_path / "model.pth"
    for side, version in ((32, 2), (96, 3)):
        model = Model(classifier, "resnet", CLASSES, "mirror", {"a": "b"}, "crop", cast(ImageSize, side))
        path.write_bytes(serialize_model(model))
        content = torch.load(path, weights_only=True)
        assert content["format_version"] == version and ("input_size" in content) == (side != 32)
        assert (load_model(path).input_size, load_model(path).classifier.image_size) == (side, 48)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 4}, "has the format 4; this version reads up to 3"),
        (
            {"format_version": 1, "model": "airbench"},
            "has the network airbench of image_classifier 0.1, .* train again, or use it",
        ),
        ({"format_version": "1"}, "has no format_version"),
        ({"model": "vgg"}, "holds a network called 'vgg'; this version knows airbench, .*, resnet"),
        ({"model": None}, "no valid 'model'"),
        ({"model": "os:system"}, "names os:system, code that would be imported; .*IMAGE_CLASSIFIER_PLUGINS=os:system"),
        ({"model": ["lenet"]}, "holds a network called"),
        ({"plugin": 7}, "not a model of this package"),
        ({"plugin": {"name": "a", "target": "b"}}, "not a model of this package"),
        ({"classes": 3}, "not a model of this package"),
        ({"classes": [1, 2, 3]}, "its classes, its views or its fit are not valid"),
        ({"classes": []}, "its classes, its views or its fit are not valid"),
        ({"views": "all"}, "its classes, its views or its fit are not valid"),
        ({"run": 1}, "not a model of this package"),
        ({"state": {}}, "another architecture: .* is missing; .* and 9 more"),
        ({"classes": ["a", "b"]}, r"has the shape \[3\] instead of \[2\]"),
        ({"classes": [str(number) for number in range(1000)]}, r"has the shape \[3\] instead of \[1000\]"),
        ({"classes": ["a"] * 1001}, "its classes, its views or its fit are not valid"),
        ({"image_size": 10**9}, "its image_size is 1000000000"),
        ({"image_size": 16}, "its image_size is 16"),
        ({"input_size": 48}, "its input_size is '48'"),
        ({"input_size": "64"}, "its input_size is '64'"),
    ],
)
def test_a_file_of_another_content_is_refused_with_what_is_wrong(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        load_model(write_model(tmp_path / "model.pth", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor.double(), r"\[3\] of float64 instead of \[3\]"),
        (lambda tensor: tensor.to_sparse(), r"the shape none instead of \[3\]"),
        (lambda tensor: "text", r"the shape none instead of \[3\]"),
        (lambda tensor: tensor[None], r"\[1, 3\] instead of \[3\]"),
    ],
)
def test_a_state_with_another_tensor_is_refused_and_nothing_copied(
    change: Callable[[Tensor], Any], words: str, tmp_path: Path
) -> None:
    classifier = build_classifier("lenet", 3, input_mean=(0, 0, 0), input_std=(1, 1, 1), seed=0)
    state = {name: torch.full_like(tensor, 7) for name, tensor in classifier.state_dict().items()}
    state["network.fc3.bias"] = change(state["network.fc3.bias"])
    with pytest.raises(ModelError, match=words):
        load_state(classifier, state, tmp_path)
    assert not any((tensor == 7).all() for tensor in classifier.state_dict().values())


class Hostile:
    """Pickled, it creates a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_no_code_in_a_model_file_is_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Hostile(trap)))
    assert trap.exists()  # it would be
    trap.unlink()
    torch.save({"format_version": 1, "state": Hostile(trap)}, tmp_path / "torch.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Hostile(trap)))
    for name in ("torch.pth", "pickle.pth"):
        with pytest.raises(ModelError, match="not a model file, or is damaged"):
            load_model(tmp_path / name)
    assert not trap.exists()


def test_a_file_that_is_missing_or_a_pointer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model file .*none.pth"):
        load_model(tmp_path / "none.pth")
    (tmp_path / "model.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="Git LFS pointer, .*; run: git lfs pull --include .*model.pth"):
        load_model(tmp_path / "model.pth")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_model_file_is_refused_or_read_but_never_a_defect(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.pth"
    if not (tmp_path / "good.pth").exists():
        write_model(tmp_path / "good.pth")
    content = bytearray((tmp_path / "good.pth").read_bytes())
    names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    assert any(name.endswith("data.pkl") for name in names)
    begin = content.index(b"data.pkl")  # the pickle, and elsewhere the archive's structure and the weights
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(begin, begin + 2000) | st.integers(0, len(content) - 1))
        content[position % len(content)] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        load_model(path)
    except ImageClassifierError as error:
        assert "\n" not in str(error)


def test_a_tensor_of_another_name_is_named_in_one_line(tmp_path: Path) -> None:
    state = load_model(write_model(tmp_path / "good.pth")).classifier.state_dict()
    write_model(tmp_path / "model.pth", state={f"a\n{name}": tensor for name, tensor in state.items()})
    with pytest.raises(ModelError, match=r"'a\\ninput_mean' is unknown") as caught:
        load_model(tmp_path / "model.pth")
    assert "\n" not in str(caught.value)


def test_a_model_in_a_finished_run_is_held_against_its_manifest(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write("model.pth", write_model(tmp_path / "other.pth").read_bytes())
    folder.finish()
    assert load_model(tmp_path / "model.pth").classes == CLASSES
    state = load_model(tmp_path / "model.pth").classifier.state_dict()
    state["network.fc3.bias"][0] += 1
    write_model(tmp_path / "model.pth", state=state)
    with pytest.raises(ModelError, match="was changed after its run"):
        load_model(tmp_path / "model.pth")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "chain_head": "0" * 64}))
    with pytest.raises(RunError, match="manifest.json is damaged"):
        load_model(tmp_path / "model.pth")


def test_no_more_is_read_than_a_model_file_may_have(tmp_path: Path) -> None:
    os.truncate(write_model(tmp_path / "model.pth"), 2**40)
    with pytest.raises(ModelError, match="model.pth cannot be read: it has more than the 536,870,912 bytes"):
        load_model(tmp_path / "model.pth")
