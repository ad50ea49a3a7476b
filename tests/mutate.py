"""Change the bytes of valid files at random, as damage does, and as somebody does who knows the format."""

from __future__ import annotations

import gzip
import io
import json
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from google.protobuf.message import Message

from tests.bombs import build_chunk

Mutator = Callable[[Random, bytes], bytes]

NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 10, 16, 31, 32, 33, 63, 64, 99, 100, 127, 128, 200, 255, 256, 257, 1000, 1024, 4096),
    *(2**15 - 1, 2**15, 2**16 - 1, 2**16, 10**6, 2**24, 2**26, 2**28, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**33, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
"""Those at which something changes: widths of types, limits, sizes that are too large by far."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 10, 1.5, -0.0, 1e-320, 1e308, 10**5, 2**31, -(2**63), 2**63, 2**64 - 1, 10**30),
    *(float("nan"), float("inf"), "", "a", "0", "1", "a\nb", "\0", "\x1b[31m", "\ud800", "ä" * 300, "a" * 5000),
    *("..", "../../a", "/", "a/b", "None", "\u2028", "=1+1", [], {}, [[]], [0] * 1000, [{}], {"": None}, ["a", "a"]),
)


def change_bytes(chance: Random, content: bytes) -> bytes:
    """Change a few places, most often one, and more often near the beginning and the end."""
    changed = bytearray(content)
    for _ in range(1 + int(chance.expovariate(0.7))):
        chance.choice(_EDITS)(chance, changed)
    return bytes(changed)


def _choose(chance: Random, content: bytearray, room: int = 0) -> int:
    size = max(1, len(content) - room)
    kind = chance.random()
    if kind < 0.35:
        return min(size - 1, int(chance.expovariate(1 / 60)))
    return max(0, size - 1 - int(chance.expovariate(1 / 60))) if kind < 0.5 else chance.randrange(size)


def _flip(chance: Random, content: bytearray) -> None:
    if content:
        content[_choose(chance, content)] ^= 1 << chance.randrange(8)


def _set(chance: Random, content: bytearray) -> None:
    if content:
        content[_choose(chance, content)] = chance.choice((0, 1, 32, 127, 128, 255, chance.randrange(256)))


def _set_number(chance: Random, content: bytearray) -> None:
    size = chance.choice((1, 2, 4, 8))
    if len(content) >= size:
        start = _choose(chance, content, size - 1)
        number = chance.choice(NUMBERS) % 256**size
        content[start : start + size] = number.to_bytes(size, chance.choice(("big", "little")))


def _set_varint(chance: Random, content: bytearray) -> None:
    start = _choose(chance, content)
    end = start
    while end < len(content) and content[end] & 128:
        end += 1
    content[start : end + 1] = build_varint(chance.choice(NUMBERS))


def _set_digits(chance: Random, content: bytearray) -> None:
    numbers = list(re.finditer(rb"[0-9]{1,20}", content))
    if numbers:
        number = chance.choice(numbers)
        content[number.start() : number.end()] = b"%d" % chance.choice(NUMBERS)


def _cut(chance: Random, content: bytearray) -> None:
    del content[_choose(chance, content) :]


def _remove(chance: Random, content: bytearray) -> None:
    start = _choose(chance, content)
    del content[start : start + 1 + int(chance.expovariate(1 / 20))]


def _repeat(chance: Random, content: bytearray) -> None:
    start = _choose(chance, content)
    piece = content[start : start + 1 + int(chance.expovariate(1 / 30))]
    content[start:start] = piece * chance.choice((1, 1, 2, 10, 1000))


def _move(chance: Random, content: bytearray) -> None:
    start, target = _choose(chance, content), _choose(chance, content)
    content[target:target] = content[start : start + 1 + int(chance.expovariate(1 / 50))]


def _overwrite(chance: Random, content: bytearray) -> None:
    start, size = _choose(chance, content), 1 + int(chance.expovariate(1 / 20))
    content[start : start + size] = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))


_EDITS = (
    *(_flip, _flip, _set, _set, _set_number, _set_number, _set_varint, _set_digits),
    *(_cut, _remove, _repeat, _move, _overwrite),
)


def build_varint(number: int) -> bytes:
    """Build a number as Thrift's compact protocol and protobuf have it."""
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def mix(*mutators: Mutator) -> Mutator:
    """Choose one of several each time; where a file is not of the form that one changes, change its bytes."""

    def change(chance: Random, content: bytes) -> bytes:
        try:
            return chance.choice(mutators)(chance, content)
        except Exception:
            return change_bytes(chance, content)

    return change


def seal(mutator: Mutator, close: Callable[[bytes], bytes]) -> Mutator:
    """Make what was changed agree with itself again, such as by a digest; where that cannot be, it stays as it is."""

    def change(chance: Random, content: bytes) -> bytes:
        changed = mutator(chance, content)
        with suppress(Exception):
            return close(changed)
        return changed

    return change


def splice(contents: Sequence[bytes]) -> Mutator:
    """Go on with the end of another file."""

    def change(chance: Random, content: bytes) -> bytes:
        other = chance.choice(contents)
        return content[: chance.randrange(len(content) + 1)] + other[chance.randrange(len(other) + 1) :]

    return change


_WORDS = (
    *(
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "!!binary ",
        "!!set ",
        "!!timestamp ",
        "!!int ",
        "<<: ",
        "? ",
        "| ",
        ">",
    ),
    *(
        "{",
        "[",
        "]",
        "}",
        "- " * 40,
        "[" * 40,
        "---\n",
        "...\n",
        "%YAML 9.9\n",
        "\t",
        "#",
        ": ",
        "\n",
        "'",
        '"',
        ",",
        "\\",
    ),
    *(
        ".inf",
        ".nan",
        "0o7",
        "0x" + "f" * 40,
        "1:30:00",
        "2001-01-01",
        "~",
        "1e999",
        "1" * 5000,
        "\ufeff",
        "\0",
        "\x85",
    ),
)


def change_text(chance: Random, content: bytes) -> bytes:
    """Change lines and words."""
    lines = content.decode("utf-8", "replace").splitlines(keepends=True) or [""]
    for _ in range(1 + int(chance.expovariate(0.7))):
        at = chance.randrange(len(lines))
        line = lines[at]
        kind = chance.randrange(7)
        if kind == 0:
            lines.insert(at, chance.choice(lines))
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines[at] = " " * chance.randrange(5) + line.lstrip(" ")
        elif kind == 3:
            lines[at:at] = [line] * chance.choice((2, 50, 3000))
        elif kind == 4:
            head, colon, _ = line.partition(":")
            value = str(chance.choice((*VALUES, *_WORDS)))
            lines[at] = f"{head}{colon} {value}\n"
        else:
            place = chance.randrange(len(line) + 1)
            end = place + chance.choice((0, 1, 5))
            lines[at] = line[:place] + chance.choice(_WORDS) + line[end:]
    return "".join(lines).encode("utf-8", "surrogatepass")


def change_json(chance: Random, content: bytes) -> bytes:
    """Change values of a JSON document."""
    return dump_json(change_values(chance, json.loads(content)))


def change_json_lines(chance: Random, content: bytes) -> bytes:
    """Change values of one of the JSON documents, or the lines."""
    lines = content.splitlines()
    at = chance.randrange(len(lines))
    kind = chance.randrange(6)
    if kind == 0:
        lines[at:at] = [chance.choice(lines)] * chance.choice((1, 2, 5000))
    elif kind == 1:
        del lines[at]
    else:
        lines[at] = change_json(chance, lines[at])
    return b"\n".join(lines) + b"\n"


def dump_json(value: Any) -> bytes:
    """Write JSON; what no Unicode is stays as it is."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass")


def change_values(chance: Random, document: Any) -> Any:
    """Change some of the values in lists and dictionaries that lie in each other."""
    root = [document]
    for _ in range(1 + int(chance.expovariate(0.7))):
        places = _list_places(root)
        holder, key = chance.choice(places)
        value = holder[key]
        kind = chance.randrange(8)
        if kind < 3:
            holder[key] = _copy(chance.choice(VALUES))
        elif kind == 3 and holder is not root:
            del holder[key]
        elif kind == 4:
            other, where = chance.choice(places)
            holder[key] = _copy(other[where])
        elif kind == 5:
            for _ in range(chance.choice((1, 2, 40))):
                holder[key] = [holder[key]] if chance.random() < 0.5 else {"a": holder[key]}
        elif kind == 6 and isinstance(value, list):
            value.extend(_copy(value[:1]) * chance.choice((1, 10, 1000)))
        elif kind == 6 and isinstance(value, dict):
            value[chance.choice(("a", "", "\n", "__class__", "a" * 300))] = _copy(chance.choice(VALUES))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            holder[key] = chance.choice((-1, 1)) * chance.choice(NUMBERS) * chance.choice((1, 1, 0.5))
        elif isinstance(value, str):
            holder[key] = change_bytes(chance, value.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    return root[0]


def _list_places(root: list[Any]) -> list[tuple[Any, Any]]:
    places: list[tuple[Any, Any]] = []
    pending: list[Any] = [root]
    while pending and len(places) < 5000:
        holder = pending.pop()
        for key in range(len(holder)) if isinstance(holder, list) else list(holder):
            places.append((holder, key))
            if isinstance(holder[key], (list, dict)):
                pending.append(holder[key])
    return places


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def change_pickle(chance: Random, content: bytes) -> bytes:
    """Change, remove, repeat or move instructions of a pickle."""
    starts = [position or 0 for _, _, position in pickletools.genops(content)]
    parts = [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]
    for _ in range(1 + int(chance.expovariate(0.7))):
        at = chance.randrange(len(parts))
        kind = chance.randrange(6)
        if kind == 0:
            parts.insert(at, chance.choice(parts))
        elif kind == 1 and len(parts) > 1:
            del parts[at]
        elif kind == 2:
            parts[at] = chance.choice(parts)
        elif kind == 3:
            parts[at] = chance.choice(pickletools.opcodes).code.encode("latin-1") + parts[at][1:]
        elif kind == 4:
            parts[at:at] = [parts[at]] * chance.choice((2, 100, 20_000))
        else:
            parts[at] = change_bytes(chance, parts[at])
    return b"".join(parts)


def change_npy(chance: Random, content: bytes) -> bytes:
    """Change an .npy file: its head, whose length is set right, or anything."""
    (size,) = struct.unpack("<H", content[8:10])
    head = content[10 : 10 + size].decode("latin-1")
    kind = chance.randrange(4)
    if kind == 0:
        return change_bytes(chance, content)
    if kind == 1:
        dtypes = (
            "|O",
            "<f8",
            "|u1",
            ">f4",
            "|S99999",
            "<U99999999",
            "|V0",
            "<M8[ns]",
            "|b1",
            "<c16",
            "<i8",
            "<f4",
            "<f2",
        )
        head = re.sub(r"'descr': '[^']*'", f"'descr': '{chance.choice(dtypes)}'", head)
    elif kind == 2:
        sizes = ", ".join(str(chance.choice((*NUMBERS, -1))) for _ in range(chance.choice((0, 1, 2, 2, 3, 40))))
        head = re.sub(r"'shape': \([^)]*\)", f"'shape': ({sizes})", head)
    else:
        head = change_text(chance, head.encode("latin-1")).decode("latin-1")
    raw = head.encode("latin-1", "replace")[:60_000]
    return content[:8] + struct.pack("<H", len(raw)) + raw + content[10 + size :]


def change_zip(*mutators: tuple[str, Mutator]) -> Mutator:
    """Change what a member of a zip file unpacks to, by the mutator whose pattern its name has, or the members."""

    def change(chance: Random, content: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, info.compress_type, archive.read(info)) for info in archive.infolist()]
        at = chance.randrange(len(members))
        name, compression, body = members[at]
        kind = chance.randrange(10)
        if kind == 0:
            members.append(members[at])
        elif kind == 1:
            del members[at]
        elif kind == 2:
            members[at] = (change_text(chance, name.encode()).decode("utf-8", "replace")[:2000], compression, body)
        elif kind == 3:
            members[at] = (
                name,
                chance.choice((0, 8, 12, 14)),
                body * chance.choice((1, 2, 100 if len(body) < 10_000 else 3)),
            )
        else:
            mutator = next((mutator for part, mutator in mutators if part in name), change_bytes)
            members[at] = (name, compression, mutator(chance, body))
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, compression, body in members:
                info = zipfile.ZipInfo(name)
                info.compress_type = compression
                with suppress(UserWarning):  # a name that comes twice
                    archive.writestr(info, body)
        return packed.getvalue()

    return change


def change_tar(member: Mutator) -> Mutator:
    """Change a tar, or what a .tar.gz unpacks to: fields of a head, whose checksum is set right, or what a member
    holds."""

    def change(chance: Random, content: bytes) -> bytes:
        is_packed = content.startswith(b"\x1f\x8b")
        raw = bytearray(gzip.decompress(content) if is_packed else content)
        heads, at = [], 0
        while at + 512 <= len(raw) and raw[at]:
            heads.append(at)
            at += 512 + -(-int(bytes(raw[at + 124 : at + 135]), 8) // 512) * 512
        head = chance.choice(heads)
        size = int(bytes(raw[head + 124 : head + 135]), 8)
        kind = chance.randrange(8)
        if kind < 2:
            body = member(chance, bytes(raw[head + 512 : head + 512 + size]))
            padded = body + bytes(-len(body) % 512)
            raw[head + 512 : head + 512 + -(-size // 512) * 512] = padded
            raw[head + 124 : head + 136] = b"%011o\0" % len(body)
        elif kind == 2:
            raw[head + 156] = chance.choice(b"0123456789xgLKSDVX\0\xff")
        elif kind == 3:
            raw[head + 124 : head + 136] = chance.choice(
                (
                    b"%011o\0" % (chance.choice(NUMBERS) % 8**11),
                    b"\x80" + chance.choice(NUMBERS).to_bytes(11, "big"),
                    b"\xff" * 12,
                )
            )
        elif kind == 4:
            raw[head : head + 100] = change_bytes(chance, bytes(raw[head : head + 100]))[:100].ljust(100, b"\0")
        elif kind == 5:
            end = head + 512 + -(-size // 512) * 512
            raw[head:head] = raw[head:end] * chance.choice((1, 2, 20))
        elif kind == 6:
            raw[head : head + 512] = change_bytes(chance, bytes(raw[head : head + 512]))[:512].ljust(512, b"\0")
        else:
            raw = bytearray(change_bytes(chance, bytes(raw)))
        if head + 512 <= len(raw):
            block = bytes(raw[head : head + 148]) + b" " * 8 + bytes(raw[head + 156 : head + 512])
            raw[head + 148 : head + 156] = b"%06o\0 " % sum(block)
        return gzip.compress(bytes(raw), 1) if is_packed else bytes(raw)

    return change


def change_png(chance: Random, content: bytes) -> bytes:
    """Change chunks of a PNG, whose checksums are set right, and what its pixels unpack to."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    where = chance.randrange(len(chunks))
    kind, body = chunks[where]
    choice = chance.randrange(6)
    if choice == 0:
        chunks[where:where] = [chunks[where]] * chance.choice((1, 2, 300))
    elif choice == 1:
        del chunks[where]
    elif choice == 2:
        chunks.insert(where, chance.choice(chunks))
    elif choice == 3:
        kinds = (
            b"tRNS",
            b"PLTE",
            b"iCCP",
            b"zTXt",
            b"iTXt",
            b"eXIf",
            b"acTL",
            b"fcTL",
            b"fdAT",
            b"gAMA",
            b"pHYs",
            b"cICP",
        )
        packed = zlib.compress(bytes(chance.choice((10, 10**6, 10**7))), 9)
        body = chance.choice((chance.randbytes(20), b"a\0\0" + packed, bytes(768), b""))
        chunks.insert(where, (chance.choice(kinds), body))
    elif kind == b"IDAT" and choice == 4:
        with suppress(zlib.error):
            body = zlib.compress(change_bytes(chance, zlib.decompress(body)), 1)
        chunks[where] = (kind, body)
    else:
        chunks[where] = (kind, change_bytes(chance, body))
    return content[:8] + b"".join(build_chunk(kind, body) for kind, body in chunks)


def change_jpeg(chance: Random, content: bytes) -> bytes:
    """Change, remove, repeat or move segments of a JPEG."""
    parts = re.split(rb"(?=\xff[\xc0-\xcf\xd8-\xfe])", content)
    at = chance.randrange(len(parts))
    kind = chance.randrange(5)
    if kind == 0:
        parts[at:at] = [parts[at]] * chance.choice((1, 5, 60, 2000))
    elif kind == 1:
        del parts[at]
    elif kind == 2:
        parts.insert(chance.randrange(len(parts)), parts[at])
    else:
        parts[at] = change_bytes(chance, parts[at])
    return b"".join(parts)


def change_riff(chance: Random, content: bytes) -> bytes:
    """Change chunks of a WebP, whose sizes are set right."""
    chunks, at = [], 12
    while at + 8 <= len(content):
        (size,) = struct.unpack("<I", content[at + 4 : at + 8])
        chunks.append((content[at : at + 4], content[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    where = chance.randrange(len(chunks))
    kind, body = chunks[where]
    choice = chance.randrange(4)
    if choice == 0:
        chunks[where:where] = [chunks[where]] * chance.choice((1, 5, 500))
    elif choice == 1:
        chunks[where] = (chance.choice((b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF")), body)
    else:
        chunks[where] = (kind, change_bytes(chance, body))
    packed = b"".join(kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2) for kind, body in chunks)
    return b"RIFF" + struct.pack("<I", len(packed) + 4) + b"WEBP" + packed


def change_parquet(chance: Random, content: bytes) -> bytes:
    """Change the footer of a Parquet file, whose length is set right, or a page's head."""
    (size,) = struct.unpack("<I", content[-8:-4])
    body, footer = content[: -8 - size], content[-8 - size : -8]
    if chance.random() < 0.7:
        footer = change_bytes(chance, footer)
    else:
        body = change_bytes(chance, body)
    return body + footer + struct.pack("<I", len(footer)) + b"PAR1"


def change_message(message_type: Any) -> Mutator:
    """Change fields of a protobuf message."""

    def change(chance: Random, content: bytes) -> bytes:
        message = message_type.FromString(content)
        for _ in range(1 + int(chance.expovariate(0.7))):
            holder, field, value = chance.choice(_list_fields(message))
            with suppress(ValueError, TypeError, OverflowError):  # what the field does not take
                _change_field(chance, holder, field, value)
        changed: bytes = message.SerializeToString()
        return changed

    return change


def _list_fields(message: Message) -> list[tuple[Any, Any, Any]]:
    fields = []
    pending = [message]
    while pending:
        holder = pending.pop()
        for field, value in holder.ListFields():
            fields.append((holder, field, value))
            if field.message_type is not None:
                pending += value if field.is_repeated else [value]
    return fields


def _change_field(chance: Random, holder: Any, field: Any, value: Any) -> None:
    if field.is_repeated:
        at = chance.randrange(len(value))
        kind = chance.randrange(4)
        if kind == 0:
            del value[at]
        elif kind == 1 and field.message_type is not None:
            for _ in range(chance.choice((1, 2, 50))):
                value.add().CopyFrom(value[at])
        elif kind == 1:
            value.extend([value[at]] * chance.choice((1, 2, 1000)))
        elif field.message_type is not None:
            value[at].CopyFrom(chance.choice(value))
        else:
            value[at] = _change_scalar(chance, value[at])
    elif field.message_type is not None:
        holder.ClearField(field.name)
    else:
        setattr(holder, field.name, _change_scalar(chance, value))


def _change_scalar(chance: Random, value: Any) -> Any:
    if isinstance(value, bytes):
        return change_bytes(chance, value)
    if isinstance(value, str):
        operators = ("Loop", "If", "ConstantOfShape", "Expand", "Tile", "Resize", "Scan", "Identity", "RandomUniform")
        return chance.choice((*operators, change_bytes(chance, value.encode()).decode("utf-8", "replace")))
    if isinstance(value, float):
        return chance.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
    return chance.choice((*range(24), *NUMBERS, -1, -(2**63)))
