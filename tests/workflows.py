"""Documents of workflows that are as they must be."""

from __future__ import annotations

from typing import Any

TRAINING = {"experiment_name": "e", "run_name": "r", "recipe": "notebook", "validation_fraction": 0.2}


GOOD: dict[str, Any] = {"workflow": "classification", "training": TRAINING}


SPACE = {"learning_rate": {"low": 0.01, "high": 0.1}}


SWEEP = {"space": SPACE, "num_trials": 3, "parallel": 2}
