"""Commands of the package as real processes, without the seconds that each takes to import torch.

A server imports what commands import, computes nothing, and forks for each command: a process with words, environment,
folder, outputs, signals and exit status of its own, which imports the package itself anew.

Some things only a process shows that was started afresh, and their tests keep to `subprocess`: what libraries read at
the start (`READ_AT_START`), memory, threads, the title, a library that is missing, another installation, and equal bits
in spite of random hashes, which are the same in all forks.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
READ_AT_START = re.compile(
    "(PYTHON(?!PATH$)|LD_|GLIBC_|MALLOC_|OMP_|GOMP_|KMP_|OPENBLAS_|JE_|MKL_|NPY_|ATEN_|DNNL_|ONEDNN_|"
    "TORCH(?!_CPP_LOG_LEVEL$)|LANG|LC_)"
)
"""Variables that a forked process would not heed: they must be those of the tests themselves. The level of torch's log
is the package's own doing."""

_DATA = ("coverage", "numpy", "PIL.Image", "jsonargparse", "sqlalchemy", "alembic.command", "pyarrow.parquet")
_TORCH = ("torch", "torch._inductor", "torchmetrics", "matplotlib.style", "matplotlib.backends.backend_agg")
_MLFLOW = ("mlflow", "mlflow.store.tracking.sqlalchemy_store")
_ONNX = ("onnxscript", "onnxscript.function_libs.torch_lib.ops", "onnxscript.rewriter", "networkx", "cyclonedx.output")
_EXPORT = ("torch.export._trace", "torch.onnx._internal.exporter._core", "torch._functorch.aot_autograd")
_IMPORTED = {"data": _DATA, "registry": (*_DATA, *_MLFLOW), "publish": (*_DATA, *_TORCH, *_ONNX, *_EXPORT)}
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}

_environment = dict(os.environ)


class Command:
    """A command that runs, with its outputs in files.

    Attributes:
        words: the module and its words.
        pid: of the process.
    """

    def __init__(
        self, *words: object, cwd: Path = PROJECT, variables: Mapping[str, str] | None = None, strict: bool = False
    ) -> None:
        """Start `python -m MODULE WORDS`, with variables added to the environment.

        Args:
            strict: Warnings are errors, as after `python -W error`, and the process takes all apart at its end.

        Raises:
            ValueError: the environment has a variable that only a fresh process would heed.
        """
        environment = {**os.environ, **(variables or {})}
        for name in sorted(environment.keys() | _environment.keys()):
            if READ_AT_START.match(name) and environment.get(name) != _environment.get(name):
                raise ValueError(f"{name} is read when a process starts: start a fresh one, with subprocess")
        self.words = [str(word) for word in words]
        self._outputs = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
        self._connection, theirs = socket.socketpair()
        with theirs:
            descriptors = [theirs.fileno(), *(file.fileno() for file in self._outputs)]
            socket.send_fds(_start_server(os.getpid()), [b"x"], descriptors)
        request = {"words": self.words, "cwd": str(cwd), "environment": environment, "strict": strict}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._connection.makefile()
        self.pid = self._read_number()

    def _read_number(self) -> int:
        line = self._answers.readline()
        assert line, "the server that forks commands has ended; its standard error says why"
        return int(line)

    def finish(self, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end and return what came of it.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        self._connection.settimeout(timeout_s)
        is_late = False
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            is_late = True
            os.kill(self.pid, signal.SIGKILL)
        self._connection.settimeout(None)
        status = self._read_number()
        self._answers.close()
        self._connection.close()
        said = []
        for file in self._outputs:
            file.seek(0)
            with io.TextIOWrapper(file, encoding="utf-8") as text:
                said.append(text.read())
        if is_late:
            raise subprocess.TimeoutExpired(self.words, timeout_s, *said)
        return subprocess.CompletedProcess(self.words, status, *said)


def run(
    *words: object,
    cwd: Path = PROJECT,
    variables: Mapping[str, str] | None = None,
    strict: bool = False,
    timeout_s: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` does `python -m MODULE WORDS`."""
    return Command(*words, cwd=cwd, variables=variables, strict=strict).finish(timeout_s)


def remember_environment() -> None:
    """Take the environment of now for that of the tests, in which the server is started."""
    _environment.clear()
    _environment.update(os.environ)


@cache
def _start_server(owner: int) -> socket.socket:
    """Start the server of this process; it ends with it."""
    ours, theirs = socket.socketpair()
    environment = {name: value for name, value in _environment.items() if not name.startswith("COVERAGE_")}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
            cwd=PROJECT,
            env={**environment, **_ONE_THREAD},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # which ends it
    return ours


# In the server.


class _TorchWhenAsked(MetaPathFinder, Loader):
    """Keeps torch out of `sys.modules` until it is imported: by that the package knows whether it can still cap it."""

    def __init__(self) -> None:
        self._torch = sys.modules.pop("torch")
        self._spec = self._torch.__spec__

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec("torch", self) if fullname == "torch" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._torch

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork for each request until the tests have ended; return the request in the process that shall carry it out."""
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 3)
        if not descriptors:
            return None
        with socket.socket(fileno=descriptors[0]) as connection, connection.makefile("rw") as stream:
            request: dict[str, Any] = json.loads(stream.readline())
            for name in _IMPORTED.get("".join(request["words"][1:2]), (*_DATA, *_TORCH)):
                importlib.import_module(name)
            num_threads = len(os.listdir("/proc/self/task"))
            assert num_threads == 1, f"{num_threads} threads: a fork would copy one of them and the locks of all"
            gc.freeze()  # a collection in a child would touch, and so copy, all that was imported
            if os.fork() == 0:  # a process that waits for the command, while others are asked for
                pid = os.fork()
                if pid == 0:
                    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), *descriptors[1:])):
                        os.dup2(descriptor, number)
                    break
                print(pid, file=stream, flush=True)
                print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=stream, flush=True)
                os._exit(0)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left
            pass
    return request


def _carry_out(request: dict[str, Any], path: list[str], num_filters: int) -> None:
    """Become the command."""
    os.closerange(3, 1024)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    named = os.environ.get("PYTHONPATH")
    sys.path[:] = [os.getcwd(), *(named.split(os.pathsep) if named else []), *path]
    importlib.invalidate_caches()
    for name in ("tests", "tests.forked"):
        sys.modules.pop(name, None)
    if request["strict"]:  # before the filters of Python itself, and behind those that libraries add
        del warnings.filters[len(warnings.filters) - num_filters :]  # type: ignore[attr-defined]
        warnings.simplefilter("error", append=True)
        sys.warnoptions[:] = ["error"]
    if "torch" in sys.modules:
        sys.meta_path.insert(0, _TorchWhenAsked())
    importlib.import_module("numpy").random.seed()
    importlib.import_module("coverage").process_startup()
    module, *sys.argv[1:] = request["words"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        _end.status = None if request["strict"] else end.code
        raise


class _End:
    """The end of a process, after all else that is to be done there: to take torch apart takes half a second."""

    status: object = None

    def __call__(self) -> None:
        if isinstance(self.status, int):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status)


_end = _End()


if __name__ == "__main__":
    atexit.register(_end)  # the first one is called last
    own_path, num_own_filters = sys.path[1:], len(warnings.filters)
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        wanted = _serve(requests)
    if wanted is None:
        _end.status = 0
    else:
        _carry_out(wanted, own_path, num_own_filters)
