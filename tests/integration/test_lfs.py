"""A run in Git: its weights and pictures go to Git LFS, and one of them can be fetched alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.conftest import PROJECT, require_program, run_program

POINTER = b"version https://git-lfs.github.com/spec/v1\n"


def test_a_run_is_pushed_and_one_file_of_it_is_pulled_back(tmp_path: Path, trained_run: Path) -> None:
    git = require_program("git")
    require_program("git-lfs")
    work, remote, clone = tmp_path / "work", tmp_path / "remote.git", tmp_path / "clone"
    run = work / "experiments" / "cifar" / "first"
    run.parent.mkdir(parents=True)
    shutil.copytree(trained_run, run)
    for name in (".gitattributes", ".gitignore"):
        shutil.copy(PROJECT / name, work)
    run_program(git, "init", "--quiet", "--bare", remote, cwd=tmp_path)
    run_program(git, "init", "--quiet", cwd=work)
    run_program(git, "lfs", "install", "--local", cwd=work)
    run_program(git, "add", "--all", cwd=work)
    run_program(git, "commit", "--quiet", "--message=A run", cwd=work)
    run_program(git, "push", "--quiet", remote.as_uri(), "HEAD:refs/heads/main", cwd=work)

    run_program(git, "clone", "--quiet", "--branch=main", remote.as_uri(), clone, cwd=tmp_path, GIT_LFS_SKIP_SMUDGE="1")
    pulled = clone / run.relative_to(work)
    names = {path.relative_to(pulled).as_posix() for path in pulled.rglob("*") if path.is_file()}
    pointers = {name for name in names if (pulled / name).read_bytes().startswith(POINTER)}
    assert names == {path.relative_to(trained_run).as_posix() for path in trained_run.rglob("*") if path.is_file()}
    assert pointers == {name for name in names if name.endswith((".pth", ".png"))} >= {"model.pth", "metrics.png"}

    run_program(git, "lfs", "install", "--local", cwd=clone)
    run_program(git, "lfs", "pull", "--include", "experiments/cifar/first/model.pth", cwd=clone)
    assert (pulled / "model.pth").read_bytes() == (trained_run / "model.pth").read_bytes()
    assert (pulled / "metrics.png").read_bytes().startswith(POINTER)
    for name in names - pointers:
        assert (pulled / name).read_bytes() == (trained_run / name).read_bytes(), name
