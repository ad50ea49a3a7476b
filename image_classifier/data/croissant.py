"""Describes a snapshot in Croissant 1.1, the JSON-LD format for data set search (MLCommons, 2026).

It has what is known of a data set: files with their digests, parts, classes, and what an image is. A licence, an
author or a citation is not known here, and is for whoever publishes the data to add. Notes of how it was read stay out:
they name places of this machine.
(https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import DataError
from image_classifier.progress import track
from image_classifier.storage import storage_error, write_atomically

VERSION = "http://mlcommons.org/croissant/1.1"
_NPY = "https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html"
_FILES = {
    "images.npy": ("uint8 [N, 3, S, S]: RGB images, those of each part behind those of the one before", _NPY),
    "labels.npy": ("int64 [N]: their classes, by number", _NPY),
    "snapshot.json": ("the digest, the classes and the sizes of the parts", "application/json"),
}
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    **{
        name: f"cr:{name}"
        for name in (
            "arrayShape citeAs column containedIn equivalentProperty extract field fileObject fileProperty fileSet "
            "format includes isArray isLiveDataset jsonPath key md5 parentField path recordSet references regex "
            "repeated replace samplingRate separator source subField transform"
        ).split()
    },
}


def write_croissant(snapshot: Snapshot, stores: Iterable[Path], path: Path) -> None:
    """Write the description of a snapshot that lies in one of the stores; it names the files relative to itself.

    Raises:
        DataError: none of the stores has it any more.
        StorageError: the disk refused; nothing is left of it.
    """
    folder = next((store / snapshot.digest for store in stores if (store / snapshot.digest).is_dir()), None)
    if folder is None:
        raise DataError(f"another process removed the snapshot {snapshot.digest}; start again")
    place = os.path.relpath(folder.resolve(), path.parent.resolve())
    content = build_croissant(snapshot, [_describe_file(folder / name, place) for name in _FILES])
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


@track("computing the digests of the files")
def _describe_file(path: Path, place: str) -> dict[str, Any]:
    description, encoding = _FILES[path.name]
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
    except OSError as error:
        raise storage_error(path, error, "read") from error
    return {
        "@type": "cr:FileObject",
        "@id": path.name,
        "name": path.name,
        "description": description,
        "contentUrl": quote(f"{place}/{path.name}"),
        "contentSize": f"{size} B",
        "encodingFormat": encoding,
        "sha256": digest,
    }


def build_croissant(snapshot: Snapshot, files: list[dict[str, Any]]) -> dict[str, Any]:
    """Build the JSON-LD of a snapshot from its description of the files."""
    side, counts = snapshot.image_size, snapshot.count_classes()
    where = f", version {snapshot.database} of a database" if snapshot.database else ""
    description = (
        f"{len(snapshot.labels)} RGB images of {side} x {side} pixels in {len(snapshot.classes)} classes{where}. "
        f"Snapshot {snapshot.digest} of image_classifier, whose digest is over classes, parts, images and labels."
    )
    content: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": VERSION,
        "name": snapshot.name,
        "description": description,
        "identifier": f"sha256:{snapshot.digest}",
        "distribution": files,
        "recordSet": [_describe_parts(snapshot), _describe_classes(snapshot, counts), *_describe_arrays(side)],
    }
    if snapshot.database is not None:
        content["version"] = f"{snapshot.database.rpartition('@')[2]}.0.0"
    return content


def _describe_parts(snapshot: Snapshot) -> dict[str, Any]:
    rows = [
        {"parts/name": name, "parts/first": place.start, "parts/num_images": place.stop - place.start}
        for name, place in snapshot.parts.items()
    ]
    fields = [
        _field("parts", "name", "sc:Text", "train, validation or test"),
        _field("parts", "first", "sc:Integer", "the place of its first image in images.npy and labels.npy"),
        _field("parts", "num_images", "sc:Integer", "how many images it has"),
    ]
    return _record_set("parts", dataType="cr:Split", key={"@id": "parts/name"}, fields=fields, data=rows)


def _describe_classes(snapshot: Snapshot, counts: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {"classes/label": label, "classes/name": name}
        | {f"classes/num_{part}": int(numbers[label]) for part, numbers in counts.items()}
        for label, name in enumerate(snapshot.classes)
    ]
    fields = [
        _field("classes", "label", "sc:Integer", "the number of the class"),
        _field("classes", "name", "sc:Text", "its name"),
        *(_field("classes", f"num_{part}", "sc:Integer", f"images of it in the part {part}") for part in counts),
    ]
    return _record_set("classes", dataType="sc:Enumeration", key={"@id": "classes/label"}, fields=fields, data=rows)


def _describe_arrays(side: int) -> list[dict[str, Any]]:
    """Describe both arrays: a record set of two sources would need a column to join them by."""
    pixels = _field("images", "pixels", "cr:UInt8", "red, green and blue; the image i is element i of images.npy")
    label = _field("labels", "label", "cr:Int64", "the class of the image i, which is element i of labels.npy")
    pixels |= {"isArray": True, "arrayShape": f"3,{side},{side}", "source": _source("images.npy")}
    label |= {"references": {"field": {"@id": "classes/label"}}, "source": _source("labels.npy")}
    return [_record_set("images", fields=[pixels]), _record_set("labels", fields=[label])]


def _record_set(name: str, *, fields: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    return {"@type": "cr:RecordSet", "@id": name, "name": name, **others, "field": fields}


def _field(record_set: str, name: str, kind: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{record_set}/{name}",
        "name": name,
        "description": description,
        "dataType": kind,
    }


def _source(file: str) -> dict[str, Any]:
    return {"fileObject": {"@id": file}, "extract": {"fileProperty": "content"}}
