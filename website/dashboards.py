"""Draw Grafana's dashboards of docs/monitoring with the data of a real Prometheus, which watches a real server.

    python -m website.dashboards --run EXPERIMENTS/benchmark/notebook --shadow EXPERIMENTS/benchmark/fast

Both runs must be published. For six minutes, clients send images of the test set: first a few, then many, then
darkened ones. Some send wrong input or a wrong key. Then each panel's queries are asked, and drawn where the dashboard
has the panel. Writes `docs/pictures/dashboard_technical.png` and `dashboard_business.png`. Needs Debian's prometheus.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image

from benchmarks.serving import KEY, load_images, serving
from website.pictures import FOLDER, PROJECT

DASHBOARDS = PROJECT / "docs" / "monitoring" / "grafana"
NAMES = ("technical", "business")
SCRAPE_S, RATE_S, STEP_S = 1, 15, 3
PHASES = ((120.0, 4, 1.0), (120.0, 48, 1.0), (120.0, 4, 0.5))
"""Seconds, clients, and brightness of the images, one phase after the other."""

GRID_COLUMNS, WIDTH_INCHES, UNIT_INCHES, TITLE_INCHES = 24, 14, 0.34, 0.45
COLORS = ("#3274d9", "#e0752d", "#37872d", "#8f3bb8", "#c4162a", "#b58900", "#008b8b", "#7b5e57", "#d33682", "#586e75")

Series = list[dict[str, Any]]
Line = tuple[str, list[Any]]
"""Legend of a line, and its values with their times, as Prometheus gives them."""


def compute_digest(dashboard: dict[str, Any]) -> str:
    """Compute the digest of what a picture shows of a dashboard: all but the descriptions."""
    panels = [{key: value for key, value in panel.items() if key != "description"} for panel in dashboard["panels"]]
    return hashlib.sha256(json.dumps([dashboard["title"], panels], sort_keys=True).encode()).hexdigest()


def list_queries(dashboard: dict[str, Any], range_s: float) -> Iterator[tuple[int, str, str]]:
    """List each panel's index, queries and legends, with Grafana's variables filled in."""
    for index, panel in enumerate(dashboard["panels"]):
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", f"{RATE_S}s").replace("$__range", f"{round(range_s)}s")
            yield index, text, target.get("legendFormat", "")


def fill_legend(template: str, labels: dict[str, str]) -> str:
    """Fill the labels of a series into a legend."""
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def format_value(value: float, unit: str) -> str:
    """Format a value with the unit that a panel gives it."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if abs(value) >= 0.001 else "0"
    return number + {"reqps": " req/s", "cps": "/s"}.get(unit, "")


def draw(dashboard: dict[str, Any], answers: Sequence[tuple[int, str, Series]], start_s: float) -> Figure:
    """Draw a dashboard.

    Args:
        answers: index of a panel, legend, and what Prometheus answered to a query over the range.
        start_s: when the range began; the axes show minutes since then.
    """
    panels = dashboard["panels"]
    height = UNIT_INCHES * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) + TITLE_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), facecolor="#f4f5f5")
    figure.text(0.008, 1 - 0.6 * TITLE_INCHES / height, dashboard["title"], weight="bold", size=12)
    for index, panel in enumerate(panels):
        lines = [
            (fill_legend(legend, each["metric"]), each["values"])
            for at, legend, series in answers
            if at == index
            for each in series
        ]
        place = panel["gridPos"]
        unit = WIDTH_INCHES / GRID_COLUMNS
        left, width = place["x"] * unit, place["w"] * unit
        bottom = height - TITLE_INCHES - UNIT_INCHES * (place["y"] + place["h"])
        box = (left + 0.06, bottom + 0.06, width - 0.12, UNIT_INCHES * place["h"] - 0.12)
        draw_panel(figure, panel, box, lines, start_s)
    return figure


def draw_panel(
    figure: Figure, panel: dict[str, Any], box: tuple[float, ...], lines: Sequence[Line], start_s: float
) -> None:
    """Draw a panel into a box of a figure: left, bottom, width and height in inches."""
    figure_width, figure_height = figure.get_size_inches()

    def scale(left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
        return left / figure_width, bottom / figure_height, width / figure_width, height / figure_height

    left, bottom, width, height = box
    figure.add_artist(Rectangle(scale(*box)[:2], *scale(*box)[2:], facecolor="white", edgecolor="#e4e7ea", zorder=-1))
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    if panel["type"] == "stat":
        axes = figure.add_axes(scale(left, bottom, width, height - 0.3))
        axes.set_axis_off()
        text = describe_latest(panel, lines, unit)
        size = 22 if len(text) < 15 else 9
        axes.text(0.5, 0.55, text, ha="center", va="center", size=size, color="#1f60c4")
    else:
        axes = figure.add_axes(scale(left + 0.85, bottom + 0.6, width - 1.05, height - 0.95))
        draw_lines(axes, lines, unit, start_s)
    figure.text(*scale(left + 0.1, bottom + height - 0.22, 0, 0)[:2], panel["title"], size=9, weight="bold")


def draw_lines(axes: Axes, lines: Sequence[Line], unit: str, start_s: float) -> None:
    """Draw what was measured over the range, one line a series."""
    axes.grid(color="#e4e7ea")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=6, labelsize=8, labelcolor="#52545c")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, unit)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")
    axes.set_xlim(0, sum(seconds for seconds, _, _ in PHASES) / 60)
    if not lines:
        axes.text(0.5, 0.5, "No data", ha="center", va="center", transform=axes.transAxes, color="#8e8e8e")
        return
    for number, (name, values) in enumerate(lines):
        minutes = [(float(at) - start_s) / 60 for at, _ in values]
        axes.plot(minutes, [float(value) for _, value in values], color=COLORS[number], lw=1.3, label=name)
    shown = [float(value) for _, values in lines for _, value in values if value != "NaN"]
    if shown and min(shown) >= 0:
        axes.set_ylim(0, 1.1 * max(shown) or 1)
    style = {"fontsize": 7, "frameon": False, "borderaxespad": 0, "handlelength": 1.2, "columnspacing": 1}
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.17), ncols=5, **style)


def describe_latest(panel: dict[str, Any], lines: Sequence[Line], unit: str) -> str:
    """Describe the latest value of a panel, or what its series is named after."""
    if not lines:
        return "No data"
    name, values = lines[-1]
    return name if panel.get("options", {}).get("textMode") == "name" else format_value(float(values[-1][1]), unit)


@contextmanager
def watching(folder: Path, port: int) -> Iterator[str]:
    """Have a server watched by the rules of docs/monitoring; yield the address of Prometheus."""
    monitoring = DASHBOARDS.parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        own = int(probe.getsockname()[1])
    config = yaml.safe_load((monitoring / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": "5s"}
    config["rule_files"] = [str(monitoring / "alerts.yaml")]
    del config["alerting"]
    (job,) = config["scrape_configs"]
    job |= {"static_configs": [{"targets": [f"127.0.0.1:{port}"]}], "authorization": {"credentials": KEY}}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    words = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*words, f"--web.listen-address=127.0.0.1:{own}"], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{own}"
    finally:
        process.terminate()
        process.wait(30)


async def send(url: str, images: NDArray[np.uint8], until: float, seed: int) -> None:
    """Send one request after the other: most are images as pixels or as a file, some are wrong.

    Args:
        images: uint8 [N, S, S, 3].
    """
    random = np.random.default_rng(seed)
    async with httpx.AsyncClient(base_url=url, timeout=30, headers={"Authorization": f"Bearer {KEY}"}) as client:
        while time.monotonic() < until:
            image, kind = images[random.integers(len(images))], random.random()
            if kind < 0.6:
                body, content_type = image.tobytes(), "application/octet-stream"
            else:
                file = io.BytesIO()
                Image.fromarray(image).save(file, "PNG")
                body, content_type = file.getvalue(), "image/png"
            headers = {"content-type": content_type}
            if kind > 0.99:
                body = body[: len(body) // 2]
            elif kind > 0.98:
                headers["Authorization"] = "Bearer wrong"
            await client.post("/predict", content=body, headers=headers)
            await asyncio.sleep(0.02 * random.random())


async def load(url: str, images: NDArray[np.uint8]) -> None:
    """Send what the phases say."""
    for seconds, clients, brightness in PHASES:
        until, shown = time.monotonic() + seconds, (images * brightness).astype(np.uint8)
        await asyncio.gather(*(send(url, shown, until, number) for number in range(clients)))


def ask(url: str, dashboard: dict[str, Any], start_s: float, end_s: float) -> list[tuple[int, str, Series]]:
    """Ask Prometheus the queries of a dashboard."""
    answers = []
    for index, query, legend in list_queries(dashboard, end_s - start_s):
        facts: dict[str, str | float] = {"query": query, "start": start_s, "end": end_s, "step": STEP_S}
        answer = httpx.get(f"{url}/api/v1/query_range", params=facts, timeout=60).raise_for_status().json()
        answers.append((index, legend, answer["data"]["result"]))
    return answers


def main() -> None:
    """Serve, watch, load, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--shadow", type=Path, required=True)
    options = parser.parse_args()
    images = np.stack([np.frombuffer(each, np.uint8) for each in load_images(options.run)])
    side = round((images.shape[1] / 3) ** 0.5)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        words = ["--drift_window", "1000"]
        words += ["--shadow", str(options.shadow / "published")]
        words += ["--capture", str(folder / "captures"), "--capture_fraction", "0.1"]
        with serving("own", options.run, *words) as (_, port), watching(folder, port) as prometheus:
            start_s = time.time()
            asyncio.run(load(f"http://127.0.0.1:{port}", images.reshape(-1, side, side, 3)))
            for name in NAMES:
                dashboard = json.loads((DASHBOARDS / f"{name}.json").read_text())
                figure = draw(dashboard, ask(prometheus, dashboard, start_s, time.time()), start_s)
                metadata = {"Software": "", "Source": compute_digest(dashboard)}
                figure.savefig(FOLDER / f"dashboard_{name}.png", dpi=90, metadata=metadata)


if __name__ == "__main__":
    main()
