"""Proofs that an image is in a data set: each place is proved, and what was changed proves nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

import pytest

from image_classifier.data.dataset import load_snapshot
from image_classifier.data.proof import (
    MAX_BYTES,
    Entries,
    check_proof,
    load_proof,
    parse_proof,
    serialize_proof,
)
from image_classifier.data.snapshot import Snapshot, compute_digest
from image_classifier.errors import DataError
from tests.datasets import make_arrays, write_cifar10_python
from tests.mutate import VALUES, change_bytes

NUMBER = 133


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A data set of 300 images to train and 20 to test with, of which two are equal."""
    arrays = make_arrays(num_train=300, num_test=20)
    arrays.images[7] = arrays.images[305]
    write_cifar10_python(tmp_path_factory.mktemp("proof") / "data", arrays)
    return load_snapshot(tmp_path_factory.getbasetemp() / "proof0" / "data")


@pytest.fixture(scope="module")
def entries(snapshot: Snapshot) -> Entries:
    """What its digest is over."""
    return Entries(snapshot)


@pytest.fixture(scope="module")
def content(entries: Entries) -> bytes:
    """The proof of one image."""
    return serialize_proof(entries.prove([NUMBER]))


def accepts(content: bytes, digest: str) -> bool:
    """Say whether a proof is accepted; anything but ValueError fails the test."""
    try:
        check_proof(parse_proof(content), digest)
    except ValueError:
        return False
    return True


def test_every_image_can_be_proved(snapshot: Snapshot, entries: Entries) -> None:
    for number in range(len(snapshot.labels)):
        proof = parse_proof(serialize_proof(entries.prove([number])))
        check_proof(proof, snapshot.digest)
        (image,) = proof.images
        place = snapshot.parts[image.part].start + image.index
        assert (place, image.label) == (number, snapshot.labels[number])


def test_an_image_is_found_wherever_it_is(snapshot: Snapshot, entries: Entries) -> None:
    assert entries.find(entries.get_digest(7)) == [7, 305] and entries.find("0" * 64) == []
    proof = entries.prove([7, 305])
    assert [(image.part, image.index) for image in proof.images] == [("train", 7), ("test", 5)]
    assert accepts(serialize_proof(proof), snapshot.digest)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Change a proof's content, and write it down in the one form."""

    def apply(content: bytes) -> bytes:
        document = json.loads(content)
        change(document)
        return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()

    return apply


def swap(values: list[Any]) -> None:
    values[0], values[1] = values[1], values[0]


@pytest.mark.parametrize(
    "change, words",
    [
        (edit(lambda d: d["images"][0]["path"][0].__setitem__(3, "0" * 80)), "does not lead to the root of that part"),
        (edit(lambda d: swap(d["images"][0]["path"][0])), "does not lead to the root"),
        (edit(lambda d: swap(d["images"][0]["path"])), "does not have 15 siblings on level 0"),
        (edit(lambda d: d["images"][0]["path"][1].pop()), "does not have 15 siblings on level 1"),
        (edit(lambda d: d["images"][0]["path"].pop()), "does not have 1 siblings on level 2"),
        (edit(lambda d: d["images"][0]["path"].append([])), "has 4 levels instead of 3"),
        (edit(lambda d: d["images"][0].update(index=NUMBER + 1)), "does not lead to the root"),
        (edit(lambda d: d["images"][0].update(label=(d["images"][0]["label"] + 1) % 10)), "does not lead to the root"),
        (edit(lambda d: d["images"][0].update(index=300)), "at a place that the data set does not have"),
        (edit(lambda d: d["images"][0].update(part="validation")), "at a place that the data set does not have"),
        (edit(lambda d: d["images"][0].update(label=10)), "of a class that the data set does not have"),
        (edit(lambda d: d["images"][0].update(more=1)), "with other keys than those of the format"),
        (edit(lambda d: d["images"].append(d["images"][0])), "not in the data set's order, each once"),
        (edit(lambda d: d["images"].clear()), "it has no image"),
        (edit(lambda d: d["header"].update(num_train=301)), "it is about data of the digest"),
        (edit(lambda d: d["header"]["classes"].reverse()), "it is about data of the digest"),
        (edit(lambda d: d["header"].update(format="image_classifier snapshot 1")), "its header is not of the format"),
        (edit(lambda d: d["header"].update(num_train=True)), "num_train is true or false instead of a whole number"),
        (edit(lambda d: d["header"]["roots"].update(other="0" * 64)), "other parts or classes than a data set"),
        (edit(lambda d: d["header"].update(shape=[])), "of images of another shape"),
        (edit(lambda d: d.update(format_version=2)), "its format_version is 2; this version reads 1"),
        (edit(lambda d: d.update(more=1)), "not in the one form that proofs are written in"),
        (lambda content: content.replace(b"a", b"A"), "no hash in hexadecimal digits|it has no"),
        (lambda content: content + b" ", "not in the one form"),
        (lambda content: content[:-9], "Expecting"),
        (lambda content: b"[" * 99999, "nested deeper than the 32 levels"),
        (lambda content: content + b" " * MAX_BYTES, "more than the 4,194,304 bytes"),
    ],
)
def test_what_was_changed_proves_nothing(
    change: Callable[[bytes], bytes], words: str, content: bytes, snapshot: Snapshot, tmp_path: Path
) -> None:
    path = tmp_path / "proof.json"
    path.write_bytes(content)
    assert load_proof(path, snapshot.digest).digest == snapshot.digest
    path.write_bytes(change(content))
    with pytest.raises(DataError, match=f"proof.json proves nothing: .*({words})") as got:
        load_proof(path, snapshot.digest)
    assert "\n" not in str(got.value)


def test_a_proof_about_another_data_set_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "proof.json").write_bytes(content)
    with pytest.raises(DataError, match="it is about data of the digest .*, not 000000000000"):
        load_proof(tmp_path / "proof.json", "0" * 64)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load_proof(tmp_path / "none.json", "0" * 64)


def list_places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List where a document's values are."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(each for key, item in inner for each in list_places(item, (*place, key)))]


def change_value(chance: Random, document: Any, place: tuple[Any, ...], other: Any) -> None:
    """Change what is at a place: remove it, repeat it, or put something else there."""
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    kind, value = chance.randrange(4), holder[place[-1]]
    if kind == 0:
        del holder[place[-1]]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(chance.randrange(len(holder) + 1), value)
    elif kind == 2 and isinstance(value, str) and re.fullmatch("[0-9a-f]+", value):
        at = chance.randrange(len(value))
        holder[place[-1]] = value[:at] + chance.choice("0123456789abcdefAF g") + value[at + 1 :]
    elif kind == 3 and isinstance(value, int):
        holder[place[-1]] = value + chance.choice((-1, 1, 16, -16, 256))
    else:
        holder[place[-1]] = other


def test_ten_thousand_mutated_proofs_are_refused(content: bytes, snapshot: Snapshot) -> None:
    chance, places = Random(0), list_places(json.loads(content))[1:]
    num_changed = 0
    for number in range(10_000):
        if number % 2:
            mutated = change_bytes(chance, content)
        else:
            document = json.loads(content)
            change_value(chance, document, chance.choice(places), chance.choice(VALUES))
            mutated = (json.dumps(document, sort_keys=True, indent=1) + "\n").encode("ascii")
        if mutated != content:
            num_changed += 1
            assert not accepts(mutated, snapshot.digest)
    assert num_changed > 9_000 and accepts(content, snapshot.digest)


def test_the_schema_is_that_of_what_is_written(content: bytes, entries: Entries) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((resources.files("image_classifier") / "data" / "proof.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator.validate(json.loads(content))
    validator.validate(json.loads(serialize_proof(entries.prove([7, 305]))))
    document = json.loads(content)
    changes: tuple[dict[str, Any], ...] = ({"format_version": 2}, {"images": []}, {"more": 1})
    for change in changes:
        assert not validator.is_valid({**document, **change})


def test_a_validation_part_is_proved_too(snapshot: Snapshot) -> None:
    arrays = snapshot.images, snapshot.labels, snapshot.classes, 200, 100
    other = replace(snapshot, num_train=200, num_validation=100, digest=compute_digest(*arrays))
    proof = Entries(other).prove([250])
    assert (proof.images[0].part, proof.images[0].index) == ("validation", 50)
    assert accepts(serialize_proof(proof), other.digest) and not accepts(serialize_proof(proof), snapshot.digest)
