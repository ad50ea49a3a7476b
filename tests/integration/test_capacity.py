"""`benchmarks.capacity`: a small measurement of a real server, and the arithmetic of what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.capacity import DOCUMENT, build_table, count_servers, find_best, measure_run
from benchmarks.measure import load_result, read_table
from tests.conftest import require_program


def test_a_server_on_one_core_is_measured_and_littles_law_holds(published_run: Path) -> None:
    require_program("wrk")
    measured = measure_run(published_run.parent, 1, connections=(1, 4), rounds=1)
    assert measured["recipe"] and measured["points"].keys() == {"1", "4"}
    for number, point in measured["points"].items():
        assert point["requests_per_second"] > 0 and point["refused"] == point["broken"] == 0
        assert 0 < point["mean_ms"] <= point["p99_ms"]
        assert 0 < point["in_flight"] <= float(number) * 1.05  # no more than there are clients
    table = build_table({"runs": [measured], "processor": "p", "commit": "0" * 40, "rounds": 1, "seconds": 1})
    assert f"| `{measured['recipe']}` |" in table and "1,000/s" in table


def test_the_best_number_of_clients_meets_the_goal() -> None:
    points = {
        "1": {"requests_per_second": 100.0, "p99_ms": 10.0},
        "8": {"requests_per_second": 500.0, "p99_ms": 40.0},
        "64": {"requests_per_second": 600.0, "p99_ms": 90.0},
    }
    assert find_best(points, 50)[0] == 8
    assert find_best(points, 100)[0] == 64
    assert find_best(points, 5)[0] == 1


@pytest.mark.parametrize(
    ("load", "capacity", "servers"), [(100, 1000, 1), (700, 1000, 1), (701, 1000, 2), (7000, 1000, 10)]
)
def test_servers_are_counted_for_a_load(load: float, capacity: float, servers: int) -> None:
    assert count_servers(load, capacity, 0.7) == servers


def test_the_document_shows_what_was_measured() -> None:
    shown, result = read_table(DOCUMENT, "capacity"), load_result("capacity")
    assert shown == build_table(result) if result else shown.startswith("Not measured yet")
