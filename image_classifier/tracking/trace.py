"""Traces an answer, a published model or a weight file back to run, data, code, environment and verdicts.

Each link is checked as it is shown. It is `equal` if it is here and has the digest that the one before it names,
`different` if it has another, and `unchecked` if it is not here. Verdicts that a policy asks for may be `missing`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from image_classifier import files
from image_classifier.access import DatabaseAccess
from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import DatabaseError, DataError, ModelError, RunError, VerdictError
from image_classifier.published.attestation import read_attestations
from image_classifier.published.folder import ATTESTATIONS
from image_classifier.published.folder import MANIFEST as PUBLISHED_MANIFEST
from image_classifier.published.folder import PUBLISHED, find_published, is_published
from image_classifier.published.folder import read_manifest as read_published_manifest
from image_classifier.published.folder import read_published
from image_classifier.published.policy import Policy, check_run
from image_classifier.references import describe_place
from image_classifier.storage import compute_file_digest
from image_classifier.tracking import checking, layout, reading
from image_classifier.tracking.identity import describe_code, describe_environment
from image_classifier.tracking.reading import find_dataset

State = Literal["equal", "different", "unchecked", "missing"]
VERSION_DIGITS = 12
"""Of a model's sha256, as a server names the version of one that no registry has numbered."""

_VERSION = re.compile(f"[0-9a-f]{{{VERSION_DIGITS},64}}")


@dataclass(frozen=True)
class Link:
    """One step of the way back.

    Attributes:
        name: what it is: answer, model, run, weights, start, data, code, environment, verdicts.
        what: it in words.
        digest: of it, "" where it has none.
        state: whether it is what the link before it names.
        reason: how that is known, or why not.
    """

    name: str
    what: str
    digest: str
    state: State
    reason: str

    def to_json(self) -> dict[str, str]:
        """Convert it to what JSON has."""
        return asdict(self)


@dataclass(frozen=True)
class Where:
    """Where things lie.

    Attributes:
        experiments_folder: below it runs and published models are looked for.
        dataset_folder: the run's data set, if it moved; or db:NAME@VERSION.
        access: how the database is reached.
        policy: who must have verified the run; None shows the verdicts without asking whose they are.
    """

    experiments_folder: Path
    dataset_folder: Path | None = None
    access: DatabaseAccess | None = None
    policy: Policy | None = None


def trace(source: str, where: Where) -> list[Link]:
    """Trace an answer's model_version, a file with an answer, a published folder, a run or a weight file.

    Raises:
        ModelError: nothing is known of it here.
        RunError: the run's record or manifest is damaged.
    """
    links, path = _find_start(source, where)
    if path.is_file() and path.suffix != ".onnx":
        weights = compute_file_digest(path)
        folder = _find_run(where, path.parent, lambda manifest: _has_weights(manifest, weights))
        if folder is None:
            raise ModelError(f"no run under {where.experiments_folder} has the weights {path} (sha256 {weights[:12]})")
        links.append(Link("weights", str(path), weights, "equal", f"{layout.MODEL} in the manifest of {folder}"))
    elif is_published(path) or is_published(path / PUBLISHED):
        published = read_published(find_published(path.parent if path.suffix == ".onnx" else path))
        place = path.parent if path.suffix == ".onnx" else find_published(path)
        digest = str(published.manifest.get("run_manifest_digest", ""))
        links.append(
            _link_model(place, published.manifest, f"its files match {PUBLISHED_MANIFEST}, which names the run")
        )
        folder = _find_run(where, place.parent, lambda manifest: manifest["digest"] == digest)
        if folder is None:
            name = f"{published.manifest['experiment_name']}/{published.manifest['run_name']}"
            reason = f"no run under {where.experiments_folder} has this manifest"
            return [*links, Link("run", name, digest, "unchecked", reason)]
    else:
        folder = path
    return links + list(trace_run(folder, where))


def _find_start(source: str, where: Where) -> tuple[list[Link], Path]:
    """Find the file or folder that is traced, and what leads there."""
    path, version = Path(source), source
    if os.path.lexists(path) and path.suffix != ".json":
        return [], path
    if os.path.lexists(path):
        version = _read_version(path)
    if not _VERSION.fullmatch(version):
        raise ModelError(
            f"{version[:100]!a} is neither a local file or folder, nor a model_version of {VERSION_DIGITS} hexadecimal "
            "digits; for a version of the registry, first call: registry resolve NAME/VERSION"
        )
    for folder in _list_folders(where.experiments_folder, f"{PUBLISHED}/{PUBLISHED_MANIFEST}"):
        with suppress(ModelError):
            for name, facts in read_published_manifest(folder / PUBLISHED)["files"].items():
                if name.endswith(".onnx") and str(facts["sha256"]).startswith(version):
                    reason = f"the sha256 of {name} begins so"
                    return [Link("answer", f"model_version {version}", version, "equal", reason)], folder / PUBLISHED
    raise ModelError(f"no model published under {where.experiments_folder} has the version {version[:64]}")


def _read_version(path: Path) -> str:
    try:
        answer = files.load_json(path)
        files.check_form(answer, {"model_version": str})
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not an answer of a server: {error}") from error
    return str(answer["model_version"])


def _list_folders(experiments: Path, name: str) -> Iterator[Path]:
    """List the run folders below the experiments that hold a file of this name; links are not followed."""
    for path in sorted(experiments.glob(f"*/*/{name}")):
        folder = path.parents[name.count("/")]
        if not folder.is_symlink() and not folder.parent.is_symlink():
            yield folder


def _find_run(where: Where, near: Path, is_it: Callable[[dict[str, Any]], bool]) -> Path | None:
    for folder in (near, *_list_folders(where.experiments_folder, layout.MANIFEST)):
        with suppress(RunError):
            if is_it(reading.read_manifest(folder)):
                return folder
    return None


def _has_weights(manifest: dict[str, Any], digest: str) -> bool:
    return bool(manifest["files"].get(layout.MODEL, {}).get("sha256") == digest)


def _link_model(folder: Path, manifest: dict[str, Any], reason: str) -> Link:
    return Link("model", str(folder), manifest["files"]["model.onnx"]["sha256"], "equal", reason)


def trace_run(folder: Path, where: Where) -> Iterator[Link]:
    """Trace a run, and yield each link when it is checked.

    Raises:
        RunError: its record or manifest is damaged.
    """
    changed, manifest = checking.verify_files(folder), reading.read_manifest(folder)
    whole = f"{len(manifest['files'])} files are as the manifest has them"
    yield Link("run", str(folder), manifest["digest"], "different" if changed else "equal", "; ".join(changed) or whole)
    record = reading.read_record(folder)
    pretrained = record["pretrained"]
    if pretrained is not None:
        yield _link_file("start", f"weights {pretrained['path']}", Path(pretrained["path"]), pretrained["digest"])
    yield _link_data(folder, record, where)
    yield _link_code(record)
    yield _link_environment(record)
    yield _link_verdicts(folder, manifest, where.policy)


def _link_file(name: str, what: str, path: Path, digest: str) -> Link:
    try:
        found = compute_file_digest(path)
    except OSError as error:
        return Link(name, what, digest, "unchecked", f"it cannot be read: {error.strerror}")
    return _compare(name, what, digest, found, "it is there")


def _compare(name: str, what: str, digest: str, found: str, where: str) -> Link:
    if found == digest:
        return Link(name, what, digest, "equal", f"{where} with this digest")
    return Link(name, what, digest, "different", f"{where} with the digest {found[:12]}")


def _link_data(folder: Path, record: dict[str, Any], where: Where) -> Link:
    data = record["data"]
    what = f"{data['name']}: {data['num_train']:,} training images, {data['num_test']:,} test images"
    try:
        dataset_folder, access, reading = find_dataset(folder, where.dataset_folder, where.access)
        found = load_snapshot(dataset_folder, access, reading).recognize(data["digest"]).digest
    except (DataError, DatabaseError) as error:
        return Link("data", what, data["digest"], "unchecked", str(error))
    return _compare("data", what, data["digest"], found, f"it lies at {describe_place(dataset_folder)}")


def _link_code(record: dict[str, Any]) -> Link:
    code, present = record["code"], describe_code()
    changes = " with uncommitted changes" if code.get("uncommitted_changes") else ""
    what = f"image_classifier {code['version']}, commit {(code['commit'] or 'unknown')[:12]}{changes}"
    if code["digest"] == present["digest"]:
        return Link("code", what, code["digest"], "equal", "it is the code that is installed here")
    return Link("code", what, code["digest"], "unchecked", f"installed here is {present['digest'][:12]}")


def _link_environment(record: dict[str, Any]) -> Link:
    environment = record["environment"]
    what = f"Python {environment['python']}, {len(environment['distributions'])} distributions"
    plugins = [plugin.get("distribution") for plugin in (record.get("plugins") or {}).values()]
    present = describe_environment([name for name in plugins if name])
    if present["digest"] == environment["digest"]:
        return Link("environment", what, environment["digest"], "equal", "it is what is installed here")
    return Link("environment", what, environment["digest"], "unchecked", f"installed here is {present['digest'][:12]}")


def _link_verdicts(folder: Path, manifest: dict[str, Any], policy: Policy | None) -> Link:
    contents, refused = read_attestations(folder)
    what = f"{len(contents) + len(refused)} files in {ATTESTATIONS}/"
    if policy is None:
        return Link("verdicts", what, "", "unchecked", "nobody was named who counts; `trace --policy` does")
    try:
        tally = check_run(folder, manifest, policy)
    except ModelError as error:
        return Link("verdicts", what, "", "different" if isinstance(error, VerdictError) else "missing", str(error))
    return Link("verdicts", what, "", "equal", "; ".join(sorted({each.describe() for each in tally.counted})))


def dump_links(links: list[Link]) -> str:
    """Write links as JSON; its digest is over all of it."""
    content = [link.to_json() for link in links]
    line = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps({"links": content, "digest": hashlib.sha256(line.encode()).hexdigest()}, indent=2)
