"""A PostgreSQL of the tests' own: its files in a scratch folder, on a free port, ended with the session."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
import yaml

from tests.conftest import find_port, report_lack

PASSWORD = "a-Password#that%nobody@may:see/7"
"""With characters that mean something in an address, a shell or YAML."""


def find_programs() -> Path:
    """Find the folder with PostgreSQL's programs, or skip the test; with CI=true fail it."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if folders:
        return folders[-1]
    initdb = shutil.which("initdb")
    if initdb is None:
        report_lack("PostgreSQL is not installed (Debian: postgresql)")
    return Path(initdb).resolve().parent


class Cluster:
    """A server whose roles are `owner`, which may do everything, and those that a test makes.

    Attributes:
        port: where it listens, on 127.0.0.1.
        folder: all that it has on the disk.
        programs: the folder with PostgreSQL's programs.
    """

    def __init__(self, *options: str, initdb_options: Sequence[str] = ()) -> None:
        self.programs = find_programs()
        self.port = find_port()
        self._as_other: list[str] = []
        self._with_this_process = ["setpriv", "--pdeathsig", "INT"]  # ends with it, however it ends
        self.folder = Path(tempfile.mkdtemp(prefix="image-classifier-postgres-"))
        if os.geteuid() == 0:  # as whom it refuses to run
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as_other = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            self._with_this_process = [*self._as_other, *self._with_this_process[1:]]
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        password_file = self.folder / "password"
        password_file.write_text(PASSWORD + "\n")
        password_file.chmod(0o644)
        words = ["--username=owner", f"--pwfile={password_file}", "--auth=scram-sha-256", "--encoding=UTF8"]
        words += ["--locale=C", "--no-sync", f"--pgdata={self.folder / 'data'}", *initdb_options]
        self._run("initdb", *words)
        password_file.unlink()

    def _run(self, program: str, *words: str) -> None:
        command = [*self._as_other, str(self.programs / program), *words]
        result = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = [f"-p{self.port}", f"-k{self.folder}", "-clisten_addresses=127.0.0.1", "-cshared_buffers=32MB"]
        words = [str(self.programs / "postgres"), f"-D{self.folder / 'data'}", *options, *self._options]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [*self._with_this_process, *words], cwd="/", stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self.connect("postgres").close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.02)

    def kill(self) -> None:
        """Kill the server with all its processes at once, as a power failure would."""
        assert self._process is not None
        pids = [self._process.pid, *self._list_children()]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.005)

    def _list_children(self) -> list[int]:
        assert self._process is not None
        words = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [int(word) for word in words]

    def stop(self) -> None:
        """Stop the server if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)  # which ends connections, and loses nothing
            self._process.wait(60)

    def remove(self) -> None:
        """Stop the server and remove all that it had."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def connect(self, database: str) -> psycopg.Connection[Any]:
        """Connect as the owner."""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, dbname=database, user="owner", password=PASSWORD, autocommit=True
        )

    def execute(self, database: str, *commands: str) -> None:
        """Execute commands as the owner."""
        with self.connect(database) as connection:
            for command in commands:
                connection.execute(command.encode())

    def write_config(self, path: Path, name: str, **values: Any) -> Path:
        """Write the file for --db_config that leads to the database of this name."""
        content = {
            "driver": "postgresql",
            "host": "127.0.0.1",
            "port": self.port,
            "database": name,
            "user": "owner",
        }
        path.write_text(yaml.safe_dump({**content, **values}))
        return path
