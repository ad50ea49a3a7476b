"""What several tests of this tier share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.crash import Campaign


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    """Processes that fork trainers, and a finished run to hold theirs against."""
    campaign = Campaign(tmp_path_factory.mktemp("campaign"), num_workers=len(os.sched_getaffinity(0)))
    yield campaign
    campaign.close()
