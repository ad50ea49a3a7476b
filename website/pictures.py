"""Draw the pictures of the documentation from their text sources, and the badges from pyproject.toml.

    python -m website.pictures

Each `docs/pictures/<name>.yaml` has a title, boxes on a grid and arrows, and becomes `<name>.svg` beside it. A picture
has a background of its own and follows the reader's colour scheme, so it is legible on light and dark pages.
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / "docs" / "pictures"
MARGIN = 24
BADGE_HEIGHT = 20
CHARACTER = 6.6
"""Width in pixels of a character in a badge."""

STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de; }
  .data { fill: #e8f1fb; stroke: #1f5fa8; }
  .work { fill: #f4f4f4; stroke: #6e7781; }
  .proof { fill: #fdf1e3; stroke: #b5541c; }
  text { font-family: system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328; }
  .title { font-size: 15px; font-weight: 600; }
  .line { font-size: 12.5px; }
  .label { font-size: 12px; fill: #57606a; }
  .arrow { stroke: #57606a; stroke-width: 1.5; fill: none; }
  .head { fill: #57606a; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #30363d; }
    .data { fill: #10233a; stroke: #6cb0f5; }
    .work { fill: #1c2128; stroke: #8b949e; }
    .proof { fill: #2f1f10; stroke: #f0a868; }
    text { fill: #e6edf3; }
    .label { fill: #9da7b1; }
    .arrow { stroke: #9da7b1; }
    .head { fill: #9da7b1; }
  }
"""


def draw(source: dict[str, Any]) -> str:
    """Draw a picture: boxes of one size on a grid, and straight arrows between them."""
    width, height = source["box"]
    gap_x, gap_y = source["gap"]
    places = {
        name: (MARGIN + box["at"][0] * (width + gap_x), MARGIN + box["at"][1] * (height + gap_y))
        for name, box in source["boxes"].items()
    }
    right = round(max(x for x, _ in places.values()) + width + MARGIN)
    bottom = round(max(y for _, y in places.values()) + height + MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom}" width="{right}" height="{bottom}" '
        'role="img" aria-labelledby="title">',
        f'<title id="title">{escape(source["title"])}</title>',
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="head" d="M0 0 8 4 0 8z"/></marker>',
        f'<rect class="page" x="0.5" y="0.5" width="{right - 1}" height="{bottom - 1}" rx="8"/>',
    ]
    for arrow in source["arrows"]:
        names, _, label = arrow.partition(": ")
        start, end = names.split(" -> ")
        parts += _draw_arrow(places[start], places[end], width, height, label)
    for name, box in source["boxes"].items():
        parts += _draw_box(*places[name], width, height, box)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_box(x: float, y: float, width: float, height: float, box: dict[str, Any]) -> list[str]:
    lines = box.get("lines", [])
    top = y + (height - 18 * len(lines)) / 2 + 5
    texts = [_draw_text(x + width / 2, top, box["title"], "title")]
    texts += [_draw_text(x + width / 2, top + 18 * number, line, "line") for number, line in enumerate(lines, 1)]
    kind = box.get("kind", "work")
    return [f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="6"/>', *texts]


def _draw_text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="middle">{escape(text)}</text>'


def _draw_arrow(
    start: tuple[float, float], end: tuple[float, float], width: float, height: float, label: str
) -> list[str]:
    """Draw from the middle of the side that faces the other box; the label stands over the line or right of it."""
    (x1, y1), (x2, y2) = start, end
    if x1 == x2:
        x1, x2 = x1 + width / 2, x2 + width / 2
        y1, y2 = (y1 + height, y2) if y1 < y2 else (y1, y2 + height)
        text = f'<text class="label" x="{x1 + 8:g}" y="{(y1 + y2) / 2 + 4:g}">{escape(label)}</text>'
    else:
        x1, x2 = (x1 + width, x2) if x1 < x2 else (x1, x2 + width)
        y1, y2 = y1 + height / 2, y2 + height / 2
        text = _draw_text((x1 + x2) / 2, (y1 + y2) / 2 - 8, label, "label")
    line = f'<line class="arrow" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" marker-end="url(#head)"/>'
    return [line, *([text] if label else [])]


def draw_badge(name: str, value: str) -> str:
    """Draw a badge: dark text on light beside white on blue, each with a contrast of 7 and more."""
    left, right = (round(len(text) * CHARACTER + 14) for text in (name, value))
    font = 'font-family="\'DejaVu Sans\', Verdana, sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="{BADGE_HEIGHT}" role="img" '
        f'aria-label="{escape(name)}: {escape(value)}">\n'
        f'<rect width="{left + right}" height="{BADGE_HEIGHT}" rx="4" fill="#174a85"/>\n'
        f'<path d="M4 0h{left - 4}v{BADGE_HEIGHT}h-{left - 4}a4 4 0 0 1-4-4v-{BADGE_HEIGHT - 8}a4 4 0 0 1 4-4z" '
        'fill="#e4e7eb"/>\n'
        f'<text x="{left / 2:g}" y="14" text-anchor="middle" fill="#1f2328" {font}>{escape(name)}</text>\n'
        f'<text x="{left + right / 2:g}" y="14" text-anchor="middle" fill="#ffffff" {font}>{escape(value)}</text>\n'
        "</svg>\n"
    )


def build_badges() -> dict[str, str]:
    """Build the badges by file name: what pyproject.toml says, and holds the project to."""
    content = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    project, tool = content["project"], content["tool"]
    prefix = "Programming Language :: Python :: 3."
    minors = [name.removeprefix(prefix) for name in project["classifiers"] if name.startswith(prefix)]
    badges = {
        "python": " | ".join(f"3.{minor}" for minor in minors),
        "license": project["license"],
        "types": "mypy --strict" if tool["mypy"]["strict"] else "mypy",
        "coverage": f"{tool['coverage']['report']['fail_under']} % or more",
    }
    return {f"badge_{name}.svg": draw_badge(name, value) for name, value in badges.items()}


def build_pictures() -> dict[str, str]:
    """Build all pictures and badges by file name."""
    sources = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}
    return {f"{name}.svg": draw(source) for name, source in sources.items()} | build_badges()


if __name__ == "__main__":
    for name, text in build_pictures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
