"""Kill thousands of tiny runs with SIGKILL, resume each, and hold it against one that nobody killed.

    python -m benchmarks.crash_campaign [--trials 2000]

Every call to the disk that a run makes is killed once before it is carried out, and those that can be carried out in
part once in their middle; the other trials are killed once or twice, at random moments. The tests run the same
trials, fewer of them (tests/integration/test_crash.py).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from benchmarks.measure import save_result
from image_classifier.tracking.reading import read_record
from tests.crash import Campaign

TRIALS_PER_LINE = 100


def run_campaign(num_trials: int, num_workers: int, scratch: Path) -> dict[str, Any]:
    """Run that many trials and return what came of them; at most half are kills at a call to the disk."""
    started = time.perf_counter()
    campaign = Campaign(scratch, num_workers)
    try:
        kills = campaign.list_kills()
        futures = campaign.kill_at_calls(random.Random(0).sample(kills, min(len(kills), num_trials // 2)))
        futures += campaign.kill_at_random(num_trials - len(futures))
        failures: list[str] = []
        num_trials_by_kind, num_kills_by_kind = Counter[str](), Counter[str]()
        for number, future in enumerate(as_completed(futures), start=1):
            if number % TRIALS_PER_LINE == 0:
                print(f"{number} of {num_trials} trials, {len(failures)} failures", file=sys.stderr)
            error = future.exception()
            if error is not None:
                failures.append(str(error))
                continue
            trial = future.result()
            num_trials_by_kind[trial.kind] += 1
            num_kills_by_kind[trial.kind] += trial.num_kills
        record = read_record(campaign.reference)
    finally:
        campaign.close()
    return {
        "trials": num_trials,
        "failures": failures,
        "trials_by_kind": dict(sorted(num_trials_by_kind.items())),
        "kills_by_kind": dict(sorted(num_kills_by_kind.items())),
        "calls_of_a_run": len(campaign.calls),
        "seconds": round(time.perf_counter() - started, 1),
        **{part: record[part] for part in ("code", "machine")},
    }


def main() -> int:
    """Run the campaign, write its result, and return 1 if a trial failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="trials at once")
    options = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the workers import this module, and numpy, before all else
    with tempfile.TemporaryDirectory(prefix="crash-campaign-") as scratch:
        result = run_campaign(options.trials, options.workers, Path(scratch))
    save_result("crash_campaign", result)
    print(f"{result['trials']} trials, {len(result['failures'])} failures, {result['seconds']} s")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
