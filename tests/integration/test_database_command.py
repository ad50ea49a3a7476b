"""`image_classifier data` on a database, and the trainer's `--database`, as their users type them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import DatabaseError
from image_classifier.settings import RunSettings
from image_classifier.tracking.reading import read_manifest, read_record
from tests import forked
from tests.conftest import PROJECT
from tests.databases import Home, make_home, swap_label, write_source
from tests.datasets import OURS, assert_refused, encode, make_arrays, run_data, write_image_folder
from tests.postgres import PASSWORD

Result = subprocess.CompletedProcess[str]
Data = Callable[..., Result]


@pytest.fixture
def data(home: Home) -> Data:
    """Run an action of `image_classifier data` on the database."""
    return lambda *words, **variables: run_data(*words, *home.options, **{**home.environment, **variables})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def filled(data: Data, source: Path) -> Data:
    """The same, with a data set in the database."""
    assert_done(data("ingest", source, "--dataset", "birds"), "birds@1\n")
    return data


def assert_done(result: Result, output: str = "") -> None:
    assert result.returncode == 0, result.stderr
    assert output in result.stdout


def test_ingest_says_what_it_did_and_prints_the_version(data: Data, home: Home, source: Path) -> None:
    digest = load_snapshot(source).digest
    place = home.database if home.cluster else home.access.dataset_folder / "database.sqlite"
    for told in ("30 images added, 0 were there already", "0 images added, 30 were there already"):
        result = data("ingest", source, "--dataset", "birds")
        assert_done(result)
        assert result.stdout == "birds@1\n"
        lines = [told, "birds@1: 23 training images, 7 test images", f"digest {digest}"]
        first, *others = result.stderr.splitlines()
        assert first.startswith(f"the database is {place}") and "; --dataset_folder names another folder" in first
        assert others == lines


def test_a_database_lies_where_the_data_sets_do(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    result = run_data("ingest", source, "--dataset", "birds", cwd=folder)
    assert_done(result, "birds@1\n")
    assert result.stderr.startswith("the database is data/database.sqlite; ")
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.sqlite")] == ["data/database.sqlite"]
    assert_done(run_data("info", "--dataset_folder", "db:birds", cwd=folder))
    assert RunSettings(experiment_name="e", run_name="r", database="birds").dataset_folder == Path("data")
    (folder / "data" / "cifar_dataset").mkdir()
    (folder / "data" / "database.sqlite").rename(folder / "data" / "cifar_dataset" / "database.sqlite")
    complaint = "or name another in --db_config; data/cifar_dataset/database.sqlite is one: move it there"
    assert_refused(run_data("list", cwd=folder), complaint)


def test_bad_images_are_listed_and_left_out_only_when_asked_for(data: Data, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_image_folder(folder, make_arrays(), OURS)
    (folder / "train" / "cat" / "bad.png").write_bytes(b"no image")
    (folder / "train" / "cat" / "odd.png").write_bytes(encode(np.zeros((3, 40, 30), np.uint8)))
    words = ("ingest", folder, "--dataset", "birds")
    message = "1 of the images cannot be read; repair or remove them, or leave them out with --skip_bad: "
    assert_refused(data(*words), message)
    assert_refused(data(*words, "--fit", "refuse"), "2 of the images cannot be read")
    result = data(*words, "--skip_bad", "--fit", "refuse")
    assert (result.returncode, result.stdout) == (5, "birds@1\n")
    bad, large = [line for line in result.stderr.splitlines() if line.startswith("left out: ")]
    assert "bad.png: not a PNG, JPEG, WEBP or BMP image" in bad and "30 x 40 pixels" in large
    assert "note: 2 images were left out because they could not be read, such as " in result.stderr


def test_snapshot_list_and_info_show_what_there_is(filled: Data, home: Home, source: Path) -> None:
    result = filled("snapshot", "--dataset", "birds", "--where", "class=cat,dog,truck,plane,ship", "split=test,train")
    assert_done(result, "birds@2\n")
    assert_done(filled("snapshot", "--dataset", "birds", "--version", "1"), "birds@1\n")
    assert_done(filled("snapshot", "--dataset", "birds"), "birds@1\n")
    later = filled("snapshot", "--dataset", "birds", "--as_of", "2999-01-01T00:00:00Z")
    assert_done(later, "birds@1\n")
    listed = filled("list")
    assert_done(listed, "birds: 30 images of 10 classes, 0 labels corrected\n")
    rows = [line.split() for line in listed.stdout.splitlines()[2:]]
    digest = load_snapshot(source).digest
    assert (rows[0][0], rows[0][-3:]) == ("birds@1", [digest[:12], "23", "7"])
    assert (
        rows[1][0] == "birds@2"
        and rows[1][-1] == "class=cat,dog,plane,ship,truck;split=test,train"
        or (" ".join(rows[1][-2:]) == "class=cat,dog,plane,ship,truck; split=test,train")
    )
    options = [word for word in home.options if word not in ("--dataset_folder", str(home.access.dataset_folder))]
    if home.cluster:
        info = run_data("info", "--dataset_folder", "db:birds@1", *options, cwd=PROJECT, **home.environment)
        assert_done(info, f"name    birds\nversion birds@1\ndigest  {digest}\n")


def test_a_label_is_corrected_and_the_difference_shown(filled: Data, tmp_path: Path) -> None:
    old = load_snapshot(tmp_path / "source")
    was, wanted = swap_label(old.labels, 25)
    result = filled("relabel", "db:birds", "--image", "25", "--label", wanted, "--reason", "looks so")
    assert_done(result, "birds@2\n")
    assert result.stderr.splitlines()[-1].startswith("1 label corrected; digest ")
    again = filled("relabel", "db:birds", "--image", "25", "--label", wanted)
    assert_done(again, "birds@2\n")
    assert again.stderr.splitlines()[-1].startswith("the labels are these already; digest ")
    corrections = tmp_path / "corrections.csv"
    corrections.write_text(f"image,label\n0,{swap_label(old.labels, 0)[1]}\n1,{swap_label(old.labels, 1)[1]}\n")
    assert_done(filled("relabel", "db:birds@1", "--corrections", corrections), "birds@3\n")
    sheet = tmp_path / "sheet.png"
    result = filled("diff", "db:birds@1", "db:birds", "--output", sheet)
    assert_done(result)
    table = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    assert (table["unchanged"], table["relabelled"]) == (["21", "6"], ["2", "1"])
    assert table["25"] == [was, wanted]
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    assert "unchanged 23 7" in " ".join(filled("diff", "db:birds@1", tmp_path / "source").stdout.split())


@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_a_version_is_written_out_and_read_again(layout: str, filled: Data, tmp_path: Path) -> None:
    result = filled("export", "db:birds", "--output", tmp_path / "out", "--format", layout)
    assert_done(result, f"{tmp_path / 'out'}\n")
    written, snapshot = load_snapshot(tmp_path / "out"), load_snapshot(tmp_path / "source")
    assert written.name == "birds" and written.classes == snapshot.classes
    if layout == "parquet":
        assert written.digest == snapshot.digest
    pairs = [
        sorted((image.tobytes(), label) for image, label in zip(*part, strict=True))
        for one in (written, snapshot)
        for part in (one.train, one.test)
    ]
    assert pairs[:2] == pairs[2:]
    assert_refused(filled("export", "db:birds", "--output", tmp_path / "out"), "exists already; choose another")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["ingest", "SOURCE", "--dataset", "a/b"], "a data set in a database is NAME or NAME@VERSION"),
        (["ingest", "SOURCE", "--dataset", "a@2"], "without a version, got: a@2"),
        (["ingest", "nowhere", "--dataset", "birds"], "no data set at nowhere"),
        (["ingest", "SOURCE", "--dataset", "birds", "--chunk_size", "0"], "--chunk_size"),
        (["snapshot", "--dataset", "fish"], "has no data set fish: it has birds"),
        (["snapshot", "--dataset", "birds", "--version", "9"], "has no version 9: it has 1 to 1"),
        (["snapshot", "--dataset", "birds", "--where", "label=3"], "--where takes NAME=VALUE"),
        (["snapshot", "--dataset", "birds", "--where", "class=zebra"], "has no class 'zebra'"),
        (["snapshot", "--dataset", "birds", "--as_of", "monday"], "--as_of takes a time"),
        (
            ["snapshot", "--dataset", "birds", "--version", "1", "--as_of", "2026-01-01"],
            "leave --as_of and --where out",
        ),
        (["relabel", "db:birds", "--image", "1"], "give --image and --label for one correction"),
        (["relabel", "db:birds", "--image", "1", "--label", "zebra"], "zebra is not a class"),
        (["relabel", "db:birds", "--image", "99", "--label", "cat"], "has no image 99"),
        (["relabel", "folder", "--image", "1", "--label", "cat"], "labels are corrected in a database"),
        (["relabel", "db:birds", "--corrections", "nowhere"], "--corrections: nowhere cannot be read"),
        (["diff", "db:birds@1", "db:birds@2"], "has no version 2"),
        (["diff", "db:", "db:birds"], "a data set in a database is NAME or NAME@VERSION"),
        (["export", "db:birds", "--output", "none/there"], "there is no folder none"),
        (["list", "--db_config", "nowhere.yaml"], "--db_config: nowhere.yaml cannot be read"),
        (["list", "--db_pass_file", "nowhere"], "--db_pass_file: nowhere cannot be read"),
    ],
)
def test_bad_input_gets_one_line(words: list[str], complaint: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    folder = ("--dataset_folder", tmp_path / "home")
    assert_done(run_data("ingest", source, "--dataset", "birds", *folder))
    result = run_data(*(source if word == "SOURCE" else word for word in words), *folder)
    assert_refused(result, complaint)
    assert run_data("list", *folder).stdout.count("birds@") == 1


def test_upgrade_makes_the_tables(data: Data) -> None:
    result = data("upgrade")
    assert (result.returncode, result.stderr) == (0, "the tables are at revision 0004\n")
    assert data("list").stderr.endswith("has no data set yet; `image_classifier data ingest` adds one\n")


def test_without_the_extra_it_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "sqlalchemy.py").write_text("raise ModuleNotFoundError('none', name='sqlalchemy')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{PROJECT}"}
    for words in (["data", "list"], ["data", "info", "--dataset_folder", "db:birds"]):
        command = [sys.executable, "-m", "image_classifier", *words]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert_refused(result, "sqlalchemy, which is not installed: pip install 'image-classifier[database]'")


# The trainer, and a password that is nowhere.


def build_trainer_words(home: Home, experiments: Path, run_name: str, *words: str) -> list[str]:
    """Build the words of a short training from the database."""
    names = ["--experiments_folder", str(experiments), "--experiment_name", "e", "--run_name", run_name]
    settings = ["--recipe", "notebook", "--num_epochs", "1", "--batch_size", "10", "--num_threads", "1"]
    return ["train", *names, *settings, *home.options, "--database", "birds", *words]


def train(words: list[str], **variables: str) -> tuple[Result, set[str]]:
    """Train; return what came of it, and all command lines that the process showed after its first second."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)} | variables
    line = [sys.executable, "-m", "image_classifier", *words]
    process = subprocess.Popen(
        line, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    titles = set()
    while True:
        try:
            output, errors = process.communicate(timeout=0.01)  # reads on: a full pipe would stop the trainer
            break
        except subprocess.TimeoutExpired:
            titles.add(Path(f"/proc/{process.pid}/cmdline").read_text())
    return subprocess.CompletedProcess(words, process.returncode, output, errors), titles


def test_a_run_names_the_version_that_it_resolved_and_is_resumed_evaluated_published_and_verified_with_it(
    filled: Data, home: Home, tmp_path: Path
) -> None:
    def call(*words: object) -> Result:
        return forked.run("image_classifier", *words, variables={"PYTHONPATH": str(PROJECT), **home.environment})

    assert_done(call(*build_trainer_words(home, tmp_path, "run")))
    run = tmp_path / "e" / "run"
    record = read_record(run)
    assert (record["data"]["database"], record["execution"]["database"]) == ("birds@1", "birds@1")
    snapshot = load_snapshot(tmp_path / "source")
    assert_done(filled("relabel", "db:birds", "--image", "3", "--label", swap_label(snapshot.labels, 3)[1]))
    assert_done(call("verify", run), "IDENTICAL\n")
    evaluated = call("evaluate", run)
    assert_done(evaluated, f"on birds (data {snapshot.digest[:12]})")
    assert_done(call("report", run))
    assert '<ul class="mistakes">' in (run / "report.html").read_text()  # with the images
    assert_done(call("publish", run), f"{run / 'published'}\n")
    (run / "manifest.json").unlink()
    names = ("--experiments_folder", tmp_path, "--experiment_name", "e", "--run_name", "run", "--resume")
    assert_done(call("train", *names))
    assert read_record(run)["data"]["digest"] == snapshot.digest

    assert_done(call(*build_trainer_words(home, tmp_path, "newest")))
    assert read_record(tmp_path / "e" / "newest")["data"]["database"] == "birds@2"
    weights = {read_manifest(tmp_path / "e" / name)["weights_digest"] for name in ("run", "newest")}
    assert len(weights) == 2


def search(folder: Path, results: list[Result]) -> list[str]:
    """Search all files below a folder and all that was printed for the password; return where it is."""
    found = [str(path) for path in folder.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
    return found + [name for result in results for name in ("stdout", "stderr") if PASSWORD in getattr(result, name)]


@pytest.mark.parametrize("way", ["environment", "file", "option", "option=", "own variable"])
def test_the_password_is_in_nothing_that_a_run_leaves_or_shows(
    way: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    home = make_home("postgresql", tmp_path, request)
    source = write_source(tmp_path / "source")
    assert_done(run_data("ingest", source, "--dataset", "birds", *home.options, cwd=PROJECT, **home.environment))
    password_file = tmp_path.parent / f"{tmp_path.name}-password"
    password_file.write_text(PASSWORD + "\nwhat follows does not count\n")
    words, variables = {
        "environment": ([], {"DB_PASSWORD": PASSWORD}),
        "file": (["--db_pass_file", str(password_file)], {}),
        "option": (["--db_pass", PASSWORD], {}),
        "option=": ([f"--db_pass={PASSWORD}"], {}),
        "own variable": ([], {"IMAGE_CLASSIFIER_DB_PASS": PASSWORD}),
    }[way]
    variables |= {"IMAGE_CLASSIFIER_LOG_LEVEL": "DEBUG"} if way == "file" else {}
    results = []
    outcomes = {
        "run": ([], 0, ""),
        "failed": (["--database", "fish"], 2, "has no data set fish"),
        "wrong": (["--batch_size", "1000"], 2, "--batch_size takes at most"),
        "config": (["--print_config"], 0, "recipe: notebook"),
    }
    if way not in ("environment", "option"):
        outcomes = {"run": outcomes["run"]}
    for name, (more, status, told) in outcomes.items():
        result, titles = train([*build_trainer_words(home, tmp_path / "experiments", name), *words, *more], **variables)
        assert result.returncode == status, result.stderr
        assert told in result.stdout + result.stderr
        shown = [title for title in titles if PASSWORD in title]
        assert len(titles) > len(shown)  # an option is seen at first, and hidden then
        assert way.startswith("option") or not shown
        assert ("others on this machine can read" in result.stderr) == way.startswith("option")
        results.append(result)
    refused, _ = train([*build_trainer_words(home, tmp_path / "experiments", "refused"), "--db_pass", PASSWORD + "x"])
    assert_refused_at_last(refused, "refuses the password of owner")
    command = [sys.executable, "-c", CRASH, str(home.access.config)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "DB_PASSWORD": PASSWORD}
    crash = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert crash.returncode == 1 and "ProgrammingError" in crash.stderr
    assert search(tmp_path, [*results, refused, crash]) == []
    record = read_record(tmp_path / "experiments" / "e" / "run")
    assert record["data"]["database"] == "birds@1" and not any("db_pass=" in word for word in record["command"])
    assert json.dumps(record).count("db_pass") == (2 if way == "file" else 1)  # the name of the setting


CRASH = """
import sys
from pathlib import Path
from sqlalchemy import text
from image_classifier.access import DatabaseAccess
from image_classifier.credentials import resolve_password
from image_classifier.data.connection import Database
from image_classifier.data.place import load_place
access = DatabaseAccess(config=Path(sys.argv[1]), password=resolve_password(None))
database = Database(load_place(access), access)
print(access, database.place, vars(database), database._engine.url)
with database.reading() as connection:
    connection.execute(text("SELECT nonsense"))
"""
"""A defect, whose trace is shown."""


def assert_refused_at_last(result: Result, complaint: str) -> None:
    assert result.returncode == 2
    assert complaint in result.stderr.splitlines()[-1]


def test_two_ways_to_give_the_password_are_refused(tmp_path: Path) -> None:
    result = run_data("list", "--db_pass", "x", "--db_pass_file", tmp_path / "file")
    assert_refused(result, "--db_pass and --db_pass_file both give the password: leave one of them out")


def test_the_library_raises_what_the_commands_print() -> None:
    with pytest.raises(DatabaseError, match="there is no database"):
        load_snapshot(Path("db:birds"))
