"""Whose word about the client's address is believed: the proxies that a request came through."""

from __future__ import annotations

import ipaddress

from image_classifier.errors import SettingsError


class TrustedProxies:
    """The addresses whose `X-Forwarded` headers are believed.

    Args:
        text: addresses and networks, with commas, or * for all.

    Raises:
        SettingsError: one of them is none.
    """

    def __init__(self, text: str) -> None:
        self._trusts_all = text.strip() == "*"
        try:
            names = [] if self._trusts_all else text.split(",")
            self._networks = [ipaddress.ip_network(name.strip(), strict=False) for name in names]
        except ValueError as error:
            raise SettingsError(f"--trusted_proxies takes addresses or networks, with commas, or *: {error}") from error

    def trusts(self, address: str) -> bool:
        """Say whether an address is one of theirs."""
        if self._trusts_all:
            return True
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self._networks)

    def find_client(self, peer: str, forwarded: bytes | None) -> str:
        """Find the client's address: the last in `X-Forwarded-For` that is no trusted proxy.

        Args:
            peer: address of the connection.
        """
        address = peer
        hops = [] if forwarded is None else forwarded.decode("latin-1").split(",")
        while hops and self.trusts(address):
            address = hops.pop().strip()
        return address
