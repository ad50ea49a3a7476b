"""Settings of the server: immutable, and validated on construction."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from image_classifier.choices import ServingPrecision
from image_classifier.errors import SettingsError

LogFormat = Literal["plain", "ecs"]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the server.

    Attributes:
        model: Published folder or ONNX file, its URL such as s3://bucket/folder, or models:/NAME@ALIAS of the registry.
        tracking_uri: MLflow server or database of the registry; by default the SQLite file in experiments_folder.
        experiments_folder: Folder of all experiments, and of the registry's file.
        model_name: Name of the model in the Open Inference Protocol; by default the registry's name, or
            image_classifier.
        public_key: Public key of the model's signature; without it, signatures are not checked.
        policy: YAML file that defines who must have verified the model's run; without it, verdicts are not checked.
        precision: fp32, or int8 if such a model was published.
        host: Address to listen on; any but a loopback address needs api_keys_file, jwt_issuer or no_auth.
        port: Port to listen on; 0 chooses a free one.
        num_threads: Inference threads, each with its own batch; 0 for one per core.
        max_batch: Maximum batch size.
        max_queue: Maximum number of waiting images; further ones get status 429.
        timeout_s: Maximum seconds from a request's acceptance to its answer; later ones get status 503.
        max_body_bytes: Maximum size of a request's body.
        max_pixels: Maximum number of pixels of an image file. A JPEG counts at the scale at which it is decoded, 1/8
            for most photos, unless it is progressive. A WebP counts 1.5 times.
        max_images: Maximum number of images per request.
        max_connections: Maximum number of open connections per process; further ones get status 503.
        header_timeout_s: Maximum seconds to receive the head of a request.
        body_timeout_s: Maximum seconds to receive the body.
        keep_alive_s: Maximum idle seconds between two requests of a connection.
        drain_s: Seconds after SIGTERM in which the server is not ready but still accepts requests.
        grace_s: Seconds after that to finish accepted requests.
        cache_size: Number of answers cached for repeated images; 0 for no cache.
        rate_limit: Requests per second, caller and worker; further ones get status 429. 0 for no limit.
        pixel_rate_limit: Decoded pixels per second, caller and worker; 0 for no limit.
        reload_every_s: Interval in seconds to check for a moved alias, a changed model or changed keys; 0 for never.
            SIGHUP checks at once.
        api_keys_file: File with one line NAME:SHA256 per accepted API key.
        jwt_issuer: Issuer (iss) of accepted JSON Web Tokens.
        jwt_audience: Audience (aud) that a token must name.
        jwt_jwks: File or https URL of the issuer's public keys (JWKS).
        no_auth: Answer everybody, on any address.
        allowed_hosts: Names, separated by commas, that the Host header may have besides IP addresses; * for any. By
            default localhost, host and this machine's name; with keys or tokens any.
        root_path: Path of the server behind a reverse proxy.
        trusted_proxies: IP addresses or networks, separated by commas, whose X-Forwarded headers are trusted.
        log_format: Plain text (plain), or JSON in the Elastic Common Schema (ecs).
        log_lines_per_s: Maximum log lines per second, and as many for errors; the next line says how many were
            omitted.
        drift_window: Number of latest images, 200 or more, whose drift from the test set the metrics show; 0 for none.
        traces: Send OpenTelemetry traces, configured by the OTEL_EXPORTER_OTLP_ variables.
        canary: A second model, named as MODEL is, that answers a part of the callers; by default none.
        canary_fraction: Fraction of the callers that the canary answers, always the same callers.
        shadow: A second model that computes answered images for comparison; clients never get its answers.
        shadow_fraction: Fraction of the images that the shadow computes.
        capture: Folder, or URL that fsspec supports, for captured images; by default none.
        capture_fraction: Fraction of the requests that are captured.
        capture_flush_s: Maximum seconds of answers that the capture loses if the server is killed.
        capture_max_bytes: Maximum size of all captured files; then nothing more is captured.
        capture_memory_bytes: Maximum memory of images that wait to be written; further ones are not captured.
    """

    model: str
    tracking_uri: str = ""
    experiments_folder: Path = Path("experiments")
    model_name: str = ""
    public_key: Path | None = None
    policy: Path | None = None
    precision: ServingPrecision = "fp32"
    host: str = "127.0.0.1"
    port: int = 8000
    num_threads: int = 0
    max_batch: int = 32
    max_queue: int = 1024
    timeout_s: float = 5.0
    max_body_bytes: int = 16 * 2**20
    max_pixels: int = 12_500_000
    max_images: int = 64
    max_connections: int = 960
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: int = 75
    drain_s: float = 1.0
    grace_s: float = 30.0
    cache_size: int = 0
    rate_limit: float = 0.0
    pixel_rate_limit: float = 0.0
    reload_every_s: float = 30.0
    api_keys_file: Path | None = None
    jwt_issuer: str = ""
    jwt_audience: str = ""
    jwt_jwks: str = ""
    no_auth: bool = False
    allowed_hosts: str = ""
    root_path: str = ""
    trusted_proxies: str = ""
    log_format: LogFormat = "plain"
    log_lines_per_s: int = 20
    drift_window: int = 0
    traces: bool = False
    canary: str = ""
    canary_fraction: float = 0.05
    shadow: str = ""
    shadow_fraction: float = 1.0
    capture: str = ""
    capture_fraction: float = 0.1
    capture_flush_s: float = 10.0
    capture_max_bytes: int = 10 * 2**30
    capture_memory_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        if not self.model:
            raise SettingsError("MODEL is missing: name a published folder, an ONNX file, or models:/NAME@ALIAS")
        for name, kind in (("precision", ServingPrecision), ("log_format", LogFormat)):
            self._check(name, getattr(self, name) in get_args(kind), f"one of {', '.join(get_args(kind))}")
        self._check("port", 0 <= self.port <= 65535, "a whole number from 0 to 65535")
        positive = ("max_batch", "max_queue", "max_body_bytes", "max_pixels", "max_images", "max_connections")
        for name in (*positive, "keep_alive_s", "capture_max_bytes", "capture_memory_bytes"):
            self._check(name, getattr(self, name) >= 1, "a whole number of 1 or more")
        for name in ("num_threads", "cache_size", "log_lines_per_s"):
            self._check(name, getattr(self, name) >= 0, "a whole number of 0 or more")
        for name in ("timeout_s", "header_timeout_s", "body_timeout_s", "capture_flush_s"):
            self._check(name, 0 < getattr(self, name) < float("inf"), "a number above 0")
        for name in ("drain_s", "grace_s", "rate_limit", "pixel_rate_limit", "reload_every_s"):
            self._check(name, 0 <= getattr(self, name) < float("inf"), "a number of 0 or more")
        for name in ("canary_fraction", "shadow_fraction", "capture_fraction"):
            self._check(name, 0 < getattr(self, name) <= 1, "a number above 0, up to 1")
        if self.canary and (self.shadow or self.cache_size):
            raise SettingsError("--canary excludes --shadow and --cache_size; leave one of them out")
        is_window = self.drift_window == 0 or self.drift_window >= 200  # fewer images may look like drift by chance
        self._check("drift_window", is_window, "0, or a whole number of 200 or more")
        self._check("max_images", self.max_images <= self.max_queue, "no more than --max_queue")
        is_path = self.root_path == "" or (self.root_path.startswith("/") and not self.root_path.endswith("/"))
        self._check("root_path", is_path, "a path such as /classifier, without a slash at the end")
        jwt = (self.jwt_issuer, self.jwt_audience, self.jwt_jwks)
        if any(jwt) and not all(jwt):
            raise SettingsError("--jwt_issuer, --jwt_audience and --jwt_jwks are needed together; give all three")
        is_source = is_file_or_https(self.jwt_jwks)
        self._check("jwt_jwks", is_source, "a file, or an https URL without user name and password")
        if self.no_auth and (self.api_keys_file or any(jwt)):
            raise SettingsError("--no_auth contradicts --api_keys_file and --jwt_issuer; leave one of them out")
        if not (self.no_auth or self.has_auth or self.is_local):
            raise SettingsError(
                f"--host {self.host} can be reached from other machines: give --api_keys_file, or --jwt_issuer with "
                "--jwt_audience and --jwt_jwks, or --no_auth true"
            )

    def _check(self, name: str, is_good: bool, takes: str) -> None:
        if not is_good:
            raise SettingsError(f"--{name} takes {takes}, got: {getattr(self, name)!r}")

    @property
    def has_auth(self) -> bool:
        """Whether callers must authenticate."""
        return self.api_keys_file is not None or bool(self.jwt_issuer)

    @property
    def is_local(self) -> bool:
        """Whether the address is a loopback address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def count_threads(self) -> int:
        """Return the number of inference threads."""
        return self.num_threads or len(os.sched_getaffinity(0))

    def find_allowed_hosts(self) -> frozenset[str] | None:
        """Return the lower-case names that the Host header may have besides IP addresses; None for any.

        Without authentication, this prevents DNS rebinding: a web page whose name resolves to this server's address.
        """
        if self.allowed_hosts == "*" or (not self.allowed_hosts and self.has_auth):
            return None
        names = self.allowed_hosts.split(",") if self.allowed_hosts else ["localhost", self.host, socket.gethostname()]
        return frozenset(name.strip().lower() for name in names)


def is_file_or_https(source: str) -> bool:
    """Return whether a text is a file's path, or an https URL with a host and no user name."""
    try:
        address = urlsplit(source)
    except ValueError:
        return False
    if address.scheme == "https":
        return bool(address.hostname) and address.username is None
    return "://" not in source
