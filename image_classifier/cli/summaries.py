"""What commands say of data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from image_classifier.cli.command import ExitStatus
from image_classifier.cli.table import format_table
from image_classifier.data.parts import PARTS
from image_classifier.progress import say
from image_classifier.text import count, make_printable

if TYPE_CHECKING:
    from image_classifier.data.database import Summary, Version
    from image_classifier.data.diff import Difference
    from image_classifier.data.findings import Findings
    from image_classifier.data.snapshot import Snapshot

_NUM_LISTED = 20


def name_left_out(findings: Findings | None) -> ExitStatus:
    """Name each image file that was left out, and return the exit status that says whether there was one."""
    left_out = () if findings is None else findings.left_out
    for reason in left_out:
        say(f"left out: {make_printable(reason)}")
    return ExitStatus.DONE_IN_PART if left_out else ExitStatus.DONE


def format_counts(counted: Snapshot | Version) -> str:
    """Format how many images a data set has in each part."""
    validation = f", {counted.num_validation:,} validation images" if counted.num_validation else ""
    return f"{counted.num_train:,} training images{validation}, {counted.num_test:,} test images"


def format_summary(summary: Summary) -> str:
    """Format a data set and its versions."""
    dataset = summary.dataset
    heading = (
        f"{dataset.name}: {summary.num_samples:,} images of {len(dataset.classes):,} classes, "
        f"{count(summary.num_corrections, 'label')} corrected"
    )
    parts = ["train", *(["validation"] if any(v.num_validation for v in summary.versions) else []), "test"]
    rows = [["version", "frozen", "by", "digest", *parts, "limited to"]]
    for version in summary.versions:
        limits = "; ".join(f"{name}={','.join(values)}" for name, values in version.selection.conditions.items())
        moment = version.added_at.strftime("%Y-%m-%d %H:%M:%S")
        counts = [f"{getattr(version, f'num_{part}'):,}" for part in parts]
        rows.append([str(version.reference), moment, version.added_by, version.digest[:12], *counts, limits])
    return f"{heading}\n{format_table(rows, num_left=4)}" if summary.versions else f"{heading}\nno version yet"


def format_difference(difference: Difference, old: Sequence[str], new: Sequence[str]) -> str:
    """Format what was added, removed and relabelled; of the last the first ones one by one."""
    counts = {name: getattr(difference, f"num_{name}") for name in ("unchanged", "added", "removed", "relabelled")}
    parts = [part for part in PARTS if part != "validation" or any(count[part] for count in counts.values())]
    rows = [["images", *parts], *([name, *(f"{count[part]:,}" for part in parts)] for name, count in counts.items())]
    text = format_table(rows)
    if difference.relabelled:
        listed = [["image", "was", "is"]]
        for pair in difference.relabelled[:_NUM_LISTED]:
            listed.append([str(pair.new), old[pair.old_label], new[pair.new_label]])
        text += f"\n\n{format_table(listed)}"
        if len(difference.relabelled) > _NUM_LISTED:
            text += f"\nand {len(difference.relabelled) - _NUM_LISTED:,} more"
    return text
