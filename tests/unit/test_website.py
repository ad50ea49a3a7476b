"""The site of the documentation: pictures from their sources, a reference that is complete, links that hold."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from PIL import Image

from image_classifier.cli.command import ExitStatus
from image_classifier.cli.commands import COMMANDS, iterate_parsers
from image_classifier.kernels.builder import LIBRARIES, get_library_names, get_target
from tests.conftest import PROJECT
from tests.documents import DOCUMENTS, list_run_files
from website import dashboards, hooks, prose, recording, reference
from website.pictures import FOLDER, build_pictures


def read_nav() -> list[str]:
    """Read the pages that mkdocs.yml names."""
    text = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8")
    return re.findall(r"^ +- [^#\n]+: (\S+\.md)$", text[text.index("\nnav:") :], flags=re.MULTILINE)


@pytest.mark.parametrize("name", build_pictures())
def test_each_picture_is_what_its_source_says(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text == build_pictures()[name]
    ElementTree.fromstring(text)


def test_a_picture_follows_the_colour_scheme_and_has_a_name_for_those_who_do_not_see_it() -> None:
    for path in [*FOLDER.glob("*.yaml"), FOLDER / "training.svg"]:
        text = path.with_suffix(".svg").read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in text and "<title" in text, path


def test_the_recording_is_of_the_commands_that_the_script_runs() -> None:
    text = (FOLDER / "training.svg").read_text(encoding="utf-8")
    shown = " ".join(re.findall(r'<text class="command[^>]*>([^<]*)</text>', text)).replace("\\", "")
    assert shown.split() == " ".join(f"$ image_classifier {command}" for command in recording.COMMANDS).split()
    assert 'class="verdict' in text and ">IDENTICAL<" in text and "prefers-reduced-motion" in text


def test_what_a_carriage_return_writes_over_was_shown_until_then() -> None:
    lines = recording.lay_out([(1.0, "10 %"), (2.0, "\r20 %"), (3.0, "\r\ndone\r\n")], 5, 0.5)
    assert [(line.row, line.text, line.begins_s, line.ends_s) for line in lines] == [
        (5, "10 %", 1.5, 2.5),
        (5, "20 %", 2.5, None),
        (6, "done", 3.5, None),
    ]


@pytest.mark.parametrize("name", dashboards.NAMES)
def test_the_picture_of_a_dashboard_is_of_the_one_that_grafana_gets(name: str) -> None:
    with Image.open(FOLDER / f"dashboard_{name}.png") as picture:
        source = picture.info["Source"]
    assert source == dashboards.compute_digest(json.loads((dashboards.DASHBOARDS / f"{name}.json").read_text()))


def test_a_dashboard_is_drawn_with_each_of_its_panels_where_grafana_has_it() -> None:
    dashboard = json.loads((dashboards.DASHBOARDS / "business.json").read_text())
    queries = list(dashboards.list_queries(dashboard, 60))
    assert len(queries) >= len(dashboard["panels"]) and not any("$__" in query for _, query, _ in queries)
    series = [{"metric": {"name": "lenet"}, "values": [[100 + step, str(step)] for step in range(3)]}]
    answers = [(index, legend, series if index % 2 else []) for index, _, legend in queries]
    figure = dashboards.draw(dashboard, answers, 100)
    titles = [dashboard["title"], *(panel["title"] for panel in dashboard["panels"])]
    assert [text.get_text() for text in figure.texts] == titles
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts[0] == ["No data"] and texts[1] == ["lenet {{version}}, run {{run_name}}"] and texts[3] == ["2"]


def test_every_option_of_every_command_has_its_place_in_the_reference() -> None:
    pages = reference.build_options() + reference.build_commands()
    missing = [
        (parser.prog, name)
        for parser in iterate_parsers()
        for name in reference.list_parser_options(parser)
        if f"| `{name}` |" not in pages
    ]
    assert not missing


def test_every_option_of_the_trainer_has_its_type_its_default_and_its_meaning() -> None:
    page = reference.build_options()
    (trainer,) = (parser for parser in iterate_parsers() if parser.prog == "image_classifier_trainer")
    for name in reference.list_parser_options(trainer):
        (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", page, flags=re.MULTILINE)
        assert len(row.rpartition(" | ")[2]) > 5, row
    assert "| `--learning_rate` | a number | 0.24 |" in page
    assert "| `--image_sizes` | whole numbers such as 16,24 | 16,16,24,32,32,32,32,32 |" in page


def test_every_command_and_exit_status_has_its_row() -> None:
    page = reference.build_commands()
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)[: len(COMMANDS)] == list(COMMANDS)
    assert {parser.prog for parser in iterate_parsers()} == set(re.findall(r"^## (image.+)$", page, flags=re.MULTILINE))
    statuses = page[page.index("## Exit statuses") :]
    assert re.findall(r"^\| (\d+)", statuses, flags=re.MULTILINE) == [str(int(status)) for status in ExitStatus]


def test_the_files_of_a_run_are_those_of_the_documentation(tmp_path: Path) -> None:
    run = reference.make_tiny_run(tmp_path)
    assert {path.name for path in run.iterdir()} == {name.rstrip("/") for name in list_run_files()}
    keys = {name for name, _, _ in reference.list_keys({"a": {"b": [{"c": 1}]}, "distributions": {"x": "1", "y": "2"}})}
    assert keys == {"a.b[].c", "distributions.x"}


def test_every_file_of_the_package_says_what_it_is_for() -> None:
    built = {*get_library_names(get_target()).values(), LIBRARIES}
    real = {path.relative_to(PROJECT).as_posix() for path in reference.PACKAGE.rglob("*.*")}
    real = {name for name in real if Path(name).name not in built and "__pycache__" not in name}
    real = {name for name in real if not name.endswith("/__init__.py") or name.count("/") == 1}
    shown: dict[str, str] = {}
    for section in re.split(r"^### ", reference.build_layout(), flags=re.MULTILINE)[1:]:
        folder = section.partition("\n")[0]
        shown |= {folder + name: text for name, text in re.findall(r"^\| `(.+)` \| (.+) \|$", section, re.MULTILINE)}
    assert shown.keys() == real
    assert not [name for name, text in shown.items() if len(text) < 10 or not text.endswith(".")]


def test_every_route_of_the_server_is_in_the_reference() -> None:
    page = reference.build_http()
    assert "## POST /predict" in page and "| `top_k` | query |" in page and "| 429 |" in page
    document = json.loads(reference.OPENAPI.read_text(encoding="utf-8"))
    assert set(re.findall(r"^## [A-Z]+ (/.*)$", page, flags=re.MULTILINE)) == document["paths"].keys()
    assert set(re.findall(r"^### (\w+)$", page, flags=re.MULTILINE)) == document["components"]["schemas"].keys()
    assert "| `probability` | number | yes |" in page and "list of [Score](#score)" in page


def test_every_page_is_in_the_navigation_and_every_mark_is_filled() -> None:
    docs = PROJECT / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    nav = set(read_nav())
    assert pages - nav == set(), "pages without a place in mkdocs.yml"
    assert {name for name in nav if not name.startswith("project/")} - {"index.md"} == pages
    marks = [mark for path in docs.rglob("*.md") for mark in hooks.GENERATED.findall(path.read_text(encoding="utf-8"))]
    assert sorted(marks) == sorted(reference.build_parts())


def test_links_out_of_the_pages_lead_to_copies_in_the_site() -> None:
    page = PROJECT / "docs" / "ci.md"
    text = (
        "[a](../docker/Dockerfile) [b](serving.md#see) [c](https://example.org) ![d](../benchmarks/results/speed.png)"
    )
    assert hooks.rewrite_links(text, page) == (
        "[a](project/docker/Dockerfile) [b](serving.md#see) [c](https://example.org) "
        "![d](project/benchmarks/results/speed.png)"
    )
    assert hooks.rewrite_links("[x](docs/ci.md)\n```\n[x](docs/ci.md)\n```\n", hooks.README) == (
        "[x](ci.md)\n```\n[x](docs/ci.md)\n```\n"
    )
    assert hooks.rewrite_links("[r](../README.md)", PROJECT / "data" / "README.md") == "[r](../../index.md)"


def test_a_link_to_a_file_that_is_not_there_ends_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "PROJECT", tmp_path)
    monkeypatch.setattr(hooks, "README", tmp_path / "README.md")
    monkeypatch.setattr(hooks, "PAGES", ())
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("[page](docs/page.md) [more](MORE.md)", encoding="utf-8")
    (tmp_path / "MORE.md").write_text("[back](README.md)", encoding="utf-8")
    page = tmp_path / "docs" / "page.md"
    page.write_text("[more](../MORE.md) [address](https://example.org)", encoding="utf-8")
    assert hooks.find_copies([page]) == {tmp_path / "README.md", tmp_path / "MORE.md"}
    page.write_text("[gone](../GONE.md)", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"docs/page\.md links to \.\./GONE\.md, which is not there"):
        hooks.find_copies([page])


def test_the_site_asks_no_other_host() -> None:
    config = yaml.load((PROJECT / "mkdocs.yml").read_text(encoding="utf-8").replace("!ENV", ""), yaml.SafeLoader)
    assert config["theme"]["font"] is False and config["strict"] is True
    assert not [value for key in ("extra_css", "extra_javascript") for value in config.get(key, []) if "//" in value]


def test_help_texts_and_documents_are_in_short_sentences() -> None:
    texts = {
        f"{parser.prog} {name}": (action.help or "").partition("{")[0]
        for parser in iterate_parsers()
        for name, action in reference.list_parser_options(parser).items()
    }
    texts |= {parser.prog: parser.description or "" for parser in iterate_parsers()}
    faults = [f"{name}: {fault}" for name, text in texts.items() for _, fault in prose.find_faults(text)]
    names = [path.relative_to(PROJECT).as_posix() for path in DOCUMENTS]
    for name in names:
        if name not in prose.UNCHECKED:
            text = (PROJECT / name).read_text(encoding="utf-8")
            faults += [f"{name}:{number}: {fault}" for number, fault in prose.find_faults(text)]
    assert not faults, "\n".join(faults)


def test_the_check_of_prose_finds_long_sentences_and_words_to_avoid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "one " * 26
    document = tmp_path / "page.md"
    document.write_text(
        f"# Title\n\nShort. {long.strip().capitalize()}.\n\n```bash\n{long}\n```\n\n| a | {long}|\n|---|---|\n"
        f"| {'one ' * 20}; {'two ' * 20} | b |\n\n- We do it in order to\n  test.\n\n"
        f"<!-- x -->\n{long}\n<!-- end -->\n",
        encoding="utf-8",
    )
    assert prose.main([str(document)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix(f"{document}:").partition(": ")[0] for line in lines] == ["3", "9", "13"]
    assert "26 words" in lines[0] and "avoid 'in order to' (to)" in lines[2]
    assert prose.main([]) == 0
    assert prose.count_words(prose.split_sentences("Use `a b c` or [two words](link).")[0]) == 5
