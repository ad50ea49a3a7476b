"""The job summary: Markdown comes out, whatever is in the run's folder."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import PROJECT
from tests.runs import write_run

SCRIPT = PROJECT / ".github" / "scripts" / "summarize.py"
summarize: Callable[..., str] = runpy.run_path(str(SCRIPT))["summarize"]

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["a|b", "```", "`", "\n## Heading", "<script>", '"', "\x1b[31m", "%%", "a\n```\nb", "", " ", "é"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def check_markdown(summary: str) -> None:
    """Check that tables have their columns, charts their lines, and that nothing foreign is outside of code."""
    outside, charts = [], []
    lines = iter(summary.split("\n"))
    for line in lines:
        if fence := re.match("`{3,}", line):
            block = []
            for inner in lines:
                if inner == fence[0]:
                    break
                block.append(inner)
            else:
                pytest.fail(f"a block has no end:\n{summary}")
            if line == "```mermaid":
                charts.append(block)
        else:
            outside.append(line)
    for chart in charts:
        assert [line.split()[0] for line in chart[:4]] == ["xychart-beta", "title", "x-axis", "y-axis"]
        assert len(chart) == 5 and chart[4].split()[0] in ("line", "bar"), chart
        labels = re.fullmatch(r"    x-axis (?:epoch|class) \[(.*)\]", chart[2])
        heights = re.fullmatch(r"    (?:line|bar) \[(.*)\]", chart[4])
        assert labels and heights
        assert len(re.findall(r'"[^"\\]*"', labels[1])) == len([float(height) for height in heights[1].split(", ")])
    for line in outside:
        bare = re.sub(r"(`+) ?.*?(?<!`)\1(?!`)", "", line)
        assert "<script" not in bare and line.isprintable(), line
        if line.startswith("|"):
            assert re.sub(r"\\\|", "", line).count("|") in (3, 4), line


def test_a_finished_run_is_summarized(tmp_path: Path) -> None:
    run = write_run(tmp_path, classes=("cat", "dog"), num_epochs=2)
    summary = summarize(run)
    check_markdown(summary)
    assert summary.startswith(f"## `experiment/run`\n\nFinished. Weights `{'0' * 64}`.\n\n```mermaid")
    assert 'x-axis class ["cat", "dog"]' in summary and "Without test images" not in summary
    assert "| data | `cifar10`, 50,000 + 400 images | `" in summary
    assert "damaged" not in summary


def test_a_class_without_test_images_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, classes=("cat", "dog", "a|b"), num_images=2)
    summary = summarize(run)
    check_markdown(summary)
    assert "Without test images: `a|b`." in summary and 'x-axis class ["cat", "dog"]' in summary


def test_a_run_that_was_interrupted_is_summarized(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_epochs=3)
    for name in ("manifest.json", "evaluation.json"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-20])
    summary = summarize(run)
    check_markdown(summary)
    assert "Stopped after 2 of 3 epochs, and saved" in summary and "damaged" not in summary


def test_the_comparison_cannot_end_its_block(tmp_path: Path) -> None:
    (tmp_path / "comparison").write_text("a\n```\n<script>\n````\nb")
    summary = summarize(write_run(tmp_path), tmp_path / "comparison", "https://example.org/run")
    check_markdown(summary)
    assert "`````\na\n```\n<script>\n````\nb\n`````" in summary


NAMES = ("run.json", "evaluation.json", "metrics.jsonl", "manifest.json")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_markdown_comes_out_whatever_is_in_the_files(tmp_path: Path, data: st.DataObject) -> None:
    """Values are replaced by others at any place; some files are empty, cut short, noise, or not there."""
    if not (tmp_path / "experiment").exists():
        write_run(tmp_path, classes=("cat", "dog"), num_epochs=2)
    run = tmp_path / "changed"
    run.mkdir(exist_ok=True)
    for name in NAMES:
        content = (tmp_path / "experiment" / "run" / name).read_bytes()
        how = data.draw(st.sampled_from(["changed"] * 6 + ["empty", "cut", "noise", "missing", "as it is"]))
        if how == "changed":
            parsed = (
                [json.loads(line) for line in content.splitlines()] if name.endswith("l") else [json.loads(content)]
            )
            for document in parsed:
                replace_somewhere(document, data)
            content = b"\n".join(json.dumps(document).encode() for document in parsed) + b"\n"
        elif how != "as it is":
            cut = content[: data.draw(st.integers(0, len(content)))]
            content = {"empty": b"", "cut": cut, "noise": data.draw(st.binary(max_size=50)), "missing": b""}[how]
        (run / name).write_bytes(content)
        if how == "missing":
            (run / name).unlink()
    check_markdown(summarize(run))


def replace_somewhere(document: Any, data: st.DataObject) -> None:
    """Replace a value at some place, or its name."""
    keys = list(document) if isinstance(document, dict) else range(len(document))
    if not keys:
        return
    key: Any = data.draw(st.sampled_from(list(keys)))
    inner = document[key]
    if isinstance(inner, (dict, list)) and data.draw(st.booleans()):
        replace_somewhere(inner, data)
    elif isinstance(document, dict) and data.draw(st.booleans()):
        document[data.draw(TEXTS)] = document.pop(key)
    else:
        document[key] = data.draw(VALUES)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"[" * 100_000, b'{"data": ' + b"[" * 980 + b"]" * 980 + b"}", b"\xff"]
)
def test_a_record_that_is_none_leaves_a_summary_that_says_so(content: bytes, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "run.json").write_bytes(content)
    result = subprocess.run([sys.executable, SCRIPT, run], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    check_markdown(result.stdout.rstrip("\n"))
    assert "`run.json`" in result.stdout or content.startswith(b"{")
