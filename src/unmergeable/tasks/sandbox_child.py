"""Inside the process of one untrusted program: shut the doors, say which are shut, run the program, say if it ended.

The text of this file is what that process runs; it needs the standard library alone. What each step keeps the program
from is in :mod:`unmergeable.tasks.sandbox`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 1 << 14, 1 << 18
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
MOUNT_SETATTR = 442
"""The number of this system call, the same on every machine."""
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
CAPABILITY_VERSION, CAP_DAC_READ_SEARCH = 0x20080522, 2

FULL_ISOLATION = ("network", "processes", "files")

HIDDEN = ("/proc", "/run")
"""Other processes, and the sockets of services."""

FIRST_USER = 1_000_000
"""Numbers from here belong to nobody; each program gets one of its own, by which its processes are counted."""


def _require(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _kernel() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def enter_namespaces(kernel: Any) -> bool:
    """Whether this process got its own network, mounts, process numbers and shared memory. Forks where it did."""
    user, group = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if kernel.unshare(flags if user == 0 else flags | CLONE_NEWUSER) != 0:
        return False
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123  one process, no need of pathlib
                file.write(text)
    inner = os.fork()  # process numbers are those of the children
    if inner:
        _, status = os.waitpid(inner, 0)
        os._exit(0 if status == 0 else 1)
    return True


def close_files(kernel: Any, folder: str, size: int) -> None:
    """Make all files read-only but those in ``folder``, a new one in memory, and hide what is :data:`HIDDEN`."""
    _require(kernel.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    _require(kernel.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes)))
    safe = MS_NOSUID | MS_NODEV
    _require(kernel.mount(b"tmpfs", folder.encode(), b"tmpfs", safe, f"size={size},mode=0777".encode()))
    for hidden in HIDDEN:
        if os.path.isdir(hidden) and not sys.base_prefix.startswith(f"{hidden}/"):  # noqa: PTH112
            _require(kernel.mount(b"tmpfs", hidden.encode(), b"tmpfs", safe, b"size=4k,mode=0555"))
    os.chdir(folder)


def limit(settings: Mapping[str, Any]) -> None:
    """Bound processor time, memory, files and processes."""
    import resource  # not on every system on which this file is imported

    for what, most in (
        (resource.RLIMIT_CPU, settings["cpu_seconds"]),
        (resource.RLIMIT_AS, settings["memory_bytes"]),
        (resource.RLIMIT_FSIZE, settings["file_bytes"]),
        (resource.RLIMIT_NPROC, settings["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        bounded = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (bounded, bounded))


def drop_privileges(kernel: Any, number: int) -> None:
    """Give up every privilege for good. Root becomes nobody, who may still read what Python needs, wherever it lies."""
    kept = 0
    if os.getuid() == 0:
        _require(kernel.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
        user = FIRST_USER + number
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        kept = 1 << CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    _require(kernel.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)))
    _require(kernel.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def shut(settings: Mapping[str, Any]) -> list[str]:
    """Shut what can be shut; what that was. Limits are set in any case."""
    kernel = _kernel()
    number = os.getpid()
    isolation: list[str] = []
    if settings["isolation"] != "none" and enter_namespaces(kernel):
        network, processes, files = FULL_ISOLATION
        isolation += [network, processes]
        with contextlib.suppress(OSError):
            close_files(kernel, settings["folder"], settings["file_bytes"])
            isolation.append(files)
    limit(settings)
    drop_privileges(kernel, number)
    # last, for a change of the user takes it back: when the process outside is killed, so is everything inside
    _require(kernel.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    return isolation


def main() -> None:
    """Run the program that comes on standard input; ``argv[1]`` holds the settings."""
    settings = json.loads(sys.argv[1])
    program = sys.stdin.read()
    report = os.fdopen(settings["report"], "w")
    isolation = shut(settings)
    report.write(json.dumps(isolation) + "\n")
    report.flush()
    if settings["isolation"] == "required" and len(isolation) < len(FULL_ISOLATION):
        os._exit(1)
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})  # noqa: S102  what all this is for
    except BaseException:
        os._exit(1)
    report.write("ended\n")
    report.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
