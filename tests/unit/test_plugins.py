"""Names of plug-ins: found, checked, described by the digest of their code, and imported only where that is allowed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from image_classifier.errors import ModelError, SettingsError
from image_classifier.plugins import (
    ALLOWED,
    NETWORKS,
    OWN,
    check_allowed,
    check_name,
    describe,
    find_target,
    is_target,
    load,
    restore_plugin,
)

FILE = Path("somewhere/model.pth")


def register(folder: Path, distribution: str, **names: str) -> None:
    """Write what pip leaves of a distribution that registers networks."""
    place = folder / f"{distribution}-1.2.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    lines = [f"{name} = {target}" for name, target in names.items()]
    (place / "entry_points.txt").write_text("\n".join(["[image_classifier.networks]", *lines]) + "\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is imported from, with a package and a module."""
    (tmp_path / "some_package" / "nets").mkdir(parents=True)
    (tmp_path / "some_package" / "__init__.py").write_text("")
    (tmp_path / "some_package" / "nets" / "small.py").write_text("class Nets:\n    build = dict\n")
    (tmp_path / "some_module.py").write_text("build = list\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("some_")]:  # of the test before
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.mark.parametrize("name", ["a:b", "a.b_1:C.d", "_a:b", "a" * 150 + ":b"])
def test_a_target_is_a_module_and_an_attribute(name: str) -> None:
    assert is_target(name)
    check_name("model", name)


@pytest.mark.parametrize(
    "name", ["a", "a:", ":b", "a:b:c", "a b:c", "a-b:c", "1a:b", "a.:b", "é:b", "a:b\n", "a" * 300 + ":b", 7]
)
def test_what_is_none_is_refused(name: object) -> None:
    assert not is_target(name)
    with pytest.raises(SettingsError, match="^--optimizer takes one of sgd, muon, or module:attribute"):
        check_name("optimizer", str(name))


@pytest.mark.parametrize(
    ("name", "meant"), [("resnte", "resnet"), ("ResNet-18", "resnet18"), ("own_netwrk", "own_network")]
)
def test_a_name_that_does_not_exist_is_refused_with_the_one_that_may_be_meant(
    name: str, meant: str, folder: Path
) -> None:
    register(folder, "own", own_network="some_module:build")
    with pytest.raises(SettingsError, match=f"got: {name} .did you mean {meant}"):
        check_name("model", name)


def test_each_network_of_the_catalogue_can_be_imported() -> None:
    for network in NETWORKS.values():
        assert callable(load("model", network.target))
    assert OWN["model"] == tuple(NETWORKS)


def test_a_registered_name_is_its_target_and_never_one_of_ours(folder: Path) -> None:
    register(folder, "own", own_network="some_module:build", resnet="some_module:build")
    assert find_target("model", "own_network") == "some_module:build" and load("model", "own_network") is list
    assert describe("model", "resnet") is None
    found = describe("model", "own_network")
    assert found is not None and (found.distribution, found.version) == ("own", "1.2")
    assert restore_plugin(found.to_json()) == found and str(found) == "some_module:build (own 1.2)"


def test_a_name_that_two_packages_register_is_refused_when_it_is_asked_for(folder: Path) -> None:
    register(folder, "own", same="some_module:build")
    register(folder, "other", same="some_package.nets.small:Nets.build")
    check_name("model", "lenet")
    with pytest.raises(SettingsError, match="more than one .* name one of some_.*:.* and some_.* instead"):
        check_name("model", "same")


def test_the_digest_is_over_the_source_files_of_the_top_level_package(folder: Path) -> None:
    names = ("some_package.nets.small:Nets.build", "some_module:build")
    assert load("model", names[0]) is dict
    before = [describe("model", name) for name in names]
    (folder / "some_package" / "notes.txt").write_text("nothing that computes")
    (folder / "some_package" / "__pycache__").mkdir(exist_ok=True)
    (folder / "some_package" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"1")
    assert [describe("model", name) for name in names] == before
    (folder / "some_package" / "sizes.yaml").write_text("width: 7")
    after = [describe("model", name) for name in names]
    assert after[0] != before[0] and after[1] == before[1]
    (folder / "some_module.py").write_text("build = tuple\n")
    assert describe("model", names[1]) != after[1]
    with pytest.raises(SettingsError, match="no_such_package has no source files"):
        describe("model", "no_such_package:build")


def test_a_file_may_name_what_is_ours_registered_given_or_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(folder, "own", own_network="some_module:build")
    for name in ("lenet", "own_network", "some_module:build"):
        check_allowed("model", name, FILE, ModelError)
    check_allowed("model", "os:system", FILE, ModelError, given="os:system")
    monkeypatch.setenv(ALLOWED, "a:b os:system")
    check_allowed("model", "os:system", FILE, ModelError)
    monkeypatch.setenv(ALLOWED, "os:systems os")
    with pytest.raises(
        ModelError, match=f"^{FILE} names os:system, code that would be imported; .*{ALLOWED}=os:system"
    ):
        check_allowed("model", "os:system", FILE, ModelError, given="lenet")
    with pytest.raises(ModelError, match="holds a network called 'absent'; this version knows .*own_network"):
        check_allowed("model", "absent", FILE, ModelError)


@pytest.mark.parametrize("recorded", [7, {}, {"name": "a", "target": "b"}, {"name": 1, "target": "b", "digest": "c"}])
def test_a_description_that_is_none_is_refused(recorded: object) -> None:
    with pytest.raises(ValueError):
        restore_plugin(recorded)
