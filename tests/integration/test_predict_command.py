"""`image_classifier predict` on files, folders and Parquet files, of which some are not what they seem."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from image_classifier.choices import Fit
from image_classifier.cli import predict
from image_classifier.cli.predict import iterate_sources, main
from image_classifier.cli.table import parse_cell
from image_classifier.imaging import load_image
from image_classifier.tracking.checkpoint import load_model
from image_classifier.training.evaluate import compute_probabilities
from tests.runs import build_model_file

CLASSES = ("plain", "=2+3", 'with "quotes", and comma')


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pth"
    path.write_bytes(build_model_file(CLASSES, "0" * 64))
    return path


def draw_image(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(draw_image(seed)))
    return path


def run(*words: str | Path) -> int:
    return main([str(word) for word in words])


def read_csv(text: str) -> list[dict[str, str]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [{parse_cell(name): parse_cell(cell) for name, cell in row.items()} for row in rows]


@pytest.mark.parametrize("fit", ["squeeze", "crop", "pad"])
def test_images_are_fitted_as_those_were_that_the_model_was_trained_on(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, image = tmp_path / "model.pth", tmp_path / "wide.png"
    model.write_bytes(build_model_file(CLASSES, "0" * 64, fit=fit))
    image.write_bytes(encode(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)))
    assert run(model, image) == 0
    (row,) = read_csv(capsys.readouterr().out)
    pixels = load_image(image, fit=fit).transpose(2, 0, 1)[None].copy()
    expected = compute_probabilities(load_model(model).classifier, pixels, views="mirror")[0]
    assert [float(row[name]) for name in CLASSES] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_file_gets_its_class_and_all_probabilities(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_image(tmp_path / "image.png", seed=5)

    assert run(model, path) == 0

    shown, said = capsys.readouterr()
    (row,) = read_csv(shown)
    expected = compute_probabilities(
        load_model(model).classifier, draw_image(5).transpose(2, 0, 1)[None].copy(), views="mirror"
    )[0]
    assert list(row) == ["path", "class", "probability", *CLASSES]
    assert row["path"] == str(path)
    assert row["class"] == CLASSES[expected.argmax()]
    assert float(row["probability"]) == pytest.approx(expected.max(), rel=1e-5)
    assert [float(row[name]) for name in CLASSES] == pytest.approx(expected.tolist(), rel=1e-5)
    assert said == ""


def test_a_folder_is_gone_through_in_sorted_order(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["b/2.png", "a.png", "b/1.PNG", "b-c/3.png", "z/deep/er/4.png"]
    for seed, name in enumerate(names):
        write_image(tmp_path / "images" / name, seed)
    (tmp_path / "images" / "readme.txt").write_text("no image")
    write_image(tmp_path / "images" / ".hidden.png")
    write_image(tmp_path / "images" / ".cache" / "thumbnail.png")
    os.mkfifo(tmp_path / "images" / "pipe.png")

    assert run(model, tmp_path / "images") == 0

    shown, said = capsys.readouterr()
    paths = [row["path"] for row in read_csv(shown)]
    assert paths == sorted(str(tmp_path / "images" / name) for name in names)
    assert "1 files" in said and "readme" not in shown


def test_unreadable_files_are_listed_and_the_rest_is_predicted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_image(tmp_path / "good.png")
    text = tmp_path / "text.png"
    text.write_text("this is no image")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(good.read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    output = tmp_path / "predictions.csv"

    status = run(model, text, good, truncated, tmp_path / "missing.png", tmp_path / "empty", "--output", output)

    said = capsys.readouterr().err.splitlines()
    assert status == 5
    assert [row["path"] for row in read_csv(output.read_text())] == [str(good)]
    assert [line.split(": ")[1] for line in said[:4]] == [
        str(text),
        str(truncated),
        str(tmp_path / "missing.png"),
        str(tmp_path / "empty"),
    ]
    assert all(line.startswith("unreadable: ") for line in said[:4])
    assert said[4] == "4 of 5 images could not be read"


def test_nothing_readable_writes_nothing(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("this is no image")
    output = tmp_path / "predictions.csv"
    output.write_text("from yesterday")

    assert run(model, tmp_path / "text.png", "--output", output) == 2

    shown, said = capsys.readouterr()
    assert said.splitlines()[-1].startswith("error: none of 1 images could be read")
    assert shown == ""
    assert output.read_text() == "from yesterday"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.csv", "text.png"]


def test_a_folder_that_lacks_images_is_an_error(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, tmp_path) == 2
    assert "there is no image in this folder" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_image(tmp_path / "image.png")

    assert run(model, image, "--output", tmp_path / "nowhere" / "predictions.csv") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert run(model, image, "--output", tmp_path) == 2
    assert capsys.readouterr().err == f"error: --output: {tmp_path} is a folder; name a file in it\n"


@pytest.mark.parametrize("column", ["img", "image"])
def test_rows_of_a_parquet_file_are_named_by_their_path_or_number(
    tmp_path: Path, model: Path, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images: list[Any] = [
        {"bytes": encode(draw_image(0)), "path": "first.png"},
        {"bytes": encode(draw_image(1)), "path": None},
        {"bytes": b"damaged", "path": "third.png"},
        {"bytes": None, "path": "fourth.png"},
        None,
    ]
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.table({column: images, "label": [0, 1, 2, 0, 1]}), path)

    assert run(model, path) == 5

    shown, said = capsys.readouterr()
    assert [row["path"] for row in read_csv(shown)] == ["first.png", f"{path}#1"]
    lines = said.splitlines()
    assert lines[0].startswith("unreadable: third.png: ")
    assert lines[1].startswith(f"unreadable: {path}#3: ")
    assert lines[2].startswith(f"unreadable: {path}#4: ")


def test_a_parquet_file_of_bytes_and_a_damaged_one(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, damaged = tmp_path / "good.parquet", tmp_path / "damaged.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [encode(draw_image(0))]}), good)
    damaged.write_bytes(good.read_bytes()[:100])

    assert run(model, damaged, good) == 5

    shown, said = capsys.readouterr()
    assert [row["path"] for row in read_csv(shown)] == [f"{good}#0"]
    assert said.startswith(f"unreadable: {damaged} ")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.binary(min_size=1, max_size=40).filter(
        lambda name: not {0, ord("/")} & set(name) and name not in (b".", b"..")
    )
)
@example(name=b"\r")
@example(name=b"\xff")
@example(name=b"\x1b]0;title\x07")
def test_a_path_of_any_bytes_can_be_recovered(tmp_path: Path, model: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(encode(draw_image(0)))
    output = tmp_path / "predictions.csv"
    try:
        assert run(model, os.fsdecode(path), "--output", output) == 0
    finally:
        os.unlink(path)

    text = output.read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.split("\n"))
    (row,) = read_csv(text)
    assert os.fsencode(row["path"]) == path


def test_no_cell_is_a_formula_or_moves_the_cursor(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stdout and in a file, in the heading, too: one of the classes is called =2+3."""
    names = ["=1+1.png", "+1.png", "-1.png", "@A1.png", "\x1b[31mred.png", "a\nb.png", "'quoted'.png", "a;=1+1.png"]
    for name in names:
        write_image(tmp_path / "images" / name)
    monkeypatch.chdir(tmp_path / "images")

    assert run(model, "--", *names) == 0
    shown = capsys.readouterr().out
    assert run(model, "--output", tmp_path / "predictions.csv", "--", *names) == 0

    assert shown == (tmp_path / "predictions.csv").read_text(encoding="utf-8")
    assert "\x1b" not in shown and len(shown.splitlines()) == len(names) + 1
    for separator in ",;\t":
        for row in csv.reader(io.StringIO(shown), delimiter=separator):
            assert not any(cell.lstrip().startswith(("=", "+", "-", "@")) for cell in row), row
    assert [row["path"] for row in read_csv(shown)] == names


def test_the_terminal_is_not_at_the_mercy_of_names(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "\x1b[31m\nred.png").write_text("no image")

    assert run(model, tmp_path) == 2

    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\\x1b[31m\\nred.png" in said


def test_several_batches_give_what_one_gives(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(7):
        write_image(tmp_path / f"{seed}.png", seed)
    (tmp_path / "3.png").write_text("no image")
    assert run(model, tmp_path) == 5
    whole = read_csv(capsys.readouterr().out)

    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    assert run(model, tmp_path) == 5

    parts = read_csv(capsys.readouterr().out)
    assert [row["path"] for row in parts] == [row["path"] for row in whole]
    for part, other in zip(parts, whole, strict=True):
        assert float(part["plain"]) == pytest.approx(float(other["plain"]), rel=1e-4)


def test_sources_are_not_read_ahead(tmp_path: Path) -> None:
    """Memory stays the same however many images there are: each is opened when its turn comes."""
    for seed in range(3):
        write_image(tmp_path / f"{seed}.png", seed)
    sources = iterate_sources([tmp_path])
    assert next(sources) == (str(tmp_path / "0.png"), tmp_path / "0.png")


@pytest.mark.parametrize("words", [(), ("model.pth",), ("nowhere.pth", "image.png")])
def test_a_command_line_that_lacks_something_is_refused(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"no model")

    assert run(path, write_image(tmp_path / "image.png")) == 2
    assert "is not a model file, or is damaged" in capsys.readouterr().err
