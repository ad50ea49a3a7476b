"""`image_classifier compare`: its table, its JSON, its picture, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from image_classifier.__main__ import main as image_classifier
from image_classifier.cli.compare import main
from tests.runs import write_run


def compare(*words: str | Path) -> int:
    return main([str(word) for word in words])


def test_groups_of_seeds_are_put_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low = [write_run(tmp_path, f"e/low{s}", accuracy=0.6, seed=s, num_images=1000) for s in range(3)]
    high = [write_run(tmp_path, f"e/high{s}", accuracy=0.8, seed=s, num_images=1000, cutout=8) for s in range(3)]
    picture = tmp_path / "comparison.png"

    assert compare(*low, *high, "--output", picture) == 0

    shown, said = capsys.readouterr()
    assert said == f"the picture is {picture}\n"
    assert [line.split()[1] for line in shown.splitlines()[2:8]] == [f"e/{run.name}" for run in [*low, *high]]
    assert "cutout   0  8" in shown
    assert "B - A: +19.80 points, 95 % interval +1" in shown
    assert "Welch's t-test over the seeds): a significant difference between these settings." in shown
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_json_has_what_the_table_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path, f"e/{c}", cutout=c, predictions_seed=c) for c in (0, 8)]

    assert compare(*runs, "--json") == 0
    comparison = json.loads(capsys.readouterr().out)
    assert compare(*runs) == 0
    shown = capsys.readouterr().out

    (difference,) = comparison["differences"]
    assert difference["test"] == "McNemar"
    assert f"{100 * difference['difference']:+.2f} points" in shown
    assert f"p = {difference['p_value']:.2g}" in shown
    assert ("a significant difference between these two networks" in shown) == difference["differ"]
    assert ("no significant difference between these two networks" in shown) != difference["differ"]
    for run in comparison["runs"]:
        assert f"{100 * run['accuracy']:.2f} %" in shown


def test_what_cannot_be_judged_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = [write_run(tmp_path, f"e/s{s}", seed=s, accuracy=1.0) for s in range(2)]
    others = [write_run(tmp_path, f"e/o{s}", seed=s, accuracy=1.0, cutout=8) for s in range(2)]
    single = write_run(tmp_path, "e/single", num_epochs=0)

    assert compare(*seeds, *others, single) == 0

    shown = capsys.readouterr().out
    assert "All seeds gave the same accuracy, so there is no variance to test against." in shown
    assert "Note: group C has only one seed, so its spread is unknown; train it with more seeds to compare it." in shown
    assert " - " in next(line for line in shown.splitlines() if "e/single" in line)  # nothing was trained


def test_other_code_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path, f"e/{c}", changes={"code": {"digest": c * 64}}) for c in "ab"]

    assert compare(*runs) == 0

    assert "Beyond the settings, by digest\nrun  code\ne/a  aaaaaaaaaaaa\ne/b  bbbbbbbbbbbb" in capsys.readouterr().out


def test_three_networks_are_compared_two_by_two_with_a_correction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path, f"e/{c}", cutout=c, predictions_seed=c, accuracy=0.6 + c / 100) for c in (0, 8, 16)]

    assert compare(*runs) == 0

    shown = capsys.readouterr().out
    assert shown.count("McNemar's exact test") == 3
    assert "after Holm's correction" in shown


def test_different_data_is_refused_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path, f"e/{data}", data=data) for data in ("cifar10", "sample")]
    picture = tmp_path / "comparison.png"

    assert compare(*runs, "--output", picture) == 2

    shown, said = capsys.readouterr()
    assert shown == ""
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not picture.exists()
    assert compare(*runs, "--allow_different_data") == 0


def test_the_command_is_found_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert image_classifier(["compare", str(write_run(tmp_path))]) == 2
    assert "two or more runs" in capsys.readouterr().err
