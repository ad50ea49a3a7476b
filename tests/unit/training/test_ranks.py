"""What a process does when the others are gone; tests/integration/test_ranks.py has several that train together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # which torch documents

from image_classifier.training import ranks
from image_classifier.training.ranks import GroupedRanks

SERVE = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


def test_a_store_that_is_cut_off_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            store = TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False)
            group = GroupedRanks(torch.device("cpu"), store)
            assert group.is_first_to_fail() and not group.is_first_to_fail()
            os.kill(server.pid, signal.SIGSTOP)
            os.waitpid(server.pid, os.WUNTRACED)  # until all its threads have stopped
            monkeypatch.setattr(ranks, "ANSWER_S", 0.5)  # not before: a busy machine may take as long to answer
            started = time.monotonic()
            assert group.is_first_to_fail()
            assert time.monotonic() - started < 10
        finally:
            server.kill()
            torch.distributed.destroy_process_group()
