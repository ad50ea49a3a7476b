"""A run folder is begun whole, written by one process, goes on from where it stood, and finished under a manifest."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from image_classifier.errors import RunError, StorageError
from image_classifier.storage import Disk, FaultyDisk
from image_classifier.tracking import reading
from image_classifier.tracking.checking import (
    check_finished,
    describe_others,
    find_changed_files,
    is_finished,
    verify_files,
)
from image_classifier.tracking.layout import CHAIN, METRICS, RECORD
from image_classifier.tracking.reading import (
    MAX_PREDICTIONS_BYTES,
    read_chain,
    read_epochs,
    read_evaluation,
    read_manifest,
    read_predictions,
    read_record,
)
from image_classifier.tracking.run import RunFolder, open_run_folder
from tests.conftest import PROJECT
from tests.runs import write_run


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Begin.


def test_a_new_folder_is_there_with_those_above_it_and_stays_when_it_has_a_record(tmp_path: Path) -> None:
    path = tmp_path / "experiments" / "experiment" / "run"
    with open_run_folder(path, resume=False) as folder:
        assert path.is_dir()
        folder.write_json(RECORD, {"format_version": 1})
    assert [file.name for file in path.iterdir()] == [RECORD]


def test_a_folder_that_gets_no_record_is_removed_with_those_that_were_made_for_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with open_run_folder(tmp_path / "experiments" / "experiment" / "run", resume=False):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_beginning_that_the_disk_refuses_at_any_call_leaves_nothing(tmp_path: Path) -> None:
    def begin(disk: FaultyDisk) -> None:
        with open_run_folder(tmp_path / "experiments" / "experiment" / "run", resume=False, disk=disk) as folder:
            folder.write_json(RECORD, {"format_version": 1})

    begin(unharmed := FaultyDisk(refuse, 0))
    assert [name for name, _ in unharmed.calls].count("make_folder") == 3 + 1
    for number in range(1, len(unharmed.calls) - 1):  # at the last two the record is there
        shutil.rmtree(tmp_path / "experiments", ignore_errors=True)
        with pytest.raises(StorageError, match=r"^cannot write .*run.*: No space left on device; free some space$"):
            begin(FaultyDisk(refuse, number, partly=True))
        assert list(tmp_path.iterdir()) == [], f"call {number}: {unharmed.calls[number - 1]}"


def test_a_folder_that_exists_is_refused_with_the_advice_that_fits(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for words in (r"exists already; choose another --run_name$", "or continue it with --resume$"):
        with pytest.raises(RunError, match=words):
            with open_run_folder(run, resume=False):
                pass
        (run / "manifest.json").unlink(missing_ok=True)
    assert (run / RECORD).exists()


class SharedDisk(Disk):
    """A disk on which another process makes, or removes, a folder just before this one makes one."""

    def __init__(self, others: dict[str, Callable[[Path], object]]) -> None:
        self.others = others

    def make_folder(self, path: Path) -> None:
        self.others.pop(path.name, Path.exists)(path)
        super().make_folder(path)


def test_two_that_begin_the_first_runs_of_an_experiment_do_not_hinder_each_other(tmp_path: Path) -> None:
    path = tmp_path / "experiments" / "experiment" / "run"
    others: dict[str, Callable[[Path], object]] = {name: Path.mkdir for name in ("experiments", "experiment")}
    with open_run_folder(path, resume=False, disk=SharedDisk(others)) as folder:  # makes its own alone
        assert not others
    assert path.parent.is_dir() and not path.exists()

    path.parent.rmdir()
    others["run"] = lambda path: path.parent.rmdir()  # the other one failed, and removed what it had made
    with open_run_folder(path, resume=False, disk=SharedDisk(others)) as folder:
        folder.write_json(RECORD, {"format_version": 1})
    assert not others and (path / RECORD).is_file()


def test_a_name_that_is_too_long_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File name too long; choose a shorter name"):
        with open_run_folder(tmp_path / "experiments" / "experiment" / ("🐈" * 64), resume=False):
            pass
    assert list(tmp_path.iterdir()) == []


def test_two_that_begin_one_run_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "experiments" / "experiment" / "run"
    with pytest.raises(RunError, match="the run folder .* exists already; choose another --run_name"):
        with open_run_folder(path, resume=False, disk=SharedDisk({"run": Path.mkdir})):
            pass
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("fate", ["moved", "removed", "replaced"])
def test_nothing_is_written_into_what_took_the_place_of_a_run(fate: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_run_folder(path, resume=False) as folder:
        folder.write_json(RECORD, {"format_version": 1})
        shutil.rmtree(path) if fate == "removed" else path.rename(tmp_path / "elsewhere")
        if fate == "replaced":
            path.mkdir()
        writes: list[Callable[[], object]] = [
            lambda: folder.write("model.pth", b""),
            lambda: folder.write_folder("profile", {}),
            lambda: folder.append_line(METRICS, {}),
            folder.sync_lines,
        ]
        for write in writes:
            with pytest.raises(RunError, match=f"{path} was moved, removed or replaced .*; put it back"):
                write()
        assert not path.exists() or list(path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_file_in_the_place_of_a_folder_is_reported(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / "experiments").write_text("not a folder")
    else:
        (tmp_path / "experiments").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="Not a directory; a file or a broken link is in the place of a folder"):
        with open_run_folder(tmp_path / "experiments" / "experiment" / "run", resume=False):
            pass


# Go on.


def test_there_must_be_a_run_to_go_on_with(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    for name, words in (("none", "there is no run .*none to resume"), ("photos", "has cat.jpg but no run.json")):
        with pytest.raises(RunError, match=words):
            with open_run_folder(tmp_path / name, resume=True):
                pass
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "cat.jpg"]


def test_what_was_killed_before_its_record_goes_on_and_what_it_had_begun_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-run.json").write_bytes(b'{"format_ver')
    with open_run_folder(tmp_path, resume=True):
        assert list(tmp_path.iterdir()) == []
    assert tmp_path.is_dir(), "it was there before"


def test_a_second_process_is_kept_out_until_the_first_has_ended_however_it_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    program = (
        "import sys; from pathlib import Path; from image_classifier.tracking.run import open_run_folder\n"
        "with open_run_folder(Path(sys.argv[1]), resume=True): print('locked', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(run)]
    with subprocess.Popen(words, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match="another process is training into .*; wait for it, or choose another"):
            with open_run_folder(run, resume=True):
                pass
        other.kill()
    for _ in range(2):
        with open_run_folder(run, resume=True):
            pass


# Growing files.


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


LINES = st.lists(st.tuples(st.sampled_from([METRICS, CHAIN]), st.dictionaries(st.text(max_size=5), st.floats(0, 1))))


@given(before=LINES, after=LINES)
def test_lines_are_cut_back_to_where_they_stood(
    tmp_path_factory: pytest.TempPathFactory, before: list[tuple[str, Any]], after: list[tuple[str, Any]]
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for name, value in before:
        folder.append_line(name, value)
    stood = folder.sync_lines()
    for name, value in after:
        folder.append_line(name, value)
    folder.check_lines(stood)
    folder.cut_lines(stood)
    for name in (METRICS, CHAIN):
        assert read_lines(folder.path / name) == [value for other, value in before if other == name]
    folder.cut_lines({})
    assert read_lines(folder.path / METRICS) == read_lines(folder.path / CHAIN) == []


@pytest.mark.parametrize("name", [METRICS, CHAIN])
def test_lost_and_changed_lines_are_noticed(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in range(3):
        folder.append_line(METRICS, {"epoch": number})
        folder.append_line(CHAIN, {"step": number})
    stood = folder.sync_lines()
    path = tmp_path / name
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content.replace(b"1", b"3"), bytes(len(content)), None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(RunError, match=f"{name} has lost or changed lines"):
            folder.check_lines(stood)
    path.write_bytes(content + b'{"torn": ')
    folder.check_lines(stood)
    folder.cut_lines(stood)
    assert path.read_bytes() == content


def test_a_line_that_the_disk_refuses_is_not_there_in_part(tmp_path: Path) -> None:
    RunFolder(tmp_path).append_line(METRICS, {"epoch": 1})
    with pytest.raises(StorageError, match="metrics.jsonl: No space left on device"):
        RunFolder(tmp_path, FaultyDisk(refuse, 1, partly=True)).append_line(METRICS, {"epoch": 2})
    assert read_lines(tmp_path / METRICS) == [{"epoch": 1}]


def test_a_disk_that_refuses_to_sync_or_to_cut_is_reported(tmp_path: Path) -> None:
    RunFolder(tmp_path).append_line(METRICS, {"epoch": 1})
    folder = RunFolder(tmp_path, FaultyDisk(refuse, 1))
    with pytest.raises(StorageError, match="No space left on device"):
        folder.sync_lines()
    folder.disk = FaultyDisk(refuse, 1)
    with pytest.raises(StorageError, match="metrics.jsonl: No space left on device"):
        folder.cut_lines({})


def test_a_torn_line_is_not_read_as_a_line(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(RunError, match="metrics.jsonl is damaged"):
        read_epochs(tmp_path)


# Finish.


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "experiments")
    folder = RunFolder(run)
    (run / "checkpoints" / "step-00000300").mkdir(parents=True)
    (run / "checkpoints" / "step-00000300" / "state.pth").write_bytes(b"state")
    folder.finish(weights_digest="0" * 64, chain_head="1" * 64)
    return run


def test_a_run_is_finished_once_it_has_its_manifest(finished: Path) -> None:
    check_finished(finished)
    assert find_changed_files(finished) == []
    manifest = read_manifest(finished)
    assert (manifest["weights_digest"], manifest["chain_head"]) == ("0" * 64, "1" * 64)
    assert {"run.json", "metrics.jsonl", "checkpoints/step-00000300/state.pth"} < manifest["files"].keys()
    (finished / "manifest.json").unlink()
    assert not is_finished(finished)
    with pytest.raises(RunError, match="is not a finished run: it has no manifest.json; continue it with --resume"):
        check_finished(finished)


def test_changed_missing_and_unknown_files_are_named(finished: Path) -> None:
    content = (finished / "evaluation.json").read_bytes()
    (finished / "evaluation.json").write_bytes(content.replace(b"1", b"2"))
    (finished / "digests.jsonl").unlink()
    (finished / "notes.txt").write_text("unknown")
    assert find_changed_files(finished) == ["digests.jsonl", "evaluation.json", "notes.txt"]
    with pytest.raises(RunError, match="digests.jsonl is missing or was changed after the run"):
        check_finished(finished)


def test_what_is_added_later_is_no_part_of_the_run_and_is_said_not_to_be_checked(finished: Path) -> None:
    assert describe_others(finished) == ()
    (finished / "report.html").write_text("<html>")
    (finished / "profile").mkdir()
    (finished / "profile" / "etc").symlink_to("/etc")
    os.mkfifo(finished / "profile" / "pipe")
    (finished / "profile" / "new\nline").write_text("")
    (finished / ".tmp-hidden").write_text("")
    assert find_changed_files(finished) == [] and verify_files(finished) == ()
    assert describe_others(finished) == (
        "not checked, because no manifest lists it: .tmp-hidden; profile/etc, which is a symbolic link; "
        "'profile/new\\nline'; profile/pipe, which is no file; report.html",
    )


def test_a_published_model_in_a_run_is_checked_by_its_own_manifest(finished: Path) -> None:
    (finished / "published").mkdir()
    (finished / "published" / "model.onnx").write_bytes(b"")
    assert find_changed_files(finished) == []
    (line,) = verify_files(finished)
    assert "published is not a published model: it has no manifest.json" in line


@pytest.mark.parametrize(
    "name", ["model.pth", "checkpoints/step-00000300/state.pth", "run.json", "notes", "checkpoints"]
)
def test_a_link_or_a_pipe_in_a_run_is_named_whatever_it_leads_to(name: str, finished: Path) -> None:
    path = finished / name
    if path.exists():
        path.rename(finished.parent / "moved")
    path.symlink_to(finished.parent / ("moved" if name != "notes" else "nowhere"))
    assert f"{name} is a symbolic link" in verify_files(finished)
    if path.suffix:
        with pytest.raises(RunError, match="is missing or was changed"):
            check_finished(finished)
    path.unlink()
    os.mkfifo(path)
    assert f"{name} is no file" in verify_files(finished)


def test_a_file_that_no_manifest_names_is_named(finished: Path) -> None:
    (finished / "new\nline").write_text("")
    (finished / os.fsdecode(b"\xff")).write_text("")
    assert verify_files(finished) == ("'new\\nline' is in no manifest", "'\\udcff' is in no manifest")


def test_a_folder_that_cannot_be_listed_is_not_called_whole(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse_profile(path: str) -> Any:
        if str(path).endswith("profile"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    (finished / "profile").mkdir()
    monkeypatch.setattr(os, "scandir", refuse_profile)
    with pytest.raises(RunError, match="profile cannot be read: Permission denied"):
        verify_files(finished)


@pytest.mark.parametrize(
    "files",
    [
        [],
        "run.json",
        None,
        {"run.json": None},
        {"run.json": {"size": -1, "sha256": "0"}},
        {"run.json": {"size": "1", "sha256": "0"}},
        *({name: {"size": 0, "sha256": "0"}} for name in ("../x", "/etc/hostname", "a//b", "", ".", "x" * 256, "a\\b")),
        *({name: {"size": 0, "sha256": "0"}} for name in ("new\nline", "published/x", "manifest.json", ".tmp-x")),
    ],
)
def test_a_manifest_that_names_no_files_of_a_run_is_refused(files: Any, finished: Path) -> None:
    manifest = {**read_manifest(finished), "files": files}
    manifest["digest"] = reading.compute_manifest_digest(manifest)
    (finished / "manifest.json").write_text(json.dumps(manifest))
    for read in (find_changed_files, check_finished, verify_files):
        with pytest.raises(RunError, match=r"manifest.json is (missing or )?damaged: "):
            read(finished)


def test_the_checkpoints_may_be_removed_all_together_but_not_in_part(finished: Path) -> None:
    (finished / "checkpoints" / "step-00000300" / "state.pth").unlink()
    assert find_changed_files(finished) == ["checkpoints/step-00000300/state.pth"]
    shutil.rmtree(finished / "checkpoints")
    assert find_changed_files(finished) == []
    check_finished(finished)


def test_a_run_without_its_folder_is_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run folder"):
        check_finished(tmp_path / "none")


@pytest.mark.parametrize("read", [read_record, read_evaluation, read_manifest])
@pytest.mark.parametrize(
    "content", ["", "[]", "3", "{}", '{"format_version": "x"}', '{"format_version": 1}', "[" * 99999]
)
def test_a_damaged_file_is_an_expected_error(read: Any, content: str, finished: Path) -> None:
    for name in ("run.json", "evaluation.json", "manifest.json"):
        (finished / name).write_text(content)
    with pytest.raises(RunError, match="is missing or damaged|is damaged: it has no") as caught:
        read(finished)
    assert "\n" not in str(caught.value)


def test_a_later_format_is_named(finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps({**record, "format_version": 2}))
    with pytest.raises(RunError, match="has the format 2; this version reads up to 1"):
        read_record(finished)


def test_damaged_predictions_are_an_expected_error(finished: Path) -> None:
    content = (finished / "predictions.npz").read_bytes()
    for damaged in (b"", content[:100], content[:-100], content[:200] + bytes(300) + content[500:]):
        (finished / "predictions.npz").write_bytes(damaged)
        with pytest.raises(RunError, match="predictions.npz is missing or damaged"):
            read_predictions(finished)


def pack_predictions(path: Path, compression: int = zipfile.ZIP_STORED, **arrays: bytes | NDArray[Any]) -> None:
    """Write arrays, or the bytes of files that should hold some."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            if not isinstance(array, bytes):
                np.save(buffer, array)
            archive.writestr(f"{name}.npy", array if isinstance(array, bytes) else buffer.getvalue())


def build_head(description: str) -> bytes:
    """Build an .npy file whose head says something, without the array."""
    text = description.encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


LABELS, PROBABILITIES = np.zeros(3, np.int64), np.full((3, 2), 0.5, np.float32)


@pytest.mark.parametrize(
    "arrays, reason",
    [
        ({"probabilities": PROBABILITIES}, "labels.npy"),
        ({"labels": LABELS, "probabilities": PROBABILITIES.astype(np.float64)}, r"an array of float64 \[3, 2\]"),
        ({"labels": LABELS, "probabilities": np.array([["a"]])}, "an array of <U1"),
        ({"labels": LABELS[:, None], "probabilities": PROBABILITIES}, r"an array of int64 \[3, 1\]"),
        ({"labels": LABELS[:2], "probabilities": PROBABILITIES}, "3 rows of probabilities for 2 labels"),
        ({"labels": LABELS[:0], "probabilities": PROBABILITIES[:0]}, "0 rows of probabilities for 0 labels"),
        ({"labels": LABELS + 2, "probabilities": PROBABILITIES}, "a label without a class"),
        ({"labels": LABELS - 1, "probabilities": PROBABILITIES}, "a label without a class"),
        ({"labels": LABELS, "probabilities": PROBABILITIES * np.float32("nan")}, "a probability that is not finite"),
        (
            {
                "labels": LABELS,
                "probabilities": build_head("{'descr': '<f4', 'fortran_order': False, 'shape': (2**40, 2)}"),
            },
            ".",
        ),
        (
            {
                "labels": LABELS,
                "probabilities": build_head("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 9)}"),
            },
            "reshape",
        ),
        (
            {
                "labels": LABELS,
                "probabilities": build_head("{'descr': '|V0', 'fortran_order': False, 'shape': (9, 9)}"),
            },
            "an array of",
        ),
        ({"labels": LABELS, "probabilities": build_head("[" * 9000)}, "."),
        ({"labels": LABELS, "probabilities": build_head(" " * 60_000)}, "."),
        ({"labels": LABELS, "probabilities": b"\x93NUMPY\3\0" + bytes(100)}, "an array of a later format"),
        ({str(number): b"" for number in range(101)}, "more than 2 arrays"),
    ],
)
def test_predictions_that_are_none_are_refused(arrays: dict[str, Any], reason: str, tmp_path: Path) -> None:
    pack_predictions(tmp_path / "predictions.npz", **arrays)
    with pytest.raises(RunError, match=f"predictions.npz is missing or damaged: .*{reason}") as caught:
        read_predictions(tmp_path)
    assert "\n" not in str(caught.value)


def test_predictions_that_unpack_to_too_much_are_refused(tmp_path: Path) -> None:
    zeros = bytes(MAX_PREDICTIONS_BYTES)
    pack_predictions(tmp_path / "predictions.npz", zipfile.ZIP_DEFLATED, labels=LABELS, probabilities=zeros)
    assert (tmp_path / "predictions.npz").stat().st_size < 300_000
    with pytest.raises(RunError, match="it unpacks to more than 268,435,456 bytes"):
        read_predictions(tmp_path)


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("run.json", {"data": 3}, "data is a whole number instead of an object"),
        ("run.json", {"pretrained": []}, "pretrained is a list instead of an object or null"),
        ("run.json", {"settings": {"model": "lenet"}}, "settings has no seed"),
        ("run.json", {"command": [1]}, r"command\[0\] is a whole number instead of a string"),
        ("evaluation.json", {"views": ["one"]}, "views is a list instead of a string"),
        ("evaluation.json", {"accuracy": "high"}, "accuracy is a string instead of a number"),
        ("evaluation.json", {"per_class": {"a": {}}}, r"per_class\['a'\] has no accuracy"),
        ("evaluation.json", {"confusion_matrix": [[1, 2]]}, "confusion_matrix does not have 10 classes"),
        ("manifest.json", {"files": {"a": {"size": True, "sha256": ""}}}, "size is true or false instead of a whole"),
    ],
)
def test_a_file_of_another_form_is_refused_and_says_where(
    name: str, change: dict[str, Any], reason: str, finished: Path
) -> None:
    value = json.loads((finished / name).read_text())
    (finished / name).write_text(json.dumps(value | change))
    read: dict[str, Any] = {"run.json": read_record, "evaluation.json": read_evaluation, "manifest.json": read_manifest}
    with pytest.raises(RunError, match=reason):
        read[name](finished)


@pytest.mark.parametrize("line", ["3", "{}", '{"step": 1, "digest": "0"}', '{"step": 1, "digest": "0", "tensors": []}'])
def test_lines_of_another_form_are_refused(line: str, finished: Path) -> None:
    for name in ("metrics.jsonl", "digests.jsonl"):
        (finished / name).write_text(line + "\n")
    for read in (read_epochs, read_chain):
        with pytest.raises(RunError, match="jsonl is damaged"):
            read(finished)


def test_a_large_file_is_not_read_to_see_that_it_was_changed(finished: Path) -> None:
    os.truncate(finished / "model.pth", 2**40)
    assert find_changed_files(finished) == ["model.pth"]
