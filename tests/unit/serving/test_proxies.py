"""Whose word about a client's address is believed."""

from __future__ import annotations

import pytest

from image_classifier.errors import SettingsError
from image_classifier.serving.proxies import TrustedProxies


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        ("10.0.0.0/8", "10.0.0.1", b"1.2.3.4", "1.2.3.4"),
        ("10.0.0.0/8", "10.0.0.1", b"6.6.6.6, 1.2.3.4", "1.2.3.4"),
        ("10.0.0.0/8", "10.0.0.1", b"6.6.6.6, 1.2.3.4, 10.0.0.2", "1.2.3.4"),
        ("10.0.0.0/8", "10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.0/8", "1.2.3.4", b"10.0.0.9", "1.2.3.4"),
        ("10.0.0.1, ::1", "::1", b"2001:db8::1", "2001:db8::1"),
        ("*", "1.2.3.4", b"6.6.6.6, 7.7.7.7", "6.6.6.6"),
        ("10.0.0.0/8", "10.0.0.1", b"no address", "no address"),
    ],
)
def test_the_client_is_the_last_that_no_trusted_proxy_is(
    trusted: str, peer: str, forwarded: bytes | None, client: str
) -> None:
    assert TrustedProxies(trusted).find_client(peer, forwarded) == client


def test_what_is_no_address_is_named() -> None:
    with pytest.raises(SettingsError, match="--trusted_proxies takes IP addresses or networks"):
        TrustedProxies("proxy.example")
