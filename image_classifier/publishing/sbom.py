"""The software that trained a model, as a CycloneDX document from the run's record."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from image_classifier.extras import load_extra


def build_sbom(record: dict[str, Any], weights_digest: str) -> bytes:
    """Build a CycloneDX 1.6 document in JSON: the model, and the distributions and the package that trained it.

    The same run gives the same bytes: number and time are the run's.

    Raises:
        SettingsError: the extra `publish` is not installed.
    """
    bom_module = load_extra("cyclonedx.model.bom", "publish")
    component = load_extra("cyclonedx.model.component", "publish")
    output = load_extra("cyclonedx.output.json", "publish")
    package_url = load_extra("packageurl", "publish").PackageURL
    version = record["code"]["version"]
    model = component.Component(
        type=component.ComponentType.MACHINE_LEARNING_MODEL,
        name=f"{record['experiment_name']}/{record['run_name']}",
        version=weights_digest[:12],
        bom_ref="model",
    )
    versions = {"image-classifier": version, **record["environment"]["distributions"]}
    libraries = [
        component.Component(
            type=component.ComponentType.LIBRARY,
            name=name,
            version=number,
            purl=package_url("pypi", None, name, number),
            bom_ref=f"{name}@{number}",
        )
        for name, number in versions.items()
    ]
    python = component.Component(
        type=component.ComponentType.PLATFORM, name="python", version=record["environment"]["python"], bom_ref="python"
    )
    bom = bom_module.Bom(
        components=[python, *libraries],
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, weights_digest),
        metadata=bom_module.BomMetaData(component=model, timestamp=datetime.fromisoformat(record["started_at"])),
    )
    bom.register_dependency(model, [python, *libraries])
    text: str = output.JsonV1Dot6(bom).output_as_string(indent=2)
    return (text + "\n").encode()
