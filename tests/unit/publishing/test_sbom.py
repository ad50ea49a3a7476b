"""The list of software against CycloneDX's own schema and the run's record."""

from __future__ import annotations

import json
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from image_classifier.publishing.sbom import build_sbom


def test_it_is_valid_and_names_what_the_run_recorded(published_run: Path) -> None:
    text = (published_run / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    record = json.loads((published_run.parent / "run.json").read_text())
    components = {component["name"]: component for component in json.loads(text)["components"]}
    for name, version in record["environment"]["distributions"].items():
        assert components[name]["version"] == version
        assert components[name]["purl"].startswith("pkg:pypi/")
    assert json.loads(text)["metadata"]["component"]["name"] == "experiment/run"
    digest = json.loads((published_run / "manifest.json").read_text())["weights_digest"]
    assert build_sbom(record, digest).decode() == text
