"""Trusted reverse proxies, whose `X-Forwarded` headers give the client's address."""

from __future__ import annotations

import ipaddress

from image_classifier.errors import SettingsError


class TrustedProxies:
    """The addresses whose `X-Forwarded` headers are trusted.

    Args:
        text: IP addresses and networks, separated by commas, or * for all.

    Raises:
        SettingsError: one of them is invalid.
    """

    def __init__(self, text: str) -> None:
        self._trusts_all = text.strip() == "*"
        try:
            names = [] if self._trusts_all else text.split(",")
            self._networks = [ipaddress.ip_network(name.strip(), strict=False) for name in names]
        except ValueError as error:
            takes = "--trusted_proxies takes IP addresses or networks, separated by commas, or *"
            raise SettingsError(f"{takes}: {error}") from error

    def trusts(self, address: str) -> bool:
        """Return whether an address is a trusted proxy's."""
        if self._trusts_all:
            return True
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self._networks)

    def find_client(self, peer: str, forwarded: bytes | None) -> str:
        """Find the client's address: the last one in `X-Forwarded-For` that is not a trusted proxy's.

        Args:
            peer: remote address of the connection.
            forwarded: value of `X-Forwarded-For`.
        """
        address = peer
        hops = [] if forwarded is None else forwarded.decode("latin-1").split(",")
        while hops and self.trusts(address):
            address = hops.pop().strip()
        return address
