"""Reads untrusted files within limits: bytes, JSON and YAML.

The limits bound the memory and time of reading any file. Ambiguous content is refused: repeated keys, NaN and infinity,
and integers of more than 64 bits. The limits are far above what this package writes; SECURITY.md lists them.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

MAX_JSON_BYTES = 2**25
MAX_JSON_VALUES = 2_000_000
"""Limit of a document, or of all lines of a file: a confusion matrix of 1,400 classes. A value takes up to 240 B."""
MAX_LINES_BYTES = 2**27
MAX_YAML_BYTES = 2**16
MAX_DEPTH = 32

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


class LimitError(ValueError):
    """A file exceeds a limit or is ambiguous. The message is the reason, without the file's name."""


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a regular file.

    Raises:
        OSError: it cannot be read.
        LimitError: it is larger than `max_bytes`, or a pipe or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not block
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(21, os.strerror(21), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise LimitError("it is not a regular file")
        if status.st_size > max_bytes:
            raise LimitError(f"it has more than the {max_bytes:,} bytes allowed")
        return file.read(status.st_size)  # read(max_bytes) would allocate max_bytes


def load_json(path: Path) -> Any:
    """Load a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not valid JSON; or, as LimitError, exceeds a limit.
    """
    return parse_json(read_file(path, MAX_JSON_BYTES))


def load_json_lines(path: Path) -> list[Any]:
    """Load a JSON Lines file.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is not valid JSON; or, as LimitError, the file exceeds a limit.
    """
    content = read_file(path, MAX_LINES_BYTES)
    _check_number(content)
    if content.count(b"\n") > MAX_JSON_VALUES:
        raise LimitError(f"it has more than the {MAX_JSON_VALUES:,} lines allowed")
    return [parse_json(line) for line in io.BytesIO(content)]


def parse_json(content: bytes | str) -> Any:
    """Parse a JSON document in UTF-8.

    Raises:
        ValueError: it is not valid JSON; or, as LimitError, exceeds a limit, repeats a key, or has a number that is
            not finite or out of range.
    """
    if len(content) > MAX_JSON_BYTES:
        raise LimitError(f"it has more than the {MAX_JSON_BYTES:,} bytes allowed")
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    _check_number(raw)
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(raw)
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    return json.loads(
        text,
        object_pairs_hook=_build_object,
        parse_int=_parse_int,
        parse_float=_parse_float,
        parse_constant=_parse_float,
    )


def _check_number(content: bytes) -> None:
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise LimitError(f"it has more than the {MAX_JSON_VALUES:,} values allowed")


def _check_depth(content: bytes) -> None:
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", content)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise LimitError(f"it is nested deeper than the {MAX_DEPTH} levels allowed")


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
        _check_keys([key for key, _ in pairs])
    return built


def _check_keys(keys: Sequence[str]) -> None:
    for key, number in Counter(keys).most_common(1):
        if number > 1:
            raise LimitError(f"it has the key {key[:50]!a} twice")


def _parse_int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise LimitError(f"it has the whole number {text[:30]}, which is out of range")
    return int(text)


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise LimitError(f"it has the number {text[:30]}, which is not finite")
    return number


def check_form(value: Any, form: Any, where: str = "it") -> None:
    """Check the types of a parsed document. Keys that the form does not name are ignored.

    Args:
        form: a type (float also accepts integers); a tuple of alternative forms; [form] for a list; {key: form} for an
            object with these keys; {str: form} for an object whose values all have this form.
        where: name of the value in messages.

    Raises:
        ValueError: the value does not have the form; the message says where.
    """
    if isinstance(form, tuple):
        fits = [one for one in form if type(value) is (type(one) if isinstance(one, (dict, list)) else one)]
        if not fits:
            raise ValueError(f"{where} is {_name(value)} instead of {' or '.join(map(_name_form, form))}")
        check_form(value, fits[0], where)
    elif isinstance(form, list):
        check_form(value, list, where)
        for number, item in enumerate(value):
            check_form(item, form[0], f"{where}[{number}]")
    elif isinstance(form, dict):
        check_form(value, dict, where)
        for key, inner in form.items():
            if key is str:
                for name, item in value.items():
                    check_form(item, inner, f"{where}[{name[:50]!a}]")
            elif key not in value:
                raise ValueError(f"{where} has no {key}")
            else:
                check_form(value[key], inner, key if where == "it" else f"{where}.{key}")
    elif type(value) is not form and not (form is float and type(value) is int):
        raise ValueError(f"{where} is {_name(value)} instead of {_name_form(form)}")


_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _name(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _name_form(form: Any) -> str:
    kind = type(form) if isinstance(form, (dict, list)) else form
    return _NAMES.get(kind, kind.__name__)


def load_yaml(path: Path) -> Any:
    """Load a YAML file with plain values.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_yaml`.
    """
    return parse_yaml(read_file(path, MAX_YAML_BYTES).decode("utf-8-sig"))


def parse_yaml(text: str) -> Any:
    """Parse a YAML document with plain values.

    Raises:
        ValueError: it is not valid YAML; or, as LimitError, as `check_yaml`.
    """
    check_yaml(text)
    try:
        return yaml.load(text, Loader=_Loader)  # nosec B506: a SafeLoader
    except Exception as error:  # tags that do not match their values raise IndexError, AttributeError, ...
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def check_yaml(text: str) -> None:
    """Check a YAML document against the limits before it is constructed.

    Raises:
        ValueError: it is not valid YAML; or, as LimitError, exceeds a limit, has an alias, repeats a key, or has a
            number out of range.
    """
    if len(text) > MAX_YAML_BYTES:
        raise LimitError(f"it has more than the {MAX_YAML_BYTES:,} characters allowed")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                raise LimitError(f"it has the alias *{str(event.anchor)[:50]}; aliases are not supported")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise LimitError(f"it is nested deeper than the {MAX_DEPTH} levels allowed")
        _check_nodes(yaml.compose(text, Loader=_Loader))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _check_nodes(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > 30:
            raise LimitError(f"it has the whole number {node.value[:30]}, which is out of range")
    elif isinstance(node, yaml.MappingNode):
        _check_keys([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        for pair in node.value:
            for child in pair:
                _check_nodes(child)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_nodes(child)
