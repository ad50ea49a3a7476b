"""What the server changes in the process that it has for itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from image_classifier.serving.server import SWITCH_S, keep_loop_free


@pytest.fixture
def process() -> Iterator[None]:
    """Set the process back to what it was."""
    switch_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(switch_s)
    gc.unfreeze()
    gc.enable()


def test_no_thread_and_no_collection_holds_up_the_event_loop(process: None) -> None:
    gc.disable()  # as the command has it until it serves
    made: list[object] = [object(), []]
    keep_loop_free()
    assert gc.isenabled() and gc.get_freeze_count() > 1000
    assert not any(each is made for each in gc.get_objects())  # which are those that a collection looks through
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
