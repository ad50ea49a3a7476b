"""Sign a published folder with OpenSSF's model-signing, and statements; `published/` verifies both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from image_classifier import files
from image_classifier.errors import ModelError, SettingsError
from image_classifier.extras import load_extra
from image_classifier.published.attestation import (
    MAX_KEY_BYTES,
    build_hash,
    compute_key_id,
    compute_preimage,
    is_supported,
    serialize_envelope,
)
from image_classifier.published.folder import SIGNATURE
from image_classifier.text import one_line

KEYLESS = "keyless"
"""Instead of a key: the identity that the environment vouches for, such as a workflow of GitHub's."""

Signer = Callable[[Path], None]
StatementSigner = Callable[[bytes], bytes]
"""From an in-toto statement to the file that holds it with its signature."""


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
    except Exception as error:
        raise _key_error(key, error) from error

    def sign(folder: Path) -> None:
        try:
            ignoring = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
            config.set_hashing_config(ignoring).sign(folder, folder / SIGNATURE)
        except Exception as error:
            raise ModelError(f"the model cannot be signed: {one_line(error)}; nothing was published") from error

    return sign


def build_statement_signer(key: str) -> StatementSigner:
    """Build what signs statements, and so check the key before any work is done.

    Args:
        key: as `build_signer` takes it. A key gives a DSSE envelope, `keyless` a Sigstore bundle.

    Raises:
        SettingsError: the key cannot be read or is of another kind, or an extra is not installed.
    """
    if key == KEYLESS:
        _get_token()  # again when it is signed, as one soon expires
        return _sign_keyless
    serialization = load_extra("cryptography.hazmat.primitives.serialization", "attest")
    curves = load_extra("cryptography.hazmat.primitives.asymmetric.ec", "attest")
    try:
        private = serialization.load_pem_private_key(files.read_file(Path(key), MAX_KEY_BYTES), None)
        if not is_supported(private.public_key()):
            raise ValueError("it is on another curve, or on none")
    except Exception as error:
        raise _key_error(key, error) from error

    def sign(statement: bytes) -> bytes:
        signature = private.sign(compute_preimage(statement), curves.ECDSA(build_hash(private.curve.name)))
        return serialize_envelope(statement, compute_key_id(private.public_key()), signature)

    return sign


def _sign_keyless(statement: bytes) -> bytes:
    """Sign with the identity of the environment, certified by Sigstore and entered into its public log."""
    signing, models = load_extra("sigstore.sign", "attest"), load_extra("sigstore.models", "attest")
    dsse = load_extra("sigstore.dsse", "attest")
    token = _get_token()
    try:
        context = signing.SigningContext.from_trust_config(models.ClientTrustConfig.production())
        with context.signer(token) as signer:
            return str(signer.sign_dsse(dsse.Statement(statement)).to_json()).encode()
    except Exception as error:  # of a network, of an identity provider, of Sigstore
        raise ModelError(f"the verdict cannot be signed: {one_line(error)}") from error


def _get_token() -> Any:
    """Get a token for the identity that the environment vouches for.

    Raises:
        SettingsError: it vouches for none.
    """
    oidc = load_extra("sigstore.oidc", "attest")
    try:
        token = oidc.detect_credential()
        if token is None:
            raise ValueError("there is no identity to sign with; a workflow needs the permission id-token: write")
        return oidc.IdentityToken(token)
    except Exception as error:  # of an identity provider
        raise SettingsError(f"--sign_key keyless: {one_line(error)}") from error


def _key_error(key: str, error: Exception) -> SettingsError:
    if isinstance(error, OSError):
        return SettingsError(f"--sign_key {key} cannot be read: {error.strerror}")
    reason = "it is one of another kind, such as RSA" if isinstance(error, AttributeError) else one_line(error)
    return SettingsError(
        f"--sign_key {key} is not a private key on the curve P-256, P-384 or P-521 without a password: "
        f"{reason}; make one with: openssl ecparam -genkey -name prime256v1 -noout -out KEY"
    )
