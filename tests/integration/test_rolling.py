"""`benchmarks.rolling`: a server of a small model is replaced under load, and what its clients miss is counted."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rolling import Clients, build_table, roll
from tests.conftest import find_port
from tests.serving import draw_images, write_published_model


def test_replacements_are_counted_and_lose_nothing(tmp_path: Path) -> None:
    images = draw_images(10)
    write_published_model(tmp_path / "published", images)
    result = roll(tmp_path, images[0].tobytes(), 1)
    assert result["lost"] == 0 and result["reasons"] == {} and result["exit_statuses"] == [0]
    assert result["answered"] >= 2 * result["fewest_answered_by_a_server"] > 0
    table = build_table({**result, "commit": "0" * 40})
    assert "and 0 lost; every server ended with status 0" in table


def test_what_nobody_answers_is_lost() -> None:
    clients = Clients(find_port(), bytes(3072), 1)
    while not clients.lost:
        pass
    clients.stop()
    assert "ConnectionRefusedError" in clients.lost[0] and not clients.answered
