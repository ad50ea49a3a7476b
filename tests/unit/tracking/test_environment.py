"""What a run's environment was made of: the same for a wheel and for what was installed of it."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from image_classifier.errors import RunError
from image_classifier.tracking import environment
from image_classifier.tracking.environment import (
    compute_files_digest,
    describe_installation,
    find_closure,
    list_installed_files,
    list_wheel_files,
    parse_lock,
)
from image_classifier.tracking.identity import describe_code, describe_environment
from image_classifier.tracking.reading import read_environment
from tests.conftest import PROJECT

WHEEL = """\
tool/__init__.py,sha256=aaa,1
tool-1.0.data/purelib/tool/more.py,sha256=bbb,1
"tool-1.0.data/data/share/a, b.txt",sha256=ccc,1
tool-1.0.data/data/bin/helper,sha256=ddd,1
tool-1.0.data/scripts/run,sha256=eee,1
tool-1.0.data/headers/tool.h,sha256=fff,1
tool-1.0.dist-info/METADATA,sha256=ggg,1
tool-1.0.dist-info/RECORD,,
"""
INSTALLED = """\
"../../../share/a, b.txt",sha256=ccc,1
../../../bin/helper,sha256=ddd,1
../../../bin/run,sha256=xxx,2
../../../bin/entry,sha256=yyy,2
../../../include/site/python3.11/tool/tool.h,sha256=fff,1
tool-1.0.dist-info/INSTALLER,sha256=zzz,4
tool-1.0.dist-info/METADATA,sha256=ggg,1
tool-1.0.dist-info/RECORD,,
tool-1.0.dist-info/REQUESTED,sha256=zzz,0
tool-1.0.dist-info/direct_url.json,sha256=zzz,0
tool/__init__.py,sha256=aaa,1
tool/__pycache__/__init__.cpython-311.pyc,,
tool/more.py,sha256=bbb,1
"""


def test_a_wheel_and_what_was_installed_of_it_have_the_same_files() -> None:
    files = sorted(list_wheel_files(WHEEL))
    assert files == sorted(list_installed_files(INSTALLED)) and len(files) == 4
    assert ("data/share/a, b.txt", "sha256=ccc") in files
    digest = compute_files_digest(files)
    assert digest == compute_files_digest(reversed(files))
    for old, new in (("aaa", "aab"), ("tool/__init__", "tool/other"), ("ccc", "ccd")):
        assert compute_files_digest(list_wheel_files(WHEEL.replace(old, new))) != digest


def test_the_lock_is_read_with_all_its_hashes() -> None:
    text = (PROJECT / "requirements" / "requirements-prod.txt").read_text(encoding="utf-8")
    locked = parse_lock(text)
    assert len(locked) == len(re.findall("^[a-z0-9].*==", text, re.MULTILINE))
    assert sum(map(len, locked.values())) == text.count("--hash=sha256:")
    assert ("torch", re.findall(r"^torch==(\S+)", text, re.MULTILINE)[0]) in locked


def test_what_is_installed_is_named_with_files_and_wheels() -> None:
    described = describe_installation(describe_code())
    versions = {name: facts["version"] for name, facts in described["distributions"].items()}
    of_record = describe_environment()["distributions"]
    assert versions.items() >= of_record.items()  # and what they need of extras, such as torch's CUDA libraries
    assert versions["numpy"] == importlib.metadata.version("numpy") and "pytest" not in versions
    assert all(len(facts["files"]) == 64 for facts in described["distributions"].values())
    assert described["distributions"]["numpy"]["wheels"]


def test_only_the_locked_version_has_the_hashes_of_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"numpy==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(environment, "find_lock", lambda: lock)
    described = describe_installation(describe_code())
    assert described["distributions"]["numpy"]["wheels"] == []
    lock = tmp_path / "other.txt"
    lock.write_text(f"numpy=={importlib.metadata.version('numpy')} \\\n    --hash=sha256:{'0' * 64}\n    # via x\n")
    described = describe_installation(describe_code())
    assert described["distributions"]["numpy"]["wheels"] == ["0" * 64]


def test_the_closure_follows_extras_and_markers() -> None:
    needs = {
        "top": ["Middle[fast] >= 1; python_version < '3.12'", "absent; sys_platform == 'none'", "missing"],
        "middle": ["leaf", "speed; extra == 'fast'", "other; extra == 'slow'"],
        "leaf": ["top"],
        "speed": [],
        "other": [],
        "absent": [],
    }
    assert find_closure(["Top"], needs.get, {"python_version": "3.11"}) == {"top", "middle", "leaf", "speed"}
    assert find_closure(["top"], needs.get, {"python_version": "3.12"}) == {"top"}


def test_a_run_without_this_record_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no environment\.json: it is of a version that did not keep"):
        read_environment(tmp_path)
