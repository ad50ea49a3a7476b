"""Profiles a few steps of a training with torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from image_classifier.storage import scratch_folder
from image_classifier.training.loop import Step

NUM_STEPS_BEFORE = 3  # the first steps allocate memory and choose kernels
NUM_STEPS = 5
NUM_ROWS = 40


def profile_steps(steps: Iterator[Step], save: Callable[[dict[str, bytes]], None]) -> Iterator[Step]:
    """Yield all steps, and profile some of them with what their consumer does in between.

    Args:
        save: gets `operators.txt`, a table of the operators by their own time, and `trace.json`, which
            https://ui.perfetto.dev opens; not called where there are too few steps.
    """
    from torch.profiler import profile  # takes 0.1 s, for those who ask for it

    yield from islice(steps, NUM_STEPS_BEFORE)
    num_profiled = 0
    with profile(record_shapes=True) as profiler:
        for step in islice(steps, NUM_STEPS):
            num_profiled += 1
            yield step
    if num_profiled:
        averages = profiler.key_averages(group_by_input_shape=True)
        on_gpu = any(event.self_device_time_total > 0 for event in averages)
        table = averages.table(
            sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total",
            row_limit=NUM_ROWS,
            max_name_column_width=40,
            max_shapes_column_width=60,
        )
        with scratch_folder() as folder:
            trace = folder / "trace.json"
            profiler.export_chrome_trace(str(trace))
            save({"operators.txt": f"{num_profiled} steps\n{table}\n".encode(), "trace.json": trace.read_bytes()})
    yield from steps
