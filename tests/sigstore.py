"""A Sigstore of the tests' own: it vouches for any identity, without a network, in the forms of the real one.

A certificate authority (Fulcio), the log of its certificates, and the log of signatures (Rekor), each no more than a
key. What verifies is the real code, told by a trust configuration whose keys to believe.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from google.protobuf import json_format
from model_signing import signing
from model_signing._signing import sign_sigstore
from model_signing._signing import signing as signing_interface
from model_signing.hashing import Config as HashingConfig
from sigstore.models import Bundle

GITHUB_ISSUER = "https://token.actions.githubusercontent.com"
_ORIGIN = "log.test"
_SCT_LIST = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")


class Sigstore:
    """An authority that everybody can get a certificate of, for any identity."""

    def __init__(self) -> None:
        self._authority_key, self._certificates_key, self._log_key = (
            ec.generate_private_key(ec.SECP256R1()) for _ in range(3)
        )
        self._now = datetime.now(UTC).replace(microsecond=0)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority.test")])
        self._authority = (
            self._begin_certificate(name, self._authority_key.public_key(), timedelta(days=1))
            .issuer_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_build_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._authority_key.public_key()), critical=False)
            .sign(self._authority_key, hashes.SHA256())
        )

    def write_trust_config(self, path: Path) -> Path:
        """Write down whose keys are to be believed."""
        start = {"start": (self._now - timedelta(days=2)).isoformat().replace("+00:00", "Z")}

        def describe_log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            return {
                "baseUrl": "http://127.0.0.1:1",
                "hashAlgorithm": "SHA2_256",
                "publicKey": {
                    "rawBytes": _encode(_get_public(key)),
                    "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                    "validFor": start,
                },
                "logId": {"keyId": _encode(_get_id(key))},
            }

        authority = {
            "subject": {"organization": "test", "commonName": "authority.test"},
            "uri": "http://127.0.0.1:1",
            "certChain": {"certificates": [{"rawBytes": _encode(self._authority.public_bytes(Encoding.DER))}]},
            "validFor": start,
        }
        config = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [describe_log(self._log_key)],
                "certificateAuthorities": [authority],
                "ctlogs": [describe_log(self._certificates_key)],
                "timestampAuthorities": [],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [],
                "oidcUrls": [],
                "rekorTlogUrls": [],
                "tsaUrls": [],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaConfig": {"selector": "ANY"},
            },
        }
        path.write_text(json.dumps(config))
        return path

    def sign(self, folder: Path, identity: str, *, issuer: str = GITHUB_ISSUER, signature: str = "model.sig") -> None:
        """Sign a folder as an identity, as `model_signing sign sigstore` does."""
        sigstore = self

        class Signer(signing_interface.Signer):
            def sign(self, payload: signing_interface.Payload) -> signing_interface.Signature:
                statement = json_format.MessageToJson(payload.statement.pb).encode()
                return sign_sigstore.Signature(Bundle.from_json(sigstore._bundle(statement, identity, issuer)))

        ignoring = HashingConfig()  # type: ignore[no-untyped-call]
        ignoring.set_ignored_paths(paths=[signature], ignore_git_paths=False)
        config = signing.Config()  # type: ignore[no-untyped-call]
        config.set_hashing_config(ignoring)
        config._signer = Signer()
        config.sign(folder, folder / signature)

    def sign_statement(self, statement: bytes, identity: str, *, issuer: str = GITHUB_ISSUER) -> bytes:
        """Sign an in-toto statement as an identity: a Sigstore bundle."""
        return self._bundle(statement, identity, issuer).encode()

    def _begin_certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: timedelta
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - lifetime)
            .not_valid_after(self._now + lifetime)
        )

    def _certify(self, key: ec.EllipticCurvePublicKey, identity: str, issuer: str) -> x509.Certificate:
        """Certify a key, with the receipt of the certificates' log (RFC 6962) inside."""
        builder = (
            self._begin_certificate(x509.Name([]), key, timedelta(minutes=10))
            .issuer_name(self._authority.subject)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True)
            .add_extension(_build_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._authority_key.public_key()), critical=False
            )
            .add_extension(x509.UnrecognizedExtension(_ISSUER, issuer.encode()), critical=False)
        )
        content = builder.sign(self._authority_key, hashes.SHA256()).tbs_certificate_bytes
        milliseconds = int(self._now.timestamp() * 1000)
        issuer_id = hashlib.sha256(_get_public(self._authority_key)).digest()
        entry = issuer_id + len(content).to_bytes(3, "big") + content
        signed = struct.pack("!BBQH", 0, 0, milliseconds, 1) + entry + struct.pack("!H", 0)
        signature = self._certificates_key.sign(signed, ec.ECDSA(hashes.SHA256()))
        receipt = b"\0" + _get_id(self._certificates_key) + struct.pack("!QH", milliseconds, 0)
        receipt += b"\4\3" + struct.pack("!H", len(signature)) + signature  # SHA-256, ECDSA
        receipts = struct.pack("!HH", len(receipt) + 2, len(receipt)) + receipt
        encoded = b"\4" + _encode_length(len(receipts)) + receipts
        return builder.add_extension(x509.UnrecognizedExtension(_SCT_LIST, encoded), critical=False).sign(
            self._authority_key, hashes.SHA256()
        )

    def _bundle(self, payload: bytes, identity: str, issuer: str) -> str:
        """Sign a payload with a key that exists for this alone, and enter it into a log of one entry."""
        kind = "application/vnd.in-toto+json"
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certify(key.public_key(), identity, issuer)
        signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)
        signature = _encode(key.sign(signed, ec.ECDSA(hashes.SHA256())))
        envelope = {"payload": _encode(payload), "payloadType": kind, "signatures": [{"sig": signature}]}
        body = {
            "apiVersion": "0.0.1",
            "kind": "dsse",
            "spec": {
                "envelopeHash": _describe_hash(json.dumps(envelope).encode()),
                "payloadHash": _describe_hash(payload),
                "signatures": [{"signature": signature, "verifier": _encode(certificate.public_bytes(Encoding.PEM))}],
            },
        }
        entry = _serialize(body)
        seconds, log_id = int(self._now.timestamp()), _get_id(self._log_key)
        promise = {"body": _encode(entry), "integratedTime": seconds, "logID": log_id.hex(), "logIndex": 0}
        root = hashlib.sha256(b"\0" + entry).digest()
        note = f"{_ORIGIN}\n1\n{_encode(root)}\n"
        checkpoint = f"{note}\n\u2014 {_ORIGIN} {_encode(log_id[:4] + self._sign(note.encode()))}\n"
        logged = {
            "logIndex": "0",
            "logId": {"keyId": _encode(log_id)},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(seconds),
            "inclusionPromise": {"signedEntryTimestamp": _encode(self._sign(_serialize(promise)))},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": _encode(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": checkpoint},
            },
            "canonicalizedBody": _encode(entry),
        }
        return json.dumps(
            {
                "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
                "verificationMaterial": {
                    "certificate": {"rawBytes": _encode(certificate.public_bytes(Encoding.DER))},
                    "tlogEntries": [logged],
                },
                "dsseEnvelope": envelope,
            }
        )

    def _sign(self, content: bytes) -> bytes:
        return self._log_key.sign(content, ec.ECDSA(hashes.SHA256()))


def _build_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _describe_hash(content: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(content).hexdigest()}


def _serialize(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _get_public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _get_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_get_public(key)).digest()


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _encode_length(length: int) -> bytes:
    return bytes([length]) if length < 128 else bytes([0x81, length])
