"""The names that settings choose from."""

from __future__ import annotations

from typing import Literal

ClassWeights = Literal["none", "balanced"]
Device = Literal["auto", "cpu", "cuda"]
Engine = Literal["auto", "eager", "compiled"]
Fit = Literal["squeeze", "crop", "pad", "refuse"]
Flip = Literal["none", "random", "alternating"]
Freeze = Literal["none", "body"]
InstructionSet = Literal["native", "portable", "avx2", "avx512", "avx512_bf16"]
Keep = Literal["last", "best"]
Log = Literal["none", "tensorboard"]
NumKept = int | Literal["all"]
Precision = Literal["auto", "fp32", "bf16"]
Pruner = Literal["none", "median", "hyperband"]
Sampler = Literal["uniform", "balanced"]
ServingPrecision = Literal["fp32", "int8"]
Schedule = Literal["constant", "triangular"]
Search = Literal["tpe", "random", "grid"]
Views = Literal["one", "mirror", "six"]

CHOICES = {
    "freeze": Freeze,
    "schedule": Schedule,
    "class_weights": ClassWeights,
    "flip": Flip,
    "sampler": Sampler,
    "views": Views,
    "keep": Keep,
    "device": Device,
    "precision": Precision,
    "engine": Engine,
    "instruction_set": InstructionSet,
}
"""What the settings take that are one of several names."""

_VIEWS = {
    "one": "single view",
    "mirror": "test-time augmentation (2 views)",
    "six": "test-time augmentation (up to 6 views)",
}


def describe_views(views: str) -> str:
    """Describe the test-time augmentation that an accuracy was measured with."""
    return _VIEWS.get(views, f"views {views}")
