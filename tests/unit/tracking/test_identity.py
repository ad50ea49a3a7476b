"""Identity: digests that see every change and nothing else."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.tracking import identity
from image_classifier.tracking.identity import (
    PACKAGE_FOLDER,
    compute_code_digest,
    compute_tensor_digest,
    compute_weights_digest,
    describe_code,
    describe_environment,
    describe_machine,
    find_differing_keys,
)
from image_classifier.training.determinism import resolve_settings
from tests.tiny import make_training


@pytest.fixture
def copy_of_the_package(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGE_FOLDER, tmp_path / "elsewhere" / "image_classifier"))


def test_the_code_digest_is_the_same_wherever_the_package_lies(copy_of_the_package: Path) -> None:
    (copy_of_the_package / "__pycache__").mkdir(exist_ok=True)
    (copy_of_the_package / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"compiled")
    assert compute_code_digest(copy_of_the_package) == describe_code()["digest"]


def test_the_code_digest_sees_a_changed_a_moved_and_a_new_file(copy_of_the_package: Path) -> None:
    digests = {compute_code_digest(copy_of_the_package)}
    loop = copy_of_the_package / "training" / "loop.py"
    loop.write_text(loop.read_text() + "#")
    digests.add(compute_code_digest(copy_of_the_package))
    loop.rename(loop.with_name("loops.py"))
    digests.add(compute_code_digest(copy_of_the_package))
    (copy_of_the_package / "recipes" / "new.yaml").write_text("seed: 1\n")
    digests.add(compute_code_digest(copy_of_the_package))
    assert len(digests) == 4


def test_a_commit_is_named_only_where_git_tracks_the_package(tmp_path: Path, copy_of_the_package: Path) -> None:
    from image_classifier.tracking.identity import _describe_commit

    repository = copy_of_the_package.parent
    with pytest.MonkeyPatch.context() as patch:  # as a container image has it
        patch.setenv("IMAGE_CLASSIFIER_REVISION", "abc-dirty")
        assert _describe_commit(copy_of_the_package) == {"commit": "abc", "uncommitted_changes": True}
        patch.setenv("IMAGE_CLASSIFIER_REVISION", "")
        assert _describe_commit(copy_of_the_package) == {"commit": None, "uncommitted_changes": None}
    assert _describe_commit(copy_of_the_package) == {"commit": None, "uncommitted_changes": None}

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C", str(repository), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    assert _describe_commit(copy_of_the_package)["commit"] is None  # inside a checkout, but not of it
    git("add", "--all")
    git("commit", "--quiet", "--message", "all")
    assert _describe_commit(copy_of_the_package) == {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": False}
    (copy_of_the_package / "errors.py").write_text("")
    assert _describe_commit(copy_of_the_package)["uncommitted_changes"] is True


def test_the_environment_names_what_training_imports_with_versions() -> None:
    environment = describe_environment()
    distributions = environment["distributions"]
    for name in ("torch", "numpy", "pillow", "sympy"):  # sympy: a requirement of a requirement
        assert distributions[name] == importlib.metadata.version(name)
    assert not {"pytest", "mypy", "pyarrow", "image-classifier"} & distributions.keys()
    assert environment == describe_environment()


def test_the_machine_class_has_what_changes_bits() -> None:
    settings = resolve_settings(make_training(device="cpu"))
    machine = describe_machine(settings)
    assert machine["class"]["processor"] not in ("any", "")
    capped = describe_machine(make_training(device="cpu", instruction_set="avx2"))
    assert capped["class"]["processor"] == "any" and capped["class"]["instruction_set"] == "avx2"
    assert capped["digest"] != machine["digest"]


def test_a_processor_has_a_name_on_each_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"CPU implementer": "0x41", "CPU architecture": "8", "CPU variant": "0x1", "CPU part": "0xd40"}
    for present, name in (
        (facts, "0x41 0x1 0xd40"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "1"}, "AuthenticAMD 25 1"),
    ):
        monkeypatch.setattr(identity, "read_processor", lambda present=present: present)
        assert describe_machine(resolve_settings(make_training(device="cpu")))["class"]["processor"] == name


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])


@given(DTYPES, st.lists(st.integers(0, 4), max_size=4))
def test_a_tensor_of_any_dtype_and_shape_has_a_digest_of_its_bytes(dtype: torch.dtype, shape: list[int]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    assert compute_tensor_digest(tensor) == compute_tensor_digest(tensor.clone())
    assert compute_tensor_digest(tensor) != compute_tensor_digest(tensor.unsqueeze(0))


def test_a_tensors_digest_sees_one_bit_dtype_and_shape_but_not_the_memory_layout() -> None:
    tensor = torch.linspace(0, 1, 3 * 4 * 5 * 6).reshape(3, 4, 5, 6)
    flipped = tensor.clone()
    flipped.view(torch.int32)[1, 2, 3, 4] ^= 1
    others = [flipped, tensor.double(), tensor.reshape(3, 4, 30), tensor.reshape(4, 3, 5, 6)]
    assert len({compute_tensor_digest(other) for other in [tensor, *others]}) == 5
    channels_last = tensor.contiguous(memory_format=torch.channels_last)
    assert compute_tensor_digest(channels_last) == compute_tensor_digest(tensor)


def test_zero_and_minus_zero_and_different_nans_are_different_bytes() -> None:
    assert compute_tensor_digest(torch.tensor(0.0)) != compute_tensor_digest(torch.tensor(-0.0))


def test_a_modules_digest_sees_the_names_of_its_tensors() -> None:
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Bilinear(1, 1, 1, bias=False)
    wrapped = torch.nn.Sequential(first)
    assert compute_weights_digest(first) != compute_weights_digest(wrapped)
    assert compute_weights_digest(second) != compute_weights_digest(first)


def test_differing_keys_are_those_that_differ_or_are_absent() -> None:
    assert find_differing_keys({"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": 0}) == ["b", "c", "d"]
