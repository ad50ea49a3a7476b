"""Pushes a published model to the Hugging Face Hub, or to a compatible server in HF_ENDPOINT."""

from __future__ import annotations

import os
from pathlib import Path

from image_classifier.errors import RegistryError
from image_classifier.extras import load_extra
from image_classifier.progress import track
from image_classifier.published.attestation import read_attestations
from image_classifier.published.folder import (
    ATTESTATIONS,
    CARD,
    INT8_MODEL,
    MANIFEST,
    MODEL,
    PARITY,
    REFERENCE,
    SBOM,
    SIGNATURE,
    find_published,
    read_published,
)
from image_classifier.text import one_line

README = "README.md"
"""The name under which the Hub shows the card."""

_OURS = {MODEL, INT8_MODEL, PARITY, REFERENCE, CARD, SBOM, MANIFEST, SIGNATURE}


def push(path: Path, repository: str, *, private: bool = False, public_key: Path | None = None) -> str:
    """Push a published model in one commit, with its card as README.md and its verdicts; files of an earlier
    version go.

    Args:
        path: folder of a published run, or of the published model in it.
        repository: OWNER/NAME; made if there is none.
        private: make it so that only its owner sees it; of one that is there nothing is changed.
        public_key: PEM file of the key that the model must be signed by; None checks no signature.

    Returns:
        The commit's address.

    Raises:
        ModelError: there is no published model, or it was changed.
        RegistryError: the Hub cannot be reached, or refuses.
        SettingsError: huggingface-hub is not installed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when it is imported, as the next one is
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    hub = load_extra("huggingface_hub", "hub")
    folder = find_published(path)
    published = read_published(folder, public_key)
    verdicts, _ = read_attestations(folder)
    name = "{experiment_name}/{run_name}".format_map(published.manifest)
    files = published.files
    files[README] = files[CARD]
    files |= {f"{ATTESTATIONS}/{file}": content for file, content in verdicts.items()}
    api = hub.HfApi(library_name="image-classifier")
    try:
        with track(f"pushing to {repository}"):
            api.create_repo(repository, private=private, exist_ok=True)
            present = api.list_repo_files(repository)
            stale = {each for each in present if each in _OURS or each.startswith(f"{ATTESTATIONS}/")} - files.keys()
            operations = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
            operations += [hub.CommitOperationDelete(name) for name in sorted(stale)]
            commit = api.create_commit(repository, operations, commit_message=f"Publish {name}")
    except Exception as error:  # of the Hub, of the network, of the token
        raise RegistryError(
            f"cannot push to {repository} at {api.endpoint}: {one_line(error)}; check the name, the network, and the "
            "token in HF_TOKEN"
        ) from error
    return str(commit.commit_url)
