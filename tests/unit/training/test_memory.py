"""Memory that is freed stays with the process: measured by the page faults of taking it again."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from image_classifier.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = 0
for round in range(12):
    if round == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 << 20, dtype=np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_page_faults(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc's malloc can be told")
def test_freed_memory_is_kept() -> None:
    returned, kept = count_page_faults("return"), count_page_faults("keep")
    assert returned > 200  # ten times 64 MiB, in pages of at most 2 MiB
    assert kept < returned / 10
