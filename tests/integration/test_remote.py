"""Folders on a real S3 server, through a proxy that breaks connections, is slow, and lies; and on a web server."""

from __future__ import annotations

import functools
import hashlib
import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from image_classifier.errors import ImageClassifierError, RemoteError, SettingsError, StorageError
from image_classifier.remote import cache
from image_classifier.remote.cache import localize, prune
from image_classifier.remote.target import Target
from tests.stores import FAST, Bucket, Fault, cut, lie, stall


def draw_files(number: int, size: int) -> dict[str, bytes]:
    """Draw files of random bytes, in folders."""
    generator = np.random.default_rng(0)
    return {f"class-{index % 2}/{index}.bin": generator.bytes(size) for index in range(number)}


def read_folder(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def list_whole_copies(tmp_path: Path) -> list[Path]:
    """List what lies in the cache under a final name."""
    return [path for path in (tmp_path / "cache").glob("remote/*/*") if not path.name.startswith("incoming-")]


def test_a_folder_is_fetched_once_for_each_of_its_states(bucket: Bucket, tmp_path: Path) -> None:
    files = {**draw_files(3, 1000), "empty": b"", "ä b.txt": b"text"}
    url = bucket.upload("data", {**files, ".snapshots/x": b"hidden", "folder/": b""})
    folder = localize(url, FAST)
    assert read_folder(folder) == files and folder.name == "data"
    num_requests = len(bucket.proxy.objects)
    assert localize(Path(url), FAST) == folder and len(bucket.proxy.objects) == num_requests == 4
    bucket.upload("data", {"empty": b"not any more"})
    again = localize(url, FAST)
    assert again != folder and read_folder(again) == {**files, "empty": b"not any more"}
    assert localize(f"{url}/empty", FAST).read_bytes() == b"not any more"
    size = sum(map(len, [*files.values(), *files.values()])) + 2 * len(b"not any more")
    assert prune() == size and not list_whole_copies(tmp_path)
    assert prune() == 0


def test_twenty_cut_connections_change_nothing(bucket: Bucket) -> None:
    files = draw_files(30, 20_000)
    url = bucket.upload("data", files)
    numbers, lengths = itertools.count(), itertools.cycle([0, 1, 100, 19_999])

    def choose(line: str) -> Fault | None:
        number = next(numbers)
        return cut(next(lengths)) if number % 2 == 0 and number < 40 else None

    bucket.proxy.choose = choose
    folder = localize(url, replace(FAST, num_tries=21))
    assert len(bucket.proxy.faults) == 20
    assert read_folder(folder) == files


def test_a_fetch_that_was_broken_off_goes_on_where_it_stopped(bucket: Bucket, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(100_000)
    url = bucket.upload("archive.bin", {"": content})
    bucket.proxy.choose = lambda line: cut(10) if len(bucket.proxy.objects) > 3 else None
    patience = replace(FAST, piece=20_000)
    with pytest.raises(RemoteError, match=r"archive.bin failed 3 times, last with: .*; check the network, and start"):
        localize(url, patience)
    assert not list_whole_copies(tmp_path)
    bucket.proxy.reset()
    assert localize(url, patience).read_bytes() == content
    assert [ranges for _, ranges in bucket.proxy.objects] == ["bytes=60000-79999", "bytes=80000-99999"]


LIES = {
    "a flipped bit": lambda body: body[:-1] + bytes([body[-1] ^ 1]),
    "another object": lambda body: bytes(reversed(body)),
    "less": lambda body: body[: len(body) // 2],
    "more": lambda body: body + b"x",
    "nothing": lambda body: b"",
}


@pytest.mark.parametrize("kind", LIES)
def test_a_wrong_object_is_never_taken(kind: str, bucket: Bucket, tmp_path: Path) -> None:
    files = draw_files(2, 5000)
    url = bucket.upload("data", files)
    bucket.proxy.choose = lambda line: lie(LIES[kind])
    reason = "it sent a file with the md5" if kind in ("a flipped bit", "another object") else ""
    with pytest.raises(RemoteError, match=f"failed 3 times, last with: .*{reason}"):
        localize(url, FAST)
    assert bucket.proxy.faults and not list_whole_copies(tmp_path)
    bucket.proxy.choose = lambda line: None if bucket.proxy.faults else lie(LIES[kind])
    bucket.proxy.faults.clear()
    assert read_folder(localize(url, FAST)) == files  # what the first call left in part is not believed
    assert bucket.proxy.faults


def test_the_manifest_says_what_the_files_must_be(bucket: Bucket, tmp_path: Path) -> None:
    files = draw_files(2, 100)
    facts = {name: {"size": 100, "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()}
    manifest = json.dumps({"files": facts}).encode()
    url = bucket.upload("run", {**files, "manifest.json": manifest})
    assert len(read_folder(localize(url, FAST))) == 3
    bucket.upload("run", {"class-0/0.bin": bytes(100)})  # its ETag is right, and it is another file all the same
    with pytest.raises(RemoteError, match=r"class-0/0.bin: it sent a file with the sha256 cd00e2\w+ instead of"):
        localize(url, FAST)
    assert len(list_whole_copies(tmp_path)) == 1


def test_what_is_encrypted_with_a_key_of_its_owner_has_no_digest_to_be_held_against(bucket: Bucket) -> None:
    url = bucket.upload("data", {"a": b"plain"})
    bucket.fs.pipe_file(f"{url}/a", b"secret", ServerSideEncryption="aws:kms", SSEKMSKeyId="a-key")
    bucket.proxy.choose = lambda line: lie(lambda body: b"SECRET")  # as if the ETag were that of what is encrypted
    assert localize(url, FAST).joinpath("a").read_bytes() == b"SECRET"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_object_that_changes_between_two_reads_is_an_error(moment: str, bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.upload("data", {"a": bytes(3000)})

    def replace_object(line: str) -> Fault | None:
        if moment == "before":
            bucket.upload("data", {"a": b"x" * 3000})
            return None

        def answer(client: object, head: bytes, body: bytes) -> None:
            bucket.upload("data", {"a": b"x" * 3000})
            lie(lambda body: body)(client, head, body)  # type: ignore[arg-type]

        return answer

    bucket.proxy.choose = replace_object
    with pytest.raises(RemoteError, match=r"data was changed while it was read; start again"):
        localize(url, FAST)
    assert not list_whole_copies(tmp_path)
    bucket.proxy.reset()
    assert localize(url, FAST).joinpath("a").read_bytes() == b"x" * 3000


def test_a_slow_server_is_waited_for_and_a_stalled_one_asked_again(bucket: Bucket) -> None:
    files = draw_files(1, 5000)
    url = bucket.upload("data", files)
    bucket.proxy.choose = lambda line: stall(0.3)  # and what is missing never comes
    with pytest.raises(RemoteError, match="failed 3 times"):
        localize(url, replace(FAST, timeout_s=0.1))
    bucket.proxy.choose = lambda line: None if len(bucket.proxy.faults) > 3 else stall(0.3)
    assert read_folder(localize(url, replace(FAST, timeout_s=0.1))) == files


BAD = {
    "s3://BUCKET/none": "there is nothing at s3://BUCKET/none; correct the URL",
    "s3://no-such-bucket/x": "there is nothing at s3://no-such-bucket/x; correct the URL",
    "s3://name:hun/ter2@BUCKET/x": "no name or password: these are left to the environment",
    "s3://name:hunter2@BUCKET/x": "no name or password: these are left to the environment",
    "https://name:hunter2@localhost/x": "no name or password: these are left to the environment",
    "s3://BUCKET/x?versionId=hunter2": r"takes nothing behind a \? or #; leave that out",
    "s3://": "needs a bucket or host behind it",
    "gs://BUCKET/x": r"this needs gcsfs, which is not installed: pip install 'image-classifier\[gcs\]'",
    "http://127.0.0.1:1/x?signature=hunter2": "http://127.0.0.1:1/x failed 3 times, last with: .*; check the network",
}


@pytest.mark.parametrize("place", BAD)
def test_an_address_that_cannot_be_read_is_one_line_without_secrets(place: str, bucket: Bucket) -> None:
    name = bucket.url.removeprefix("s3://")
    with pytest.raises(ImageClassifierError, match=BAD[place].replace("BUCKET", name)) as caught:
        localize(place.replace("BUCKET", name), FAST)
    assert not any(word in str(caught.value) for word in ("ter2", "signature", "\n"))


def test_missing_credentials_are_one_line(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket.upload("data", {"a": b"a"})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(RemoteError, match=r"needs credentials, and there are none; set AWS_ACCESS_KEY_ID and AWS_"):
        localize(url, FAST)


@pytest.mark.parametrize("names", [{"a": b"", "a/b": b""}, {"x/../../y": b""}, {"a\\b": b""}, {"x\x07": b""}])
def test_a_name_that_no_file_can_have_is_refused(names: dict[str, bytes], bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.upload("data", names)
    with pytest.raises(RemoteError, match="has .*; rename (it|one of them) there"):
        localize(url, FAST)
    assert not list(tmp_path.glob("cache/remote/*"))


def test_a_full_disk_leaves_nothing(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket.upload("data", draw_files(1, 100))
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(StorageError, match="a file or a broken link is in the place of a folder"):
        localize(url, FAST)
    monkeypatch.setattr(cache, "find_cache", lambda: None)
    with pytest.raises(SettingsError, match="set IMAGE_CLASSIFIER_CACHE to a folder"):
        localize(url, FAST)


# Copies to other places


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest, bucket: Bucket, tmp_path: Path) -> str:
    """A place for copies, which does not exist yet."""
    return f"{bucket.url}/copy/run" if request.param == "s3" else (tmp_path / "copy" / "run").as_uri()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder as a run's: with a manifest, checkpoints and a hidden file."""
    folder = tmp_path / "source"
    files = {"run.json": b"record", "checkpoints/1/state": b"state", ".tmp-x/y": b"", "manifest.json": b"manifest"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_copy_is_completed_and_then_left_as_it_is(place: str, source: Path) -> None:
    target = Target(place, "mirror", FAST)
    target.probe()
    manifest = source.joinpath("manifest.json")
    manifest.rename(source.parent / "later")
    (source / "checkpoints" / "0").mkdir()
    (source / "checkpoints" / "0" / "state").write_bytes(b"old")
    target.copy(source)
    assert target.read("manifest.json") is None and target.read("checkpoints/0/state") == b"old"
    (source / "checkpoints" / "0" / "state").unlink()
    (source.parent / "later").rename(manifest)
    with pytest.raises(RemoteError, match=r"has 'checkpoints/0/state', which does not belong to the copy"):
        target.copy(source)
    target.copy(source, replaceable=["checkpoints"])
    expected = {"run.json": b"record", "checkpoints/1/state": b"state", "manifest.json": b"manifest"}
    assert read_folder(localize(place, FAST)) == expected
    target.copy(source)
    manifest.write_bytes(b"another")
    with pytest.raises(RemoteError, match="exists already with other content; choose another name, or remove it"):
        target.copy(source)
    assert read_folder(localize(place, FAST)) == expected
    target.copy(source, replaceable=["manifest.json"])
    assert read_folder(localize(place, FAST)) == {**expected, "manifest.json": b"another"}


def test_a_copy_that_breaks_off_has_no_manifest_and_goes_on(source: Path, bucket: Bucket) -> None:
    bucket.proxy.choose_upload = lambda line: cut(0) if "checkpoints" in line else None
    target = Target(f"{bucket.url}/run", "mirror", FAST)
    with pytest.raises(RemoteError, match="run failed 3 times, last with"):
        target.copy(source)
    assert bucket.read("run").keys() == {"run.json"}
    bucket.proxy.reset()
    target.copy(source)
    names = [line.split()[1].partition("/run/")[2].partition("?")[0] for line in bucket.proxy.uploads]
    assert names == ["checkpoints/1/state", "manifest.json"]
    assert bucket.read("run").keys() == {"run.json", "checkpoints/1/state", "manifest.json"}


def test_a_web_address_is_no_target_and_a_link_is_not_copied(source: Path, bucket: Bucket) -> None:
    with pytest.raises(SettingsError, match="--mirror takes a folder, s3:// or gs://: https://host/x is read-only"):
        Target("https://host/x", "mirror")
    (source / "link").symlink_to("run.json")
    with pytest.raises(RemoteError, match="link is not a regular file, so it cannot be copied"):
        Target(f"{bucket.url}/x", "mirror", FAST).copy(source)
    assert bucket.read() == {}


# Web servers


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a web server that lists folders and sends whole files alone."""
    monkeypatch.setenv("IMAGE_CLASSIFIER_CACHE", str(tmp_path / "cache"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

    (tmp_path / "web").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_folder_of_a_web_server_is_fetched(web: str, tmp_path: Path) -> None:
    files = {**draw_files(3, 100_000), "ä b%20.txt": b"text"}
    for name, content in files.items():
        path = tmp_path / "web" / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    patience = replace(FAST, piece=70_000)
    folder = localize(f"{web}/data/", patience)
    assert read_folder(folder) == files and folder.name == "data"
    assert localize(Path(f"{web}/data"), patience) == folder
    assert localize(f"{web}/data/class-0/0.bin?signature=secret", patience).name == "0.bin"
    assert not any("secret" in str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(RemoteError, match="there is nothing at http://127.0.0.1:.*/none; correct the URL"):
        localize(f"{web}/none", FAST)


def test_a_web_server_without_lists_has_what_the_manifest_names(web: str, tmp_path: Path) -> None:
    folder = tmp_path / "web" / "model"
    folder.mkdir()
    (folder / "index.html").write_text("<html>no links</html>")
    facts = {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": {"model.onnx": facts, "a/b": facts, "gone": facts}}))
    (folder / "model.onnx").write_bytes(b"abc")
    (folder / "model.sig").write_bytes(b"signature")
    assert localize(f"{web}/model", FAST).joinpath("model.sig").read_bytes() == b"signature"
    assert read_folder(localize(f"{web}/model", FAST)).keys() == {"manifest.json", "model.onnx", "model.sig"}
    (folder / "manifest.json").write_text(json.dumps({"files": {"../x": facts}}))
    with pytest.raises(RemoteError, match=r"has '../x', which is not a valid file name"):
        localize(f"{web}/model", FAST)


def test_a_signed_address_of_s3_is_fetched_in_parts(bucket: Bucket) -> None:
    content = np.random.default_rng(0).bytes(50_000)
    bucket.upload("archive.bin", {"": content})
    address = bucket.sign("archive.bin")
    assert "ignature=" in address
    assert localize(address, replace(FAST, piece=20_000)).read_bytes() == content
    assert {"bytes=20000-39999", "bytes=40000-49999"} <= {ranges for _, ranges in bucket.proxy.objects}
