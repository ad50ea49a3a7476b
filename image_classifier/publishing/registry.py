"""The registry of published models: versions and aliases in MLflow, and what a version must show to be promoted."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.errors import ModelError, RegistryError, SettingsError
from image_classifier.serving.published import check_published, read_manifest
from image_classifier.storage import find_cache, written_beside
from image_classifier.tracking.compare import CONFIDENCE, compute_mcnemar_test
from image_classifier.tracking.store import Store

CHAMPION = "champion"
"""The alias that `promote` points to the version to be served."""
EXPERIMENT = "published models"
"""Of MLflow, whose runs hold the files of the versions."""

_ARTIFACTS = "model"
_NAME = re.compile(r"[A-Za-z0-9][\w. -]{0,99}", re.ASCII)
_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^@/.][^@/]*)(?:@(?P<alias>[^@/]+)|/(?P<version>[0-9]+))")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Version:
    """One version of a registered model.

    Attributes:
        number: as MLflow counts.
        aliases: that point to it.
        tags: run, data digest, accuracy and digest of the manifest of the published folder.
        run_id: MLflow's run that holds its files.
    """

    name: str
    number: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    run_id: str


@dataclass(frozen=True)
class Promotion:
    """What came out of a promotion: the versions, and how the new one compares with the one before.

    Attributes:
        former: number of the version that the alias pointed to, None if there was none.
        difference: of accuracy, new minus former.
        p_value: of McNemar's test on the same test images; both are None where there is nothing to compare.
    """

    name: str
    number: str
    alias: str
    former: str | None = None
    difference: float | None = None
    p_value: float | None = None


class Registry:
    """Published models by name, version and alias.

    Args:
        tracking_uri: of an MLflow server or database; None for the SQLite file under the experiments folder.
    """

    def __init__(self, tracking_uri: str | None = None, experiments_folder: Path = Path("experiments")) -> None:
        self._store = Store(tracking_uri, experiments_folder)

    def add(self, folder: Path, name: str, *, alias: str | None = None, public_key: Path | None = None) -> Version:
        """Register a published folder as the next version of a model, with an alias where one is given.

        Raises:
            ModelError: a file was changed, or the key's signature is missing.
            RegistryError: the registry cannot be reached or refuses.
            SettingsError: the name is none that a registry takes.
        """
        if not _NAME.fullmatch(name):
            raise SettingsError(f"--name takes letters, digits, spaces, and _ . - (at most 100), got: {name!a}")
        manifest = check_published(folder, public_key)
        tags = {
            "run": f"{manifest['experiment_name']}/{manifest['run_name']}",
            "data_digest": manifest["data_digest"],
            "weights_digest": manifest["weights_digest"],
            "manifest_digest": manifest["digest"],
            "accuracy": repr(manifest["metrics"]["accuracy"]),
            "views": manifest["views"],
        }
        with self._store.open(f"register {name!r}") as client:
            _create_model(client, name)
            run = client.create_run(self._store.get_experiment_id(EXPERIMENT), run_name=name, tags=tags)
            run_id = run.info.run_id
            try:
                for metric, value in manifest["metrics"].items():
                    client.log_metric(run_id, metric, float(value))
                client.log_artifacts(run_id, str(folder), _ARTIFACTS)
                source = f"{run.info.artifact_uri}/{_ARTIFACTS}"
                version = client.create_model_version(name, source, run_id, tags=tags)
            except BaseException:
                client.set_terminated(run_id, "FAILED")
                raise
            client.set_terminated(run_id, "FINISHED")
            if alias is not None:
                client.set_registered_model_alias(name, alias, str(version.version))
            return Version(name, str(version.version), () if alias is None else (alias,), tags, run_id)

    def list(self, name: str | None = None) -> list[Version]:
        """List all versions, by name and number.

        Raises:
            RegistryError: the registry cannot be reached, or has no model of this name.
        """
        with self._store.open("list the models") as client:
            models = {model.name: model for model in _read_pages(client.search_registered_models)}
            if name is not None and name not in models:
                raise RegistryError(f"no model is called {name!a} at {self._store.uri}; {_list_known(list(models))}")
            versions = []
            for model_name in sorted(models) if name is None else [name]:
                found = _read_pages(client.search_model_versions, filter_string=f"name = '{model_name}'")
                aliases = models[model_name].aliases
                versions += [_to_version(version, aliases) for version in sorted(found, key=lambda v: int(v.version))]
            return versions

    def find(self, reference: str) -> Version:
        """Find what NAME@ALIAS or NAME/VERSION refers to; `models:/` may stand before it.

        Raises:
            RegistryError: there is no such model, version or alias.
            SettingsError: the reference has another form.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise SettingsError(f"a model of the registry is named NAME@ALIAS or NAME/VERSION, got: {reference!a}")
        versions = self.list(match["name"])
        for version in versions:
            if version.number == match["version"] or match["alias"] in version.aliases:
                return version
        known = sorted({alias for version in versions for alias in version.aliases})
        what = f"the alias {match['alias']!a}" if match["alias"] else f"a version {match['version']}"
        raise RegistryError(
            f"{match['name']} does not have {what}: it has the aliases {', '.join(known) or '(none)'} "
            f"and the versions {', '.join(version.number for version in versions) or '(none)'}"
        )

    def promote(
        self, reference: str, *, alias: str = CHAMPION, allow_loss: bool = False, public_key: Path | None = None
    ) -> Promotion:
        """Point an alias to a version, if that is not significantly worse than the one that it points to.

        Both are compared by McNemar's test on the images of the test set, image by image.

        Raises:
            RegistryError: the version loses significantly, or was tested on other data, and that is not allowed.
            ModelError: the files of a version are not what was registered.
        """
        version = self.find(reference)
        manifest = self._load_manifest(version, public_key)
        former = next((other for other in self.list(version.name) if alias in other.aliases), None)
        promotion = Promotion(version.name, version.number, alias, former.number if former else None)
        if former is not None and former.number != version.number:
            champion = self._load_manifest(former)
            if champion["data_digest"] == manifest["data_digest"]:
                difference, p_value = compare_answers(champion, manifest)
                promotion = Promotion(version.name, version.number, alias, former.number, difference, p_value)
                if difference < 0 and p_value < 1 - CONFIDENCE and not allow_loss:
                    raise RegistryError(
                        f"{version.name} version {version.number} is worse than the {alias}, version {former.number}, "
                        f"by {-100 * difference:.2f} points of accuracy (p = {p_value:.2g}, McNemar's test on "
                        f"{manifest['metrics']['num_images']:,} images); --allow_loss promotes it all the same"
                    )
            elif not allow_loss:
                raise RegistryError(
                    f"{version.name} version {version.number} and the {alias}, version {former.number}, were tested on "
                    "different data, so that nothing says which is better; --allow_loss promotes it all the same"
                )
        with self._store.open(f"promote {version.name!r}") as client:
            client.set_registered_model_alias(version.name, alias, version.number)
        return promotion

    def resolve(
        self, reference: str, cache: Path | None = None, *, public_key: Path | None = None
    ) -> tuple[Path, Version]:
        """Find a version's folder, which is fetched once and checked every time.

        Args:
            cache: folder to fetch below; the user's cache where left out.

        Raises:
            RegistryError: there is no such version, or it cannot be fetched.
            ModelError: its files are not what was registered, or not signed by the key.
        """
        version = self.find(reference)
        digest = version.tags.get("manifest_digest", "")
        if not _DIGEST.fullmatch(digest):
            raise RegistryError(f"{reference} was not registered by this package: it has no manifest_digest")
        cache = cache or find_cache()
        if cache is None:
            raise SettingsError("there is no home to keep models in; set IMAGE_CLASSIFIER_CACHE to a folder")
        folder = cache / "models" / version.name / f"{version.number}-{digest[:12]}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(folder) as temporary, self._store.open(f"fetch {reference}") as client:
                temporary.mkdir()
                fetched = Path(client.download_artifacts(version.run_id, _ARTIFACTS, str(temporary)))
                for file in fetched.iterdir():
                    shutil.move(file, temporary / file.name)
                fetched.rmdir()
        try:
            if check_published(folder, public_key)["digest"] != digest:
                raise ModelError(f"{folder} is not what was registered as {version.name} version {version.number}")
        except ModelError as error:
            raise ModelError(f"{error}; remove {folder} to fetch it again") from error
        return folder, version

    def _load_manifest(self, version: Version, public_key: Path | None = None) -> dict[str, Any]:
        folder, _ = self.resolve(f"{version.name}/{version.number}", public_key=public_key)
        return read_manifest(folder)


def compare_answers(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """Compare two published models on one test set by their manifests: the difference of accuracy, and its p-value."""
    rights = [_unpack_bits(manifest) for manifest in (first, second)]
    only_first, only_second = int((rights[0] & ~rights[1]).sum()), int((rights[1] & ~rights[0]).sum())
    return (only_second - only_first) / len(rights[0]), compute_mcnemar_test(only_first, only_second)


def _unpack_bits(manifest: dict[str, Any]) -> NDArray[np.bool_]:
    packed = np.frombuffer(bytes.fromhex(manifest["right"]), np.uint8)
    return np.unpackbits(packed, count=manifest["metrics"]["num_images"]).astype(bool)


def _create_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _read_pages(search: Any, **options: Any) -> list[Any]:
    found, token = [], None
    while True:
        page = search(page_token=token, **options)
        found += page
        token = page.token
        if not token:
            return found


def _to_version(version: Any, aliases: dict[str, str]) -> Version:
    number = str(version.version)
    pointing = tuple(sorted(alias for alias, target in aliases.items() if str(target) == number))
    return Version(version.name, number, pointing, dict(version.tags), version.run_id)


def _list_known(names: list[str]) -> str:
    return f"it has {', '.join(sorted(names)[:10])}" if names else "it has none; add one with: registry add RUN"
