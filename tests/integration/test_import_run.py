"""import_run.sh takes over what the manifests of a run name, and nothing that anybody put beside it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from image_classifier.published.folder import serialize_manifest
from image_classifier.tracking.checking import describe_others, verify_files
from image_classifier.tracking.layout import CHECKPOINTS
from image_classifier.tracking.reading import read_manifest
from image_classifier.tracking.run import RunFolder
from tests.conftest import PROJECT, report_lack, require_program, run_program

SCRIPTS = PROJECT / ".github" / "scripts"


@pytest.fixture(scope="module")
def unpacking() -> ModuleType:
    """The script that unpacks, as a module."""
    spec = importlib.util.spec_from_file_location("unpack_run", SCRIPTS / "unpack_run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["unpack_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(published_run: Path, tmp_path: Path) -> Path:
    """A published run as it was unzipped, which a test may change."""
    return shutil.copytree(published_run.parent, tmp_path / "artifact")


def zip_folder(folder: Path) -> Path:
    """Zip a folder as a workflow does, links followed by nobody."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in sorted(folder.rglob("*")):
            if entry.is_symlink():
                add_member(archive, entry.relative_to(folder).as_posix(), os.readlink(entry).encode(), stat.S_IFLNK)
            elif entry.is_file():
                archive.write(entry, entry.relative_to(folder))
    return path


def add_member(archive: zipfile.ZipFile, name: str, content: bytes = b"", kind: int = stat.S_IFREG) -> None:
    member = zipfile.ZipInfo(name)
    member.filename = name  # which ZipInfo cuts at a zero byte
    member.external_attr = (kind | 0o644) << 16
    archive.writestr(member, content)


def list_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def refuse(unpacking: ModuleType, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Unpack what is to be refused; return the one line, after seeing that nothing is left."""
    target = path.parent / "target"
    assert unpacking.main([str(path), str(target)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert output.err.rstrip("\n").isprintable()
    assert not target.exists()
    return output.err


def reseal(folder: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Change the files that a manifest names, and seal it anew, as whoever made it could."""
    manifest = read_manifest(folder)
    change(manifest["files"])
    content = {key: value for key, value in manifest.items() if key != "digest"}
    digest = importlib.import_module("image_classifier.tracking.reading").compute_manifest_digest(content)
    (folder / "manifest.json").write_text(json.dumps({**content, "digest": digest}))


@pytest.mark.parametrize("as_zip", [False, True])
def test_what_no_manifest_names_is_left_behind_and_named(
    as_zip: bool, unpacking: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list_files(folder)
    (folder / "report.html").write_text("<script>")
    (folder / "profile").mkdir()
    (folder / "profile" / "trace.json").write_text("{}")
    (folder / ".gitattributes").write_text("* filter=evil")
    target = tmp_path / "target"
    assert unpacking.main([str(zip_folder(folder) if as_zip else folder), str(target)]) == 0
    output = capsys.readouterr()
    assert output.out == "experiment\nrun\n"
    assert output.err == "left behind, as no manifest names it: .gitattributes, profile/trace.json, report.html\n"
    assert list_files(target) == before
    assert verify_files(target) == () and len(describe_others(target)) == 1  # the published model


def test_a_model_without_a_manifest_is_left_behind_and_one_that_is_signed_keeps_its_signature(
    unpacking: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "published" / "model.sig").write_text("{}")
    assert unpacking.main([str(folder), str(tmp_path / "first")]) == 0
    assert (tmp_path / "first" / "published" / "model.sig").read_text() == "{}"
    (folder / "published" / "manifest.json").unlink()
    assert unpacking.main([str(folder), str(tmp_path / "second")]) == 0
    assert "published/model.onnx" in capsys.readouterr().err
    assert not (tmp_path / "second" / "published").exists()


def test_a_run_without_its_checkpoints_is_whole(unpacking: ModuleType, folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / CHECKPOINTS)
    assert unpacking.main([str(folder), str(tmp_path / "target")]) == 0


ODD_NAMES = ["new\nline", "\x1b[2J", "-rf", "a\\b", "ünïcode", "nul\x00l", "tab\t", "quote'", "$(id)", "a:b", " "]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_is_refused(
    name: str, unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zip_folder(folder)
    with zipfile.ZipFile(path, "a") as archive:
        add_member(archive, f"profile/{name}")
    assert "is no name of a file in a run" in refuse(unpacking, path, capsys)
    if "\x00" not in name:
        (folder / name).write_text("")
        assert "is no name of a file in a run" in refuse(unpacking, folder, capsys)


def test_a_name_that_begins_with_a_zero_byte_is_refused(
    unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zip_folder(folder)
    with zipfile.ZipFile(path, "a") as archive:
        add_member(archive, "\0run.json")
    assert "is no name of a file in a run" in refuse(unpacking, path, capsys)


def test_a_member_that_calls_itself_what_is_no_text_is_refused(
    unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zip_folder(folder)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("run.json").header_offset
    content = bytearray(path.read_bytes())
    content[start + 7] |= 8  # the name is UTF-8
    content[start + 30] = 0xFF
    path.write_bytes(content)
    assert "run.json cannot be unpacked: 'utf-8' codec can't decode" in refuse(unpacking, path, capsys)


def test_a_name_that_is_no_text_is_refused(
    unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / os.fsdecode(b"\xff\xfe")).write_text("")
    assert "is no name of a file in a run" in refuse(unpacking, folder, capsys)


@pytest.mark.parametrize("name", ["../away", "/tmp/away", "a/../../away", "./run.json", "a//b", "..", "profile/"])
def test_a_way_out_of_the_folder_is_refused(
    name: str, unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zip_folder(folder)
    with zipfile.ZipFile(path, "a") as archive:
        add_member(archive, name + ("x/../y" if name.endswith("/") else ""))
    assert "is no name of a file in a run" in refuse(unpacking, path, capsys)
    assert not list(folder.parent.rglob("away")) and not Path("/tmp/away").exists()


def test_names_that_differ_by_case_alone_are_refused(
    unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "Run.json").write_text("{}")
    assert "differ by case alone" in refuse(unpacking, folder, capsys)
    (folder / "Run.json").unlink()
    (folder / "Published").mkdir()
    (folder / "Published" / "other").write_text("")
    assert "'Published' and 'published' differ by case alone" in refuse(unpacking, zip_folder(folder), capsys)


def test_a_name_twice_is_refused(unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = zip_folder(folder)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        add_member(archive, "run.json", b"{}")
    assert "holds 'run.json' twice" in refuse(unpacking, path, capsys)


@pytest.mark.parametrize("place", ["model.pth", "report.html", "profile/etc", "published/model.onnx"])
def test_a_link_is_refused(place: str, unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To a file of the same content, too: what it leads to may change after it was checked."""
    path = folder / place
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(folder.parent / "moved")
    path.symlink_to(folder.parent / "moved" if path.name.startswith("model") else "/etc")
    for artifact in (folder, zip_folder(folder)):
        assert f"'{place}' is a symbolic link; a published run has only files" in refuse(unpacking, artifact, capsys)


def test_a_pipe_a_socket_and_a_device_are_refused(
    unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(folder / "profile")
    assert "'profile' is no file" in refuse(unpacking, folder, capsys)
    (folder / "profile").unlink()
    for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFIFO):
        path = zip_folder(folder)
        with zipfile.ZipFile(path, "a") as archive:
            add_member(archive, "profile", kind=kind)
        assert "'profile' is no file" in refuse(unpacking, path, capsys)


def test_a_bomb_is_refused_before_it_is_unpacked(
    unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zip_folder(folder)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("profile/zeros", "w", force_zip64=True) as member:
            for _ in range(400):
                member.write(bytes(2**20))
    assert "no run shrinks so much" in refuse(unpacking, path, capsys)
    path = zip_folder(folder)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(unpacking.MAX_MEMBERS):
            archive.writestr(f"profile/{number}", b"")
    assert "holds more than 10,000 files" in refuse(unpacking, path, capsys)


@pytest.mark.parametrize("size", [0, -1, 2**31 + 1, 10**30])
def test_a_manifest_with_sizes_that_are_none_is_refused(
    size: int, unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reseal(folder, lambda files: files["model.pth"].update(size=size))
    for artifact in (folder, zip_folder(folder)):
        refuse(unpacking, artifact, capsys)


@pytest.mark.parametrize(
    "name",
    [".gitattributes", ".git/config", "-n", "../away", "/etc/hostname", "published/x", "manifest.json", "new\nline"],
)
def test_a_manifest_names_only_what_can_be_a_run_s(
    name: str, unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reseal(folder, lambda files: files.update({name: files["run.json"]}))
    line = refuse(unpacking, folder, capsys)
    assert "is not a file name with size and sha256" in line or "is no name of a file in a run" in line


@pytest.mark.parametrize("name", ["model.pth", "run.json", "published/model.onnx", "published/MODEL_CARD.md"])
def test_a_changed_or_missing_file_is_refused(
    name: str, unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((folder / name).read_bytes())
    content[10] ^= 1
    (folder / name).write_bytes(content)
    assert name in refuse(unpacking, folder, capsys)
    (folder / name).write_bytes(content + b"more")
    assert "has more than the" in refuse(unpacking, zip_folder(folder), capsys)
    (folder / name).unlink()
    assert Path(name).name in refuse(unpacking, folder, capsys)


def test_a_model_published_of_another_run_is_refused(
    unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "published" / "manifest.json"
    path.write_bytes(serialize_manifest(json.loads(path.read_text()) | {"run_manifest_digest": "0" * 64}))
    assert "was published from another run" in refuse(unpacking, folder, capsys)


@pytest.mark.parametrize("value", ["../../away", "", ".", "a/b", "-n", "ä", "x" * 101, None, 3])
def test_a_record_with_names_that_are_none_is_refused(
    value: object, unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((folder / "run.json").read_text()) | {"run_name": value}
    (folder / "run.json").write_text(json.dumps(record))
    shutil.rmtree(folder / "published")
    manifest = read_manifest(folder)
    (folder / "manifest.json").unlink()
    RunFolder(folder).finish(weights_digest=manifest["weights_digest"], chain_head=manifest["chain_head"])
    reason = "is no name of a folder that is committed" if isinstance(value, str) else "run.json is missing or damaged"
    assert reason in refuse(unpacking, folder, capsys)


@pytest.mark.parametrize("kind", ["nothing", "text", "torn", "empty"])
def test_what_is_no_artifact_is_refused(
    kind: str, unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder.parent / "run.zip"
    if kind == "text":
        path.write_text("text")
    elif kind == "torn":
        path.write_bytes(zip_folder(folder).read_bytes()[:-200])
    elif kind == "empty":
        zipfile.ZipFile(path, "w").close()
    assert ("holds no run.json" if kind == "empty" else "is no zip file") in refuse(unpacking, path, capsys)


def test_a_zip_whose_bytes_are_damaged_is_refused(
    unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zip_folder(folder)
    content = bytearray(path.read_bytes())
    for position in range(2000, len(content) - 4000, len(content) // 40):
        damaged = content.copy()
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        refuse(unpacking, path, capsys)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_is_compressed_in_another_way_is_refused(
    method: int, unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    content = bytearray(path.read_bytes())
    content[500:508] = bytes(8)  # whose damage a decoder would report by an error of its own
    path.write_bytes(content)
    assert "is compressed in another way than deflated" in refuse(unpacking, path, capsys)


# The script around it, in a clone.


@pytest.fixture(scope="module")
def clone(project_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    git = require_program("git")
    require_program("git-lfs")
    clone = tmp_path_factory.mktemp("import") / "clone"
    run_program(git, "clone", "--quiet", project_copy, clone, cwd=clone.parent)
    return clone


def import_run(clone: Path, artifact: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [clone / ".github" / "scripts" / "import_run.sh", artifact],
        cwd=clone.parent,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(clone), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def describe_clone(clone: Path) -> tuple[str, ...]:
    """Describe all that an import may change."""
    git = require_program("git")
    words = (("rev-parse", "HEAD"), ("status", "--porcelain", "--ignored"), ("ls-files", "--stage", "experiments"))
    return *(run_program(git, *line, cwd=clone) for line in words), str(sorted(list_files(clone / "experiments")))


def test_an_import_that_fails_at_any_point_leaves_the_repository_as_it_was(clone: Path, folder: Path) -> None:
    git = require_program("git")
    before = describe_clone(clone)

    def expect(words: str) -> None:
        result = import_run(clone, folder)
        assert result.returncode != 0 and words in result.stderr, result.stderr
        assert describe_clone(clone) == before

    expect("git-lfs is not set up here; run: git lfs install")
    run_program(git, "lfs", "install", "--local", cwd=clone)
    before = describe_clone(clone)
    (folder / "profile").symlink_to("/etc")
    expect("error: 'profile' is a symbolic link; a published run has only files")
    (folder / "profile").unlink()

    hook = clone / ".git" / "hooks" / "pre-commit"  # what is added is not committed
    hook.write_text("#!/bin/sh\necho refused >&2\nexit 1\n")
    hook.chmod(0o755)
    expect("refused")
    hook.unlink()

    (clone / "experiments" / "experiment").symlink_to(folder.parent)
    before = describe_clone(clone)
    expect("experiments/experiment is a symbolic link")
    (clone / "experiments" / "experiment").unlink()


def test_only_files_of_manifests_are_committed(clone: Path, folder: Path) -> None:
    git = require_program("git")
    run_program(git, "lfs", "install", "--local", cwd=clone)
    expected = {name for name in list_files(folder) if not name.startswith(f"{CHECKPOINTS}/")}
    (folder / "report.html").write_text("<script>")
    result = import_run(clone, zip_folder(folder))
    assert result.returncode == 0, result.stderr
    assert result.stderr == "left behind, as no manifest names it: report.html\n"
    assert result.stdout == "experiment/run/model.pth\n"
    listed = run_program(git, "ls-tree", "-r", "--name-only", "HEAD", "experiments/experiment/run", cwd=clone)
    committed = {name.removeprefix("experiments/experiment/run/") for name in listed.split()}
    assert {name for name in committed if not name.startswith(f"{CHECKPOINTS}/")} == expected
    assert verify_files(clone / "experiments" / "experiment" / "run") == ()
    assert run_program(git, "status", "--porcelain", cwd=clone) == ""


def test_a_device_in_a_folder_is_refused(
    unpacking: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        os.mknod(folder / "profile", 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    except PermissionError as error:
        report_lack(f"this process may not make a device: {error}")
    assert "'profile' is no file" in refuse(unpacking, folder, capsys)
