"""`data fetch`: some images of a snapshot here, on a web server and in a bucket, and the correction of a label."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classifier.cli.data import main as data
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.export import write_snapshot
from image_classifier.data.snapshot import Snapshot
from tests.documents import get_section
from tests.runs import build_record
from tests.stores import Bucket
from tests.tiny import write_tiny_dataset

IMAGE_BYTES = 3072


@dataclass
class Web:
    """A web server.

    Attributes:
        url: of the folder that it shows.
        has_ranges: whether it sends parts of files.
        num_bytes: of the bodies that it has sent.
    """

    url: str = ""
    has_ranges: bool = True
    num_bytes: int = 0


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A data set of 200 images to train and 60 to test with."""
    return load_snapshot(write_tiny_dataset(tmp_path_factory.mktemp("fetch") / "data"))


@pytest.fixture(scope="module")
def exported(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its snapshot, to be published."""
    folder = tmp_path_factory.mktemp("exported") / "snapshot"
    write_snapshot(snapshot, folder)
    return folder


@pytest.fixture
def web(exported: Path) -> Iterator[Web]:
    """A web server that shows the snapshot, and lists nothing."""
    web = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(is_head=True)

        def do_GET(self) -> None:
            self.answer(is_head=False)

        def answer(self, *, is_head: bool) -> None:
            path = exported / self.path.rpartition("/")[2]
            content = path.read_bytes() if path.is_file() else b""
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if web.has_ranges else None
            part = content if match is None else content[int(match[1]) : int(match[2]) + 1]
            self.send_response(404 if not content else 206 if match else 200)
            if web.has_ranges:
                self.send_header("Accept-Ranges", "bytes")
            if match:
                self.send_header("Content-Range", f"bytes {match[1]}-{match[2]}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if not is_head:
                web.num_bytes += len(part)
                self.wfile.write(part)

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *words: object) -> None:
            pass  # a client that does not want the rest

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        web.url = f"http://127.0.0.1:{server.server_port}/snapshot"
        yield web
        server.shutdown()
        thread.join()


def count_read(printed: str) -> int:
    """Give the number of bytes that were read, as it was printed."""
    (number,) = re.findall(r"  read ([\d,]+) bytes of [\d,]+$", printed.rstrip("\n"))
    return int(number.replace(",", ""))


def test_images_of_a_web_server_are_fetched_alone(
    web: Web, snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, proof = tmp_path / "out", tmp_path / "proof.json"
    words = ["--data_digest", snapshot.digest.upper(), "--images", "100:132", "--output", str(output)]
    assert data(["fetch", web.url, *words, "--proof", str(proof)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"ACCEPTED\n  data {snapshot.digest}\n  images 100 to 131 of the train part\n")
    assert 32 * IMAGE_BYTES < web.num_bytes == count_read(printed) < 32 * (IMAGE_BYTES + 8) + 5000
    written = {int(path.stem): path for path in output.rglob("*.png")}
    assert [*sorted(written)] == [*range(100, 132)]
    for number, path in written.items():
        assert path.parent == output / "train" / snapshot.classes[snapshot.labels[number]]
        assert np.array_equal(np.asarray(Image.open(path)).transpose(2, 0, 1), snapshot.images[number])
    words = ["--data_digest", snapshot.digest, "--image", str(written[131])]
    assert data(["check-proof", str(proof), *words]) == 0


def test_a_web_server_without_parts_or_files_is_refused(
    web: Web, exported: Path, snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data_digest", snapshot.digest, "--images", "5", "--output", str(tmp_path / "out")]
    web.has_ranges = False
    assert data(["fetch", web.url, *words]) == 2
    message = capsys.readouterr().err
    assert "comes only as a whole, not in parts; download the folder" in message and message.count("\n") == 1
    assert data(["fetch", f"{web.url}?signature=secret", *words]) == 2
    message = capsys.readouterr().err
    assert "is signed for one file; give the address of a folder" in message and "secret" not in message
    web.has_ranges = True
    (exported / "tree.bin").rename(exported / "gone")
    try:
        assert data(["fetch", web.url, *words]) == 2
    finally:
        (exported / "gone").rename(exported / "tree.bin")
    message = capsys.readouterr().err
    assert f"{web.url} is not a snapshot" in message and "there is no tree.bin; `image_classifier data exp" in message
    assert message.count("\n") == 1 and not list(tmp_path.iterdir())


def test_images_of_a_bucket_are_fetched_alone(
    bucket: Bucket, exported: Path, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    url = bucket.upload_folder("snapshots/first", exported)
    assert data(["fetch", url, "--data_digest", snapshot.digest, "--part", "test", "--images", "7"]) == 0
    printed = capsys.readouterr().out
    assert re.search(f"  image 7 of the test part, class {snapshot.classes[snapshot.labels[207]]}, sha256 of", printed)
    pairs = [re.findall(r"\d+", ranges) for _, ranges in bucket.proxy.objects]
    assert sum(int(stop) + 1 - int(start) for start, stop in pairs) == count_read(printed) < IMAGE_BYTES + 3000
    bucket.upload("snapshots/first", {"images.npy": bytes((exported / "images.npy").stat().st_size)})
    assert data(["fetch", url, "--data_digest", snapshot.digest, "--images", "7"]) == 2
    assert "images.npy is no array of NumPy" in capsys.readouterr().err


def read_digest(folder: Path) -> str:
    return str(json.loads((folder / "snapshot.json").read_text())["digest"])


def test_the_documented_commands_fetch_images_and_prove_a_correction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)

    def fill_in(text: str) -> str:
        versions = [path.parent for path in tmp_path.glob("shapes-*/snapshot.json")]
        return functools.reduce(
            lambda text, path: text.replace(f"DIGEST_{path.name[-1]}", read_digest(path)), versions, text
        )

    for title in ("Check and fetch single images", "Corrected labels"):
        section = get_section("docs/proofs.md", title)
        (commands,), (shown,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("bash", "text"))
        printed = []
        for line in commands.splitlines():
            program, command, *words = shlex.split(fill_in(line))
            assert (program, command, data(words)) == ("image_classifier", "data", 0)
            printed.append(capsys.readouterr().out)
        assert fill_in(shown) in printed
    assert len(list(tmp_path.glob("images/train/*/*.png"))) == 100

    old, new = (read_digest(tmp_path / f"shapes-{version}") for version in "12")
    words = ["--data_digest", new, "--since", "shapes-1", "--output", "corrected"]
    assert data(["fetch", "shapes-2", *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["ACCEPTED", f"  data {new}", f"  since data {old}"]
    assert re.fullmatch("  image 17 of the train part, class circle, sha256 .*, was of class dots", printed[3])
    assert count_read(printed[4]) < 12_000
    assert [str(path) for path in Path("corrected").rglob("*.png")] == ["corrected/train/circle/00000017.png"]

    words = ["check-proof", "new.json", "--data_digest", new, "--before", "proof.json"]
    assert data(words) == 2
    assert "do not prove a correction: the proofs are not about the same places" in capsys.readouterr().err
    assert data(["fetch", "shapes-2", "--data_digest", new, "--since", "shapes-2"]) == 2
    assert "has no image that shapes-2 does not have: nothing to fetch" in capsys.readouterr().err


def test_a_run_gives_the_digest_and_bad_words_are_refused(
    exported: Path, snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = build_record("tiny/run", "sample", snapshot.classes, 60)
    record["data"] |= {"digest": snapshot.digest, "digest_format": 2}
    (tmp_path / "run.json").write_text(json.dumps(record))
    run = ["--run", str(tmp_path)]
    assert data(["fetch", str(exported), *run, "--images", "199"]) == 0
    assert "image 199 of the train part" in capsys.readouterr().out
    (tmp_path / "there").mkdir()
    by_digest = ["--data_digest", snapshot.digest]
    for words, refusal in (
        ([*run, "--images", "150:201"], "has images 0 to 199, and STOP is one more than the last; got: 150:201"),
        ([*run, "--images", "1:2:3"], "--images takes START:STOP such as 100:200, or a number, got: '1:2:3'"),
        ([*run, "--images", "-1"], "--images"),
        ([*run], "give the --images to fetch, or --since for what is new or relabelled"),
        ([*run, "--since", "x", "--part", "train"], "--part goes with --images; --since looks at all parts"),
        ([*run, "--images", "1", "--since", "x"], "give the --images to fetch, or --since"),
        (["--images", "1"], "give the data set's --data_digest, or the --run that has it"),
        ([*run, *by_digest, "--images", "1"], "give the data set's --data_digest, or the --run that has it"),
        (["--data_digest", "0" * 64, "--images", "1"], "holds data of the digest"),
        ([*run, "--images", "1", "--output", str(tmp_path / "there")], "there exists already"),
        ([*run, "--images", "1", "--output", str(tmp_path / "no" / "out")], "there is no folder"),
        ([*run, "--images", "1", "--part", "validation"], "has no validation part; it has train, test"),
        (
            [*run, "--since", str(tmp_path)],
            "there is no snapshot.json; correct the path, for there is none of its files",
        ),
    ):
        assert data(["fetch", str(exported), *words]) == 2
        message = capsys.readouterr().err
        assert refusal in message and message.count("\n") == 1
    record["data"]["digest_format"] = 1
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert data(["fetch", str(exported), *run, "--images", "1"]) == 2
    assert "whose digest is over all images at once and checks none alone" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "there"}


def test_nothing_is_left_of_images_that_are_damaged_or_of_a_proof_that_is_too_large(
    exported: Path,
    snapshot: Snapshot,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    content = bytearray((copy / "images.npy").read_bytes())
    content[-1] ^= 1
    (copy / "images.npy").write_bytes(content)
    words = ["--data_digest", snapshot.digest, "--part", "test", "--images", "0:60"]
    words += ["--output", str(tmp_path / "out"), "--proof", str(tmp_path / "proof.json")]
    assert data(["fetch", str(copy), *words]) == 2
    message = capsys.readouterr().err
    assert "is damaged: the pixels in the test part of image 59 differ from data" in message
    monkeypatch.setattr("image_classifier.data.proof.MAX_BYTES", 100_000)
    assert data(["fetch", str(exported), *words]) == 2
    message = capsys.readouterr().err
    assert (
        "--proof: the proof of 60 images has more than the 100,000 bytes" in message
        and "fetch fewer images at once" in message
    )
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
