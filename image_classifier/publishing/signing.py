"""Sign a published folder with OpenSSF's model-signing; `published/folder.py` verifies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from image_classifier.errors import ModelError, SettingsError
from image_classifier.extras import load_extra
from image_classifier.published.folder import SIGNATURE, one_line

KEYLESS = "keyless"
"""Instead of a key: the identity that the environment vouches for, such as a workflow of GitHub's."""

Signer = Callable[[Path], None]


def build_signer(key: str) -> Signer:
    """Build what signs a folder, and so check the key before any work is done.

    Args:
        key: PEM file of an elliptic curve's private key, or `keyless`. Keyless signing asks the environment's identity
            provider for a token and Sigstore for a certificate, and enters the signature into its public log.

    Raises:
        SettingsError: the key cannot be read or is of another kind, or model-signing is not installed.
    """
    config: Any = load_extra("model_signing.signing", "publish").Config()
    hashing = load_extra("model_signing.hashing", "publish")
    try:
        if key == KEYLESS:
            config.use_sigstore_signer(use_ambient_credentials=True)
        else:
            config.use_elliptic_key_signer(private_key=Path(key))
    except OSError as error:
        raise SettingsError(f"--sign_key {key} cannot be read: {error.strerror}") from error
    except Exception as error:
        raise SettingsError(
            f"--sign_key {key} is no private key on the curve P-256, P-384 or P-521 without a password: "
            f"{one_line(error)}; make one with: openssl ecparam -genkey -name prime256v1 -noout -out KEY"
        ) from error

    def sign(folder: Path) -> None:
        try:
            ignoring = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
            config.set_hashing_config(ignoring).sign(folder, folder / SIGNATURE)
        except Exception as error:
            raise ModelError(f"the model cannot be signed: {one_line(error)}; nothing was published") from error

    return sign
