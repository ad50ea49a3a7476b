"""A disk that fails and a clock that is wrong, for whole processes: a library that stands between them and the system.

It is compiled by the C compiler and loaded by LD_PRELOAD. What it does is said by the environment.
"""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

from tests.conftest import require_program

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* Whether this call fails: SHIM_CALL names it, SHIM_PATH is part of its path, SHIM_AT counts from 1, 0 is each. */
static int fails(const char *call, const char *path, int descriptor) {
    static long count;
    const char *wanted = getenv("SHIM_CALL"), *part = getenv("SHIM_PATH"), *at = getenv("SHIM_AT");
    char link[64], resolved[4096];
    if (!wanted || strcmp(wanted, call)) return 0;
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t size = readlink(link, resolved, sizeof resolved - 1);
        if (size < 0) return 0;
        resolved[size] = 0;
        path = resolved;
    }
    if (part && !strstr(path, part)) return 0;
    count++;
    if (at && atol(at) && count != atol(at)) return 0;
    errno = atoi(getenv("SHIM_ERRNO"));
    return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    return fails("write", 0, fd) ? -1 : NEXT(write)(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return fails("write", 0, fd) ? -1 : NEXT(pwrite64)(fd, data, size, at);
}
ssize_t read(int fd, void *data, size_t size) {
    return fails("read", 0, fd) ? -1 : NEXT(read)(fd, data, size);
}
ssize_t pread64(int fd, void *data, size_t size, off64_t at) {
    return fails("read", 0, fd) ? -1 : NEXT(pread64)(fd, data, size, at);
}
int fsync(int fd) { return fails("fsync", 0, fd) ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return fails("fsync", 0, fd) ? -1 : NEXT(fdatasync)(fd); }
int rename(const char *from, const char *to) { return fails("rename", to, 0) ? -1 : NEXT(rename)(from, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned int flags) {
    return fails("rename", to, 0) ? -1 : NEXT(renameat2)(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) { return fails("mkdir", path, 0) ? -1 : NEXT(mkdir)(path, mode); }
int flock(int fd, int operation) {
    int (*next)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
    return fails("flock", 0, fd) ? -1 : next(fd, operation);
}

/* SHIM_CLOCK_S is added to the time of day. */
static long offset(void) {
    const char *seconds = getenv("SHIM_CLOCK_S");
    return seconds ? atol(seconds) : 0;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = NEXT(clock_gettime)(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += offset();
    return status;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int status = NEXT(gettimeofday)(now, zone);
    now->tv_sec += offset();
    return status;
}
time_t time(time_t *now) {
    time_t value = NEXT(time)(0) + offset();
    if (now) *now = value;
    return value;
}
"""


class Shim:
    """The library, compiled into a folder."""

    def __init__(self, folder: Path) -> None:
        compiler = require_program("cc")
        self._path = folder / "shim.so"
        source = folder / "shim.c"
        source.write_text(SOURCE)
        words = [compiler, "-shared", "-fPIC", "-O1", "-o", str(self._path), str(source), "-ldl"]
        subprocess.run(words, check=True, capture_output=True)

    def fail(self, call: str, path: str, at: int = 1, number: int = errno.EIO) -> dict[str, str]:
        """Build the environment in which a call fails whose path has this part.

        Args:
            call: write, read, fsync, rename, mkdir or flock.
            at: which of these calls, counted from 1; 0 is each of them.
        """
        faults = {"SHIM_CALL": call, "SHIM_PATH": path, "SHIM_AT": str(at), "SHIM_ERRNO": str(number)}
        return {"LD_PRELOAD": str(self._path), **faults}

    def shift_clock(self, seconds: int) -> dict[str, str]:
        """Build the environment in which the time of day is another."""
        return {"LD_PRELOAD": str(self._path), "SHIM_CLOCK_S": str(seconds)}
