"""Every setting of the server: frozen, and checked when made."""

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
    """What is served, where, to whom, and within which limits.

    Attributes:
        model: Published folder or ONNX file, or its URL such as s3://bucket/folder, or models:/NAME@ALIAS of the
            registry.
        tracking_uri: MLflow server or database that models:/ names are looked up in; by default the SQLite file under
            experiments_folder.
        experiments_folder: Folder that holds all experiments, and the registry's file.
        model_name: Name of the model in the Open Inference Protocol; by default the registry's name, or
            image_classifier.
        public_key: Key that the model's signature must be made with; without it signatures are not checked.
        policy: YAML file that says by whom the model's run must have been verified; without it nobody is asked for.
        precision: fp32, or the int8 network where one was published.
        host: Address to listen on; any but a loopback address needs api_keys_file, jwt_issuer or no_auth.
        port: Port to listen on; 0 takes a free one.
        num_threads: Threads that compute, each a batch of its own; 0 for one a core.
        max_batch: Images that are computed at once, at most.
        max_queue: Images that may wait; one more is refused with 429.
        timeout_s: Seconds from a request's acceptance to its answer; later it is given up with 503.
        max_body_bytes: Bytes of a request's body.
        max_pixels: Pixels of an image file that are decoded. Those of a JPEG count at the scale at which it is decoded,
            1/8 for most photos, unless it is progressive. Those of a WebP count one and a half times.
        max_images: Images in one request.
        max_connections: Open connections of one process; one more is refused with 503.
        header_timeout_s: Seconds that a client may take to send the head of a request.
        body_timeout_s: Seconds that a client may take to send the body.
        keep_alive_s: Seconds that a connection may idle between two requests.
        drain_s: Seconds after SIGTERM in which the server says not ready and still takes requests.
        grace_s: Seconds after that in which accepted requests are finished.
        cache_size: Answers that are kept for images that come again; 0 for none.
        rate_limit: Requests a second of one caller, to each worker; one more is refused with 429. 0 for no limit.
        pixel_rate_limit: Pixels a second that one caller may have decoded, by each worker; 0 for no limit.
        reload_every_s: Seconds between two looks at whether the alias moved, or the model or the keys changed; 0 for
            never. SIGHUP looks at once.
        api_keys_file: File with a line NAME:SHA256 for each key that is accepted.
        jwt_issuer: Issuer (iss) of the JSON web tokens that are accepted.
        jwt_audience: Audience (aud) that such a token must name.
        jwt_jwks: File or https address of the issuer's public keys (JWKS).
        no_auth: Answer everybody, on any address.
        allowed_hosts: Names, with commas, that the Host header of a request may have beside IP addresses; * for any.
            By default localhost, host and the name of this machine; with keys or tokens any.
        root_path: Path under which a proxy in front shows the server.
        trusted_proxies: Addresses or networks, with commas, whose X-Forwarded headers are trusted.
        log_format: Lines for people (plain) or JSON in the Elastic Common Schema (ecs).
        log_lines_per_s: Lines in a second, at most, and as many of errors; the next line says how many were left out.
        drift_window: Latest images whose drift from the model's test set the metrics show, 200 or more; 0 for none.
        traces: Send OpenTelemetry traces to where the OTEL_EXPORTER_OTLP_ variables say.
        canary: A second model, named as MODEL is, that answers a part of the callers; by default none.
        canary_fraction: Fraction of the callers that the canary answers, the same ones always.
        shadow: A second model that computes what was answered, and is compared; nobody gets its answers.
        shadow_fraction: Fraction of the images that the shadow computes.
        capture: Folder, or URL that fsspec understands, at which answered images are kept; by default nowhere.
        capture_fraction: Fraction of the requests that are kept.
        capture_flush_s: Seconds of answers that are lost from the capture, at most, when the server is killed.
        capture_max_bytes: Bytes of all captured files there; when they have so many, no more are written.
        capture_memory_bytes: Bytes of images that wait to be written; what comes then is dropped from the capture.
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
        for name in ("max_batch", "max_queue", "max_body_bytes", "max_pixels", "max_images"):
            self._check(name, getattr(self, name) >= 1, "a whole number of 1 or more")
        for name in ("max_connections", "keep_alive_s", "capture_max_bytes", "capture_memory_bytes"):
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
        is_window = self.drift_window == 0 or self.drift_window >= 200  # of fewer, chance alone may look like drift
        self._check("drift_window", is_window, "0, or a whole number of 200 or more")
        self._check("max_images", self.max_images <= self.max_queue, "no more than --max_queue")
        is_path = self.root_path == "" or (self.root_path.startswith("/") and not self.root_path.endswith("/"))
        self._check("root_path", is_path, "a path such as /classifier, without a slash at the end")
        jwt = (self.jwt_issuer, self.jwt_audience, self.jwt_jwks)
        if any(jwt) and not all(jwt):
            raise SettingsError("--jwt_issuer, --jwt_audience and --jwt_jwks are needed together; give all three")
        is_source = is_file_or_https(self.jwt_jwks)
        self._check("jwt_jwks", is_source, "a file, or an https address without a name and password in it")
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
        """Whether callers must say who they are."""
        return self.api_keys_file is not None or bool(self.jwt_issuer)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def count_threads(self) -> int:
        """Count the threads that compute."""
        return self.num_threads or len(os.sched_getaffinity(0))

    def find_allowed_hosts(self) -> frozenset[str] | None:
        """Find the names that a request's Host header may have beside addresses, in lower case; None for any.

        Where nobody has to show a key, a web page could give its own name this server's address, and then ask it.
        """
        if self.allowed_hosts == "*" or (not self.allowed_hosts and self.has_auth):
            return None
        names = self.allowed_hosts.split(",") if self.allowed_hosts else ["localhost", self.host, socket.gethostname()]
        return frozenset(name.strip().lower() for name in names)


def is_file_or_https(source: str) -> bool:
    """Say whether a text is a file's path, or an https address that names a host and no user."""
    try:
        address = urlsplit(source)
    except ValueError:
        return False
    if address.scheme == "https":
        return bool(address.hostname) and address.username is None
    return "://" not in source
