"""WebDataset tars: read in place to the digest of the same images elsewhere, and what is wrong with them is said."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from image_classifier.access import Reading
from image_classifier.data import webdataset
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import prune
from image_classifier.errors import DataError
from tests.datasets import (
    OURS,
    encode,
    list_members,
    make_arrays,
    write_cifar10_binary,
    write_shards,
    write_tar,
)

ARRAYS = make_arrays(23, 7)
PNG = encode(ARRAYS.images[0])
GOOD = [(f"{number}.{suffix}", content) for number in range(12) for suffix, content in (("png", PNG), ("cls", b"a"))]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_CLASSIFIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the same images in CIFAR's layout."""
    folder = tmp_path_factory.mktemp("binary")
    write_cifar10_binary(folder, ARRAYS)
    return load_snapshot(folder).digest


def test_shards_in_a_folder_have_the_digest_of_the_same_images(digest: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "set", ARRAYS, OURS)
    snapshot = load_snapshot(tmp_path / "set")
    assert (snapshot.digest, snapshot.name) == (digest, "set")


def test_sub_folders_may_be_the_parts(digest: str, tmp_path: Path) -> None:
    for part, images in (("train", slice(0, 23)), ("val", slice(23, 30))):
        (tmp_path / part).mkdir()
        for number, start in enumerate(range(images.start, images.stop, 10)):
            members = list_members(ARRAYS, slice(start, min(start + 10, images.stop)), OURS)
            write_tar(tmp_path / part / f"{number:04d}.tar", members)
    (tmp_path / "metadata.json").write_text(json.dumps({"classes": OURS}), encoding="utf-8")
    snapshot = load_snapshot(tmp_path)
    assert snapshot.digest == digest and "its validation split is used for the test" in snapshot.notes[0]


def test_a_range_is_read_in_its_order_and_a_sixth_of_it_tests(tmp_path: Path) -> None:
    arrays = make_arrays(60, 0, 3)
    for number in range(10):
        members = list_members(arrays, slice(6 * number, 6 * number + 6), ["cat", "dog", "owl"])
        write_tar(tmp_path / f"pets-{number:02d}.tar", members)
    snapshot = load_snapshot(tmp_path / "pets-{00..09}.tar")
    assert (snapshot.classes, snapshot.name) == (("cat", "dog", "owl"), "pets")
    assert len(snapshot.labels) == 60 and 0 < snapshot.num_test <= 10
    tested = {image.tobytes() for image in snapshot.test[0]}
    trained = [image.tobytes() for image in arrays.images if image.tobytes() not in tested]
    assert [image.tobytes() for image in snapshot.train[0]] == trained
    assert [path.name for path in tmp_path.iterdir() if "{" in path.name] == []
    assert (tmp_path / ".snapshots" / snapshot.digest).is_dir()
    assert load_snapshot(tmp_path).digest == snapshot.digest  # the same shards, found in their folder
    assert load_snapshot(tmp_path / "pets-{00..04}.tar").digest != snapshot.digest
    assert prune(tmp_path / "pets-{00..09}.tar") > 0 and not (tmp_path / ".snapshots").exists()


def test_a_range_may_name_parts(digest: str, tmp_path: Path) -> None:
    write_shards(tmp_path, ARRAYS, OURS)
    os.rename(tmp_path / "train-000001.tar", tmp_path / "more.tar")
    (tmp_path / "train-000001.tar").symlink_to("more.tar")
    assert webdataset.list_range(tmp_path / "{train,test}-00000{0..0}.tar").parts == {
        "train": ("train-000000.tar",),
        "test": ("test-000000.tar",),
    }
    with pytest.raises(DataError, match="names 6 shards, of which 2 are missing, the first is test-000001.tar: get"):
        load_snapshot(tmp_path / "{train,test}-{000000..000002}.tar")


def test_one_tar_is_a_whole_set(tmp_path: Path) -> None:
    write_tar(tmp_path / "few.tar", GOOD)
    snapshot = load_snapshot(tmp_path / "few.tar")
    assert (snapshot.classes, snapshot.num_train, snapshot.num_test) == (("a",), 10, 2)


def test_names_of_members_are_keys_and_never_paths(tmp_path: Path) -> None:
    places = ("/etc/cron.d/a", "../../b", "c/../../../d", "e/./f", "g" * 300)
    members = [
        (f"{place}{number}.{suffix}", content)
        for number in range(3)
        for place in places
        for suffix, content in (("PNG", PNG), ("json", b'{"cls": "a"}'), ("seg.png", b"left aside"), ("txt", b"too"))
    ]
    others: list[tuple[str, bytes | None]] = [("._0.png", b"hidden"), ("README", b"without an ending")]
    folder = tmp_path / "above" / "folder"
    folder.mkdir(parents=True)
    write_tar(folder / "odd.tar", [*members, *others])
    before = set(tmp_path.rglob("*"))
    snapshot = load_snapshot(folder / "odd.tar")
    assert len(snapshot.labels) == 15
    written = set(tmp_path.rglob("*")) - before
    assert written and all(path.is_relative_to(folder / ".snapshots") for path in written)


def test_bad_images_are_listed_by_their_key_and_may_be_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "some.tar", [*GOOD, ("bad.png", b"no image"), ("bad.cls", b"a")])
    with pytest.raises(DataError, match=r"1 of the images cannot be read; .*some.tar key 'bad': not a PNG"):
        load_snapshot(tmp_path / "some.tar")
    snapshot = load_snapshot(tmp_path / "some.tar", reading=Reading(skip_bad=True))
    assert len(snapshot.labels) == 12 and snapshot.findings is not None and len(snapshot.findings.left_out) == 1


def cut(path: Path, num_bytes: int) -> None:
    os.truncate(path, path.stat().st_size + num_bytes if num_bytes < 0 else num_bytes)


def add_head(path: Path, size: int, kind: bytes) -> None:
    """Put a head before the first one that says it is of this size."""
    member = tarfile.TarInfo("x")
    member.size, member.type = size, kind
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())


def rewrite(*members: tuple[str, bytes | None]) -> Callable[[Path], None]:
    return lambda path: write_tar(path, [*GOOD, *members])


END = 512 * sum(2 + len(content) // 512 if content else 1 for _, content in GOOD)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            lambda path: cut(path, END - 1500),
            "s.tar is truncated: it holds '11.png' of .* bytes, but ends before; get it again",
        ),
        (lambda path: cut(path, 1100), "s.tar is truncated: it holds '0.png' of .* bytes, but ends before"),
        (lambda path: cut(path, 300), "s.tar is truncated: it has no end marker of a tar; get it again"),
        (lambda path: cut(path, 0), "s.tar is truncated: it has no end marker"),
        (lambda path: path.write_bytes(path.read_bytes()[:700] * 3), "s.tar is truncated|is not a tar, or is damaged"),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(2000)), "s.tar is not a tar, or is damaged: .*; get it"),
        (lambda path: path.write_bytes(path.read_bytes() * 2), "has data after its end marker, like concatenated tars"),
        (
            lambda path: add_head(path, 2**33, tarfile.XHDTYPE),
            "has a header of 8,589,934,592 bytes, too many for a member",
        ),
        (lambda path: add_head(path, 2**20, tarfile.GNUTYPE_LONGNAME), "has a header of 1,048,576 bytes"),
        (lambda path: add_head(path, 0, tarfile.FIFOTYPE), "holds 'x', which is not a regular file"),
        (rewrite(("new.png", PNG)), "s.tar has the key 'new' without a label; each key must have a .cls, or a .json"),
        (rewrite(("new.png", PNG), ("new.json", b'{"caption": 3}')), "has the key 'new' without a label"),
        (rewrite(("new.png", PNG), ("new.json", b"[1]")), "has the key 'new' without a label"),
        (rewrite(("new.cls", b"a")), "s.tar has the key 'new' without an image; each key must have one of .png, .jpg"),
        (rewrite(("new.txt", b"a")), "s.tar has the key 'new' without an image"),
        (
            rewrite(("3.png", PNG)),
            "s.tar has a second image for the same key, the member '3.png'; create the shard again",
        ),
        (rewrite(("3.jpg", PNG)), "s.tar has a second image for the same key, the member '3.jpg'"),
        (rewrite(("3.cls", b"b")), "s.tar has a second .cls for the same key, the member '3.cls'"),
        (
            rewrite(("new.png", PNG), ("new.cls", b"\xff")),
            "'new' with a .cls that is not UTF-8: .*; create the shard again",
        ),
        (rewrite(("new.png", PNG), ("new.json", b'{"label": "\xff"}')), "'new' with a .json that is not JSON: 'utf-8'"),
        (
            rewrite(("new.png", PNG), ("new.json", b'{"label": 0, "label": 1}')),
            "not JSON: it has the key 'label' twice",
        ),
        (
            rewrite(("new.png", PNG), ("new.json", b'{"label": -1}')),
            "'new' with the label -1; it must be a number from",
        ),
        (
            rewrite(("new.png", PNG), ("new.json", b'{"label": 1.5}')),
            "with the label 1.5; it must be a number from 0 on",
        ),
        (rewrite(("new.png", PNG), ("new.cls", b"a\x1b[31m")), r"with the label 'a\\x1b\[31m'; it must be a number"),
        (rewrite(("new.png", PNG), ("new.cls", b"")), "with the label ''; it must be a number from 0 on, or a name"),
        (
            rewrite(("new.png", PNG), ("new.cls", bytes(2**20 + 1))),
            "with a .cls of 1,048,577 bytes, too many for a label",
        ),
        (
            rewrite(("new.png", PNG), ("new.cls", b"7")),
            "with numbers as labels: put the class names into a metadata.json",
        ),
        (rewrite(("new.png", None)), "s.tar holds 'new.png', which is not a regular file; create the shard"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_left(
    damage: Callable[[Path], None], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.tar"
    write_tar(path, GOOD)
    damage(path)
    with pytest.raises(DataError, match=complaint) as caught:
        load_snapshot(path)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == [path]


def test_a_tar_that_was_cut_between_two_members_is_cut(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", GOOD)
    with tarfile.open(tmp_path / "s.tar") as archive:
        at = archive.getmember("7.png").offset
    cut(tmp_path / "s.tar", at)
    with tarfile.open(tmp_path / "s.tar") as archive:
        assert len(archive.getnames()) == 14  # tarfile itself does not see it
    with pytest.raises(DataError, match="is truncated: it has no end marker"):
        load_snapshot(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("classes", "complaint"),
    [
        (["b"], "has the key '0' with the label 'a', which is not one of the classes b: correct it, or metadata.json"),
        (["b", "c"], "which is not one of the classes b, c"),
    ],
)
def test_labels_must_be_among_the_classes(classes: list[str], complaint: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", GOOD)
    (tmp_path / "metadata.json").write_text(json.dumps({"classes": classes}), encoding="utf-8")
    with pytest.raises(DataError, match=complaint):
        load_snapshot(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("s-{0..3}.tar", "names 4 shards, of which 3 are missing, the first is s-1.tar: get all of them, or correct"),
        ("s-{00..03}.tar", "the first is s-00.tar"),
        ("s-{3..0}.tar", r"the range \{3..0\} ends before it begins; write the lower number first"),
        ("s-{0..999999999}.tar", "names more than 100,000 shards; create larger shards"),
        ("s-{0..999}{0..999}.tar", "names more than 100,000 shards"),
        ("s-{0}.tar", "has braces that name no shards; write the shards as name-{000000..000123}.tar"),
        ("s-{0,0}.tar", "has braces that name no shards"),
        ("s-{{0..1}}.tar", "has braces that name no shards"),
    ],
)
def test_a_range_is_whole_or_refused(name: str, complaint: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", GOOD)
    with pytest.raises(DataError, match=complaint):
        load_snapshot(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["s-0.tar"]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            ["train-0.tar", "train-2.tar", "test-0.tar"],
            "has 2 of 3 tar shards, .*: 1 are missing, the first is number 1",
        ),
        (["train-0.tar", "train-1.tar"], "has a split called train, but none called test"),
        (["a-0.tar", "b-1.tar"], "whose names are those of different sets of shards"),
        (
            ["train/0.tar", "training/0.tar", "test/0.tar"],
            "has two subfolders for the same split, one of them is training",
        ),
        (["train/0.tar", "train/2.tar", "test/0.tar"], "the first is number 1"),
        (["train/0.tar"], "has a split called train, but none called test"),
    ],
)
def test_a_folder_with_a_part_of_the_shards_is_refused(names: list[str], complaint: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, GOOD)
    with pytest.raises(DataError, match=complaint):
        load_snapshot(tmp_path)


def test_shards_beside_those_of_parts_are_named(tmp_path: Path) -> None:
    for name in ("train-0.tar", "test-0.tar", "extra.tar"):
        write_tar(tmp_path / name, GOOD)
    (note,) = load_snapshot(tmp_path).notes
    assert note.endswith("is read from shards of train, test alone, without extra.tar")


def test_pax_and_gnu_heads_are_read(tmp_path: Path) -> None:
    members = [(f"{'ü' * 200}/{name}", content) for name, content in GOOD]
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)):
        write_tar(tmp_path / f"s{number}.tar", GOOD if kind == tarfile.USTAR_FORMAT else members, format=kind)
    digests = {load_snapshot(tmp_path / f"s{number}.tar").digest for number in range(3)}
    assert len(digests) == 1


def test_heads_after_heads_without_end_are_refused(tmp_path: Path) -> None:
    head = tarfile.TarInfo.create_pax_global_header({"comment": "x"})
    packed = io.BytesIO()
    for _ in range(3000):
        packed.write(head)
    (tmp_path / "s.tar").write_bytes(packed.getvalue() + bytes(1024))
    with pytest.raises(DataError, match="is not a tar, or is damaged: .*recursion"):
        load_snapshot(tmp_path / "s.tar")
