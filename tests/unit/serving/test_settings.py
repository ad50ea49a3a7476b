"""The server's settings check themselves, and open nothing by accident."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from image_classifier.errors import SettingsError
from image_classifier.serving.settings import ServerSettings

MACHINE = socket.gethostname().lower()
TOKENS = {"jwt_issuer": "i", "jwt_audience": "a"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_the_loopback_address_is_open(host: str) -> None:
    assert ServerSettings(model="m", host=host).is_local


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", ""])
def test_any_other_address_needs_a_word_about_who_may_ask(host: str) -> None:
    with pytest.raises(SettingsError, match="--api_keys_file"):
        ServerSettings(model="m", host=host)
    ServerSettings(model="m", host=host, no_auth=True)
    ServerSettings(model="m", host=host, api_keys_file=Path("keys"))
    ServerSettings(model="m", host=host, jwt_issuer="i", jwt_audience="a", jwt_jwks="j")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "MODEL is missing"),
        ({"port": 65536}, "--port takes"),
        ({"max_images": 2000}, "--max_images takes no more than --max_queue"),
        ({"timeout_s": float("nan")}, "--timeout_s takes"),
        ({"timeout_s": 0}, "--timeout_s takes"),
        ({"drain_s": -1}, "--drain_s takes"),
        ({"canary_fraction": 0}, "--canary_fraction takes a number above 0, up to 1"),
        ({"shadow_fraction": 2}, "--shadow_fraction takes"),
        ({"canary": "a", "shadow": "b"}, "--canary excludes --shadow and --cache_size"),
        ({"canary": "a", "cache_size": 1}, "--canary excludes --shadow and --cache_size"),
        ({"capture_fraction": 0}, "--capture_fraction takes a number above 0, up to 1"),
        ({"capture_fraction": 1.5}, "--capture_fraction takes"),
        ({"capture_flush_s": float("inf")}, "--capture_flush_s takes"),
        ({"capture_memory_bytes": 0}, "--capture_memory_bytes takes"),
        ({"root_path": "classifier"}, "--root_path takes"),
        ({"precision": "fp16"}, "--precision takes one of fp32, int8"),
        ({"jwt_issuer": "i"}, "needed together"),
        ({**TOKENS, "jwt_jwks": "http://issuer.example/keys"}, "--jwt_jwks takes a file, or an https URL"),
        ({**TOKENS, "jwt_jwks": "HTTP://issuer.example/keys"}, "--jwt_jwks takes"),
        ({**TOKENS, "jwt_jwks": "file:///keys"}, "--jwt_jwks takes"),
        ({**TOKENS, "jwt_jwks": "https:///keys"}, "--jwt_jwks takes"),
        ({**TOKENS, "jwt_jwks": "https://me:secret@issuer.example/keys"}, "--jwt_jwks takes"),
        ({**TOKENS, "jwt_jwks": "https://[issuer/keys"}, "--jwt_jwks takes"),
        ({"rate_limit": -1}, "--rate_limit takes"),
        ({"pixel_rate_limit": float("inf")}, "--pixel_rate_limit takes"),
        ({"no_auth": True, "api_keys_file": Path("keys")}, "contradicts"),
    ],
)
def test_what_is_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ServerSettings(**{"model": "m", **settings})


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"localhost", "127.0.0.1", MACHINE}),
        ({"allowed_hosts": "one.example, Two.example"}, {"one.example", "two.example"}),
        ({"allowed_hosts": "*"}, None),
        ({"host": "0.0.0.0", "no_auth": True}, {"localhost", "0.0.0.0", MACHINE}),
        ({"api_keys_file": Path("keys")}, None),
    ],
)
def test_local_names_are_allowed_where_nobody_shows_a_key(options: dict[str, Any], names: set[str] | None) -> None:
    assert ServerSettings(model="m", **options).find_allowed_hosts() == names


@pytest.mark.parametrize("source", ["jwks.json", "/etc/keys", "https://issuer.example:8443/keys", "HTTPS://[::1]/keys"])
def test_an_issuers_keys_come_from_a_file_or_by_https(source: str) -> None:
    assert ServerSettings(model="m", jwt_issuer="i", jwt_audience="a", jwt_jwks=source).has_auth


def test_threads_are_counted() -> None:
    assert ServerSettings(model="m").count_threads() == len(os.sched_getaffinity(0))
    assert ServerSettings(model="m", num_threads=3).count_threads() == 3
