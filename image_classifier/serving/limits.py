"""Rate limits: a token bucket of requests and one of pixels for each caller."""

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
"""Smallest network that one subscriber gets. All its addresses count as one caller."""

_ROUNDING = 1e-6
"""Tolerance in requests or pixels, so that waiting for exactly the announced time is enough."""


@lru_cache(maxsize=1024)
def find_caller(name: str, address: str | None) -> str:
    """Return whose limits a request counts against: the authenticated name, otherwise the client's address.

    An IPv6 address counts as its /64 network, and an IPv4-mapped one as the IPv4 address.
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
    """Read the number of pixels from the header of an image file; 0 if the header is invalid."""
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            return image.width * image.height
    except Exception:  # decoders raise exceptions of any type
        return 0


@dataclass(slots=True)
class _Buckets:
    requests: float
    pixels: float
    filled_at: float


class CallerLimits:
    """Token buckets with a capacity of one second, at least one request. Not thread-safe.

    The last `MAX_CALLERS` callers are remembered. A forgotten caller starts with full buckets.

    Args:
        rate: requests per second and caller; 0 for no limit.
        pixel_rate: decoded pixels per second and caller; 0 for no limit.
        clock: returns monotonic seconds.

    Attributes:
        is_on: whether any limit is set.
        counts_pixels: whether pixels are limited.
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
        """Return the number of remembered callers."""
        return len(self._callers)

    def admit(self, caller: str) -> float:
        """Take one request from a caller's bucket; return 0.0, or the seconds to wait if it is refused.

        A refused request costs nothing. Requests are also refused while the pixel bucket is overdrawn.
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
        """Take pixels from a caller's bucket. It may be overdrawn; later requests then wait."""
        if self._pixel_rate:
            self._fill(caller).pixels -= num_pixels

    def _fill(self, caller: str) -> _Buckets:
        """Return a caller's refilled buckets; if there are too many, forget the caller that came least recently."""
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
