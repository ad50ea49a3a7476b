"""The registry of published models: versions and aliases in MLflow, and the conditions for a promotion."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from image_classifier.access import DATASET_FOLDER, DatabaseAccess, Reading
from image_classifier.capture.files import read_captures
from image_classifier.capture.judging import Judged, judge
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import DataError, ImageClassifierError, ModelError, RegistryError, SettingsError
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE
from image_classifier.published.attestation import read_attestations
from image_classifier.published.folder import ATTESTATIONS, MODEL, Published, read_published, written_out
from image_classifier.published.policy import Policy, check_published
from image_classifier.published.predictor import PublishedModel, build_predictor, load_predictor
from image_classifier.publishing.evidence import Evidence, check_claims, compute_evidence, read_claims
from image_classifier.references import get_reference, get_url
from image_classifier.storage import find_cache, locked_folder, storage_error, written_beside
from image_classifier.text import is_digest
from image_classifier.tracking.compare import CONFIDENCE, compute_mcnemar_test
from image_classifier.tracking.store import Store

CHAMPION = "champion"
"""The alias that `promote` points to the version to be served, and nothing else does."""
EXPERIMENT = "published models"
"""Of MLflow, whose runs hold the files of the versions."""

_ARTIFACTS = "model"
_NAME = re.compile(r"[A-Za-z0-9][\w. -]{0,99}", re.ASCII)
_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^@/.][^@/]*)(?:@(?P<alias>[^@/]+)|/(?P<version>[0-9]+))")
_ALIAS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_CHECKED_BY = "checked_by"
"""The tag that says how the accuracy of a version is known; without it nobody has checked the accuracy."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """One version of a registered model.

    Attributes:
        number: as MLflow counts.
        aliases: that point to it.
        tags: run, data digest and digest of the manifest of the published folder; accuracy, if it was checked.
        run_id: MLflow's run that holds its files.
        unchecked: why its figures could not be checked when it was added, "" where they were.
    """

    name: str
    number: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    run_id: str
    unchecked: str = ""

    @property
    def title(self) -> str:
        """What to call it in a message."""
        return f"{self.name} version {self.number}"

    @property
    def accuracy(self) -> float | None:
        """The accuracy on the test set, None where nobody has checked it."""
        return float(self.tags["accuracy"]) if self.tags.get(_CHECKED_BY) and "accuracy" in self.tags else None


@dataclass(frozen=True)
class Proof:
    """By what the figures of a model are to be checked.

    Attributes:
        public_key: PEM file of the key that it must be signed by.
        dataset_folder: the data set that its answers are computed on, or db:NAME@VERSION. None takes the usual folder;
            but with a key the signer is believed, who has computed them to publish.
        access: how the database is reached.
        skip_bad: leave out images of the data set that cannot be read; else they are an error.
        policy: by whom the run must have been verified to be promoted; None asks for nobody.
        captured: folder or URL of captured answers on which it must be no worse, either; None asks for none.
        labels: CSV file with the labels of captured images.
        say: told of what takes time.
    """

    public_key: Path | None = None
    dataset_folder: Path | None = None
    access: DatabaseAccess = DatabaseAccess()
    skip_bad: bool = False
    policy: Policy | None = None
    captured: str | None = None
    labels: Path | None = None
    say: Callable[[str], None] = lambda line: None

    @property
    def believes_signer(self) -> bool:
        """Whether a signature is enough."""
        return self.public_key is not None and self.dataset_folder is None

    def gather(self, title: str, published: Published) -> Evidence:
        """Compute how a model does, or believe its signer.

        Raises:
            DataError: the data is not there, or is other data.
            ModelError: the model cannot be computed.
        """
        if self.believes_signer:
            return read_claims(title, published)
        if not (get_reference(self._place) or get_url(self._place) or self._place.exists()):
            self._load_snapshot(Reading())  # says that there is none, without the runtime that the model takes
        predictor = build_predictor(published.files[MODEL], Path(title))
        snapshot = self._load_snapshot(self._choose_reading(predictor.model))
        return compute_evidence(title, published, predictor, snapshot, say=self.say)

    def is_same_data(self, *digests: str, published: Published | None = None) -> bool:
        """Say whether digests are of the same data; where they are of two formats, the data itself tells.

        Args:
            published: a model that reads the data as is to be read here.
        """
        if len(set(digests)) == 1:
            return True
        if self.believes_signer:
            return False
        reading = Reading()
        if published is not None:
            reading = self._choose_reading(build_predictor(published.files[MODEL], Path(MODEL)).model)
        snapshot = self._load_snapshot(reading)
        return all(snapshot.recognize(digest).digest == digest for digest in digests)

    def _choose_reading(self, model: PublishedModel) -> Reading:
        """Choose how image files are read for a model: to which size, and how they are fitted to it."""
        if get_reference(self._place):
            return Reading(image_size=model.image_size)
        return Reading(fit=model.fit, skip_bad=self.skip_bad, image_size=model.image_size)

    @property
    def _place(self) -> Path:
        return self.dataset_folder or DATASET_FOLDER

    def _load_snapshot(self, reading: Reading) -> Snapshot:
        return load_snapshot(self._place, self.access, reading)


_USUAL = Proof()


@dataclass(frozen=True)
class Promotion:
    """What came out of a promotion: the versions, and how the new one compares with the one before.

    Attributes:
        former: number of the version that the alias pointed to, None if there was none.
        difference: of accuracy, new minus former.
        p_value: of McNemar's test on the same test images; both are None where there is nothing to compare.
        unchecked: why the figures of the new version could not be checked, "" where they were.
        judged: how both do on captured images, None where that was not asked for.
    """

    name: str
    number: str
    alias: str
    former: str | None = None
    difference: float | None = None
    p_value: float | None = None
    unchecked: str = ""
    judged: Judged | None = None


class Registry:
    """Published models by name, version and alias.

    Args:
        tracking_uri: of an MLflow server or database; None for the SQLite file under the experiments folder.
    """

    def __init__(self, tracking_uri: str | None = None, experiments_folder: Path = Path("experiments")) -> None:
        self._store = Store(tracking_uri, experiments_folder)

    def add(self, folder: Path, name: str, *, alias: str | None = None, proof: Proof = _USUAL) -> Version:
        """Register a published folder as the next version of a model, with an alias where one is given.

        What is registered are the bytes that were checked, and nothing that the manifest does not name but
        attestations, which show by themselves whose they are. Its figures
        are registered if they could be checked; where the usual data set is not there they are left out.

        Raises:
            ModelError: a file was changed, the key's signature is missing, or the figures are not what is claimed.
            DataError: the data set that the proof names is not there, or is another.
            RegistryError: the registry cannot be reached or refuses.
            SettingsError: the name or the alias is none that a registry takes, or is the champion's.
        """
        if not _NAME.fullmatch(name):
            raise SettingsError(f"--name takes letters, digits, spaces, and _ . - (at most 100), got: {name!a}")
        if alias is not None:
            check_alias(alias)
            if alias == CHAMPION:
                raise SettingsError(f"--alias {CHAMPION} is given by: registry promote NAME/VERSION")
        published = read_published(folder, proof.public_key)
        attestations, _ = read_attestations(folder)
        evidence, reason = self._gather(str(folder), published, proof)
        tags = _build_tags(published.manifest, evidence)
        with written_out(folder, published) as copy, self._store.open(f"register {name!r}") as client:
            for attestation, content in attestations.items():
                (copy / ATTESTATIONS).mkdir(exist_ok=True)
                (copy / ATTESTATIONS / attestation).write_bytes(content)
            _create_model(client, name)
            run = client.create_run(self._store.get_experiment_id(EXPERIMENT), run_name=name, tags=tags)
            run_id = run.info.run_id
            try:
                for metric, value in evidence.metrics.items() if evidence else ():
                    client.log_metric(run_id, metric, float(value))
                client.log_artifacts(run_id, str(copy), _ARTIFACTS)
                source = f"{run.info.artifact_uri}/{_ARTIFACTS}"
                version = client.create_model_version(name, source, run_id, tags=tags)
            except BaseException:
                with suppress(Exception):  # what went wrong first is what the user must hear
                    client.set_terminated(run_id, "FAILED")
                raise
            client.set_terminated(run_id, "FINISHED")
            if alias is not None:
                client.set_registered_model_alias(name, alias, str(version.version))
        return Version(name, str(version.version), () if alias is None else (alias,), tags, run_id, reason)

    def _gather(self, title: str, published: Published, proof: Proof) -> tuple[Evidence | None, str]:
        """Gather evidence and hold the manifest against it; else say why there is none, if nobody named the data."""
        try:
            evidence = proof.gather(title, published)
        except DataError as error:
            if proof.dataset_folder is not None:
                raise
            return None, str(error).partition("; ")[0]  # its remedy may name data that the model was not trained on
        check_claims(title, published, evidence)
        return evidence, ""

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
            raise SettingsError(f"name a model of the registry as NAME@ALIAS or NAME/VERSION, got: {reference!a}")
        name, alias, number = match["name"], match["alias"], match["version"]
        with self._store.open(f"find {reference}") as client:
            model = _get(client.get_registered_model, name)
            number = str(model.aliases.get(alias, "")) if model is not None and alias else number
            found = _get(client.get_model_version, name, number) if model is not None and number else None
            if found is not None:
                return _to_version(found, model.aliases)
        versions = self.list(name)  # which knows the other models
        known = sorted({alias for version in versions for alias in version.aliases})
        numbers = [version.number for version in versions]
        what = f"the alias {alias!a}" if alias else f"a version {match['version']}"
        raise RegistryError(
            f"{name} does not have {what}: it has the aliases {', '.join(known[:10]) or '(none)'} "
            f"and {len(numbers):,} versions{f', {numbers[0]} to {numbers[-1]}' if numbers else ''}"
        )

    def promote(
        self, reference: str, *, alias: str = CHAMPION, allow_loss: bool = False, proof: Proof = _USUAL
    ) -> Promotion:
        """Point an alias to a version, if that is not significantly worse than the one that it points to.

        Both are compared by McNemar's test on the images of the test set, image by image. The answers are computed
        here, or believed where a trusted key has signed both.

        Raises:
            RegistryError: the version loses significantly, or was tested on other data, or cannot be checked without
                the data, and that is not allowed; or another process has moved the alias meanwhile.
            ModelError: the files of a version are not what was registered, or its manifest claims what it is not, or
                its run was not verified as the policy asks for.
            DataError: the data set that the proof names is not there, or is another.
            SettingsError: the alias is none that a registry takes.
        """
        check_alias(alias)
        version = self.find(reference)
        folder, published = self._fetch(version, public_key=proof.public_key)
        if proof.policy is not None:
            check_published(folder, published, proof.policy)
        former = self._find_alias(version.name, alias)
        evidence, reason = self._gather(version.title, published, proof)
        if evidence is None and not allow_loss:
            raise RegistryError(
                f"{version.title} cannot be checked: {reason}. Name the run's data with --dataset_folder, or the "
                "signer's key with --public_key; --allow_loss promotes without a check"
            )
        promotion = Promotion(version.name, version.number, alias, former.number if former else None, unchecked=reason)
        if former is not None and former.number != version.number and evidence is not None:
            promotion = self._weigh(promotion, former, published, evidence, proof, allow_loss)
        if proof.captured and proof.labels:
            if former is None or former.number == version.number:
                proof.say(f"note: {alias} is no other version, so captured images compare nothing")
            else:
                promotion = replace(promotion, judged=self._judge(former, version, alias, proof, allow_loss))
        with self._store.open(f"promote {version.name!r}") as client:
            model = client.get_registered_model(version.name)
            if str(model.aliases.get(alias, "")) != (former.number if former else ""):
                raise RegistryError(
                    f"{version.name}@{alias} was moved by another process; start again to compare with its new version"
                )
            for name, value in (_describe(evidence) if evidence else {}).items():
                client.set_model_version_tag(version.name, version.number, name, value)
            client.set_registered_model_alias(version.name, alias, version.number)
        return promotion

    def _weigh(
        self,
        promotion: Promotion,
        former: Version,
        published: Published,
        evidence: Evidence,
        proof: Proof,
        allow_loss: bool,
    ) -> Promotion:
        """Compare the model that is promoted with the one before, and refuse a significant loss."""
        try:
            difference, p_value = self._compare(former, published, evidence, proof)
        except ImageClassifierError:
            if not allow_loss:
                raise
            return promotion
        if difference < 0 and p_value < 1 - CONFIDENCE and not allow_loss:
            raise RegistryError(
                f"{promotion.name} version {promotion.number} is worse than the {promotion.alias}, version "
                f"{former.number}, by {-100 * difference:.2f} points of accuracy (p = {p_value:.2g}, McNemar's test on "
                f"{len(evidence.right):,} images); --allow_loss promotes it all the same"
            )
        return replace(promotion, difference=difference, p_value=p_value)

    def _compare(self, former: Version, published: Published, evidence: Evidence, proof: Proof) -> tuple[float, float]:
        """Compare a model with the one before: the difference of accuracy, new minus former, and its p-value."""
        key = proof.public_key if proof.believes_signer else None
        try:
            _, champion = self._fetch(former, public_key=key)
        except ModelError as error:
            raise ModelError(f"{former.title}, to compare with: {error}; --allow_loss promotes without") from error
        digests = (champion.manifest["data_digest"], published.manifest["data_digest"])
        if not proof.is_same_data(*digests, published=published):
            sizes = [each.manifest.get("image_size", DEFAULT_IMAGE_SIZE) for each in (published, champion)]
            resized = f" (images of {sizes[0]} and of {sizes[1]} pixels)" if sizes[0] != sizes[1] else ""
            raise RegistryError(
                f"the new version and {former.title} were tested on different data{resized}, so it is unknown which is "
                "better; --allow_loss promotes it anyway"
            )
        known = proof.gather(former.title, champion)
        try:
            check_claims(former.title, champion, known)
        except ModelError as error:  # its answers count, which were computed, and not its claims
            logger.warning("%s", error)
        return compare_answers(known, evidence)

    def _judge(self, former: Version, version: Version, alias: str, proof: Proof, allow_loss: bool) -> Judged:
        """Judge a version on captured images, beside the one before.

        Raises:
            RegistryError: it is significantly worse, and that is not allowed.
            DataError: the captures or labels cannot be read, or it has answered none of them.
        """
        assert proof.captured and proof.labels
        folders = [self._fetch(each)[0] for each in (version, former)]
        candidate, before = map(load_predictor, folders)
        judged = judge(read_captures(proof.captured), proof.labels, candidate, before)
        p_value = compute_mcnemar_test(judged.only_former, judged.only_candidate)
        if judged.difference < 0 and p_value < 1 - CONFIDENCE and not allow_loss:
            raise RegistryError(
                f"{version.title} is worse than the {alias}, version {former.number}, by "
                f"{-100 * judged.difference:.2f} points of accuracy (p = {p_value:.2g}, McNemar's test on "
                f"{judged.num_images:,} captured images); --allow_loss promotes it anyway"
            )
        return judged

    def _find_alias(self, name: str, alias: str) -> Version | None:
        with self._store.open(f"find {name}@{alias}") as client:
            aliases = client.get_registered_model(name).aliases
            if alias not in aliases:
                return None
            return _to_version(client.get_model_version(name, str(aliases[alias])), aliases)

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
        return self._fetch(version, cache, public_key=public_key)[0], version

    def _fetch(
        self, version: Version, cache: Path | None = None, *, public_key: Path | None = None
    ) -> tuple[Path, Published]:
        """Fetch a version unless it is there; return its folder, and what was read there and checked."""
        digest = version.tags.get("manifest_digest", "")
        if not is_digest(digest) or not version.number.isdecimal():
            raise RegistryError(f"{version.title} was not registered by this package: it has no manifest_digest")
        cache = cache or find_cache()
        if cache is None:
            raise SettingsError("there is no cache folder for models; set IMAGE_CLASSIFIER_CACHE to a folder")
        folder = cache / "models" / version.name / f"{version.number}-{digest[:12]}"
        if not folder.is_dir():
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                with locked_folder(folder.parent):
                    if not folder.is_dir():  # by now: another process may have fetched it meanwhile
                        self._download(version, folder)
            except OSError as error:
                raise storage_error(folder, error) from error
        try:
            published = read_published(folder, public_key)
            if published.manifest["digest"] != digest:
                raise ModelError(f"{folder} differs from the registered {version.title}")
        except ModelError as error:
            raise ModelError(f"{error}; remove {folder} to fetch it again") from error
        return folder, published

    def _download(self, version: Version, folder: Path) -> None:
        with (
            written_beside(folder, replace=False) as temporary,
            self._store.open(f"fetch {version.name}/{version.number}") as client,
        ):
            client.download_artifacts(version.run_id, _ARTIFACTS, str(temporary.parent))
            (temporary.parent / _ARTIFACTS).rename(temporary)


def check_alias(alias: str) -> None:
    """Check that an alias is one, and no other spelling of the champion's, which some databases take for the same.

    Raises:
        SettingsError: it is not.
    """
    if not _ALIAS.fullmatch(alias):
        raise SettingsError(f"--alias takes letters, digits and _ . - (at most 100), got: {alias!a}")
    if alias.lower() == CHAMPION and alias != CHAMPION:
        raise SettingsError(f"--alias {alias} is another spelling of {CHAMPION}; choose that, or another")


def compare_answers(first: Evidence, second: Evidence) -> tuple[float, float]:
    """Compare two models on one test set: the difference of accuracy, second minus first, and its p-value."""
    if len(first.right) != len(second.right):
        raise ModelError("the two models have predictions for different numbers of images; publish both runs again")
    only_first, only_second = int((first.right & ~second.right).sum()), int((second.right & ~first.right).sum())
    return (only_second - only_first) / len(first.right), compute_mcnemar_test(only_first, only_second)


def _build_tags(manifest: dict[str, Any], evidence: Evidence | None) -> dict[str, str]:
    tags = {
        "run": f"{manifest['experiment_name']}/{manifest['run_name']}",
        "data_digest": manifest["data_digest"],
        "weights_digest": str(manifest.get("weights_digest")),
        "manifest_digest": manifest["digest"],
        "views": str(manifest.get("views")),
    }
    return tags | (_describe(evidence) if evidence else {})


def _describe(evidence: Evidence) -> dict[str, str]:
    return {"accuracy": repr(evidence.metrics["accuracy"]), _CHECKED_BY: evidence.source}


def _create_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _get(get: Callable[..., Any], *words: str) -> Any:
    """Get something of MLflow's, None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return get(*words)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


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
