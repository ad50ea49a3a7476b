"""How much one caller may ask for: a token bucket of requests and one of pixels for each."""

from __future__ import annotations

import io
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

MAX_CALLERS = 10_000
IPV6_PREFIX = 64
"""What one subscriber has at least: whoever has such a network has all its addresses."""

_ROUNDING = 1e-6
"""Part of a request or a pixel that may be missing, so that a wait of as long as was said is enough."""


@lru_cache(maxsize=1024)
def find_caller(name: str, address: str | None) -> str:
    """Find whom a request counts for: the authenticated name, or else the client's address.

    An IPv6 address counts as its /64 network, and one that stands for an IPv4 address as that one.
    """
    if name or not address:
        return name
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if ip.version == 4:
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((int(ip), IPV6_PREFIX), strict=False))


def count_pixels(content: bytes, formats: tuple[str, ...]) -> int:
    """Count the pixels of an image file by its head, without decoding it; 0 where it would be refused for its head."""
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            return image.width * image.height
    except Exception:  # decoders raise what they like
        return 0


@dataclass(slots=True)
class _Buckets:
    requests: float
    pixels: float
    filled_at: float


class CallerLimits:
    """Token buckets: each holds a second's worth at most, and at least one request.

    The MAX_CALLERS that came last are remembered; whoever is forgotten begins with full buckets. Made for one thread.

    Args:
        rate: requests a second of one caller; 0 for no limit.
        pixel_rate: decoded pixels a second of one caller; 0 for no limit.
        clock: gives seconds, from any beginning.

    Attributes:
        is_on: whether there is any limit.
        counts_pixels: whether there is one of pixels.
    """

    def __init__(self, rate: float, pixel_rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_on = bool(rate or pixel_rate)
        self.counts_pixels = bool(pixel_rate)
        self._rate = rate
        self._pixel_rate = pixel_rate
        self._max_requests = max(1.0, rate)
        self._clock = clock
        self._callers: OrderedDict[str, _Buckets] = OrderedDict()

    def __len__(self) -> int:
        """Count the callers that are remembered."""
        return len(self._callers)

    def admit(self, caller: str) -> float:
        """Take a request of a caller, or return in how many seconds it may come again; 0.0 where it is taken.

        A refused request costs nothing. One is refused, too, while the caller's pixels are overdrawn.
        """
        if not self.is_on:
            return 0.0
        buckets = self._fill(caller)
        wait_s = 0.0
        if self._rate and buckets.requests < 1 - _ROUNDING:
            wait_s = (1 - buckets.requests) / self._rate
        if self._pixel_rate and buckets.pixels < -_ROUNDING:
            wait_s = max(wait_s, -buckets.pixels / self._pixel_rate)
        if not wait_s:
            buckets.requests -= 1
        return wait_s

    def charge(self, caller: str, num_pixels: int) -> None:
        """Take pixels from a caller's bucket; what it does not hold is owed, and later requests wait for it."""
        if self._pixel_rate:
            self._fill(caller).pixels -= num_pixels

    def _fill(self, caller: str) -> _Buckets:
        """Get a caller's buckets with what has run in since; make room for a new caller."""
        now = self._clock()
        buckets = self._callers.get(caller)
        if buckets is None:
            if len(self._callers) >= MAX_CALLERS:
                self._callers.popitem(last=False)
            buckets = self._callers[caller] = _Buckets(self._max_requests, self._pixel_rate, now)
            return buckets
        self._callers.move_to_end(caller)
        seconds = max(0.0, now - buckets.filled_at)
        buckets.requests = min(self._max_requests, buckets.requests + seconds * self._rate)
        buckets.pixels = min(self._pixel_rate, buckets.pixels + seconds * self._pixel_rate)
        buckets.filled_at = now
        return buckets
