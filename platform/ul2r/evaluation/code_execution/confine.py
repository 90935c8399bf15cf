"""Give up this process's rights for good, then run a program in it; started by sandbox.py as a script of its own.

Reads {"source", "secret", "limits"} as JSON from stdin. Writes to stdout, in this order: a line of JSON with the layers
that hold, then the secret once the program has run to its end, or "error: ..." if it raised. A program that ends the
process itself, or prints, writes neither: its streams are /dev/null. One that searches this process's memory for the
secret could still forge it, as it could the tests, which run in the same process.

Layers, all of them without privileges: limits of resources; Landlock (Linux 5.13) against every file but Python's own,
and against TCP; seccomp against new processes, sockets, signals to others, other modes, owners and times of files, and
the like. Imports the standard library
alone, so that it starts in milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from pathlib import Path
from typing import Any

MAX_MESSAGE = 300

# prctl(2).
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38

# capset(2).
CAPABILITY_VERSION = 0x20080522
NUM_CAPABILITY_BYTES = 24

# landlock(7): numbers of calls are the same on all architectures.
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
FS_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""Rights to files that a version knows, as a number of bits, by the first version that does."""
NET_VERSION = 4
SCOPE_VERSION = 6

# seccomp(2), BPF.
SECCOMP_SET_MODE_FILTER = 1
LOAD, JUMP_IF_EQUAL, JUMP_IF_SET, JUMP_IF_ABOVE, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW = 0x7FFF0000
KILL = 0x80000000
FAIL = 0x00050000
EPERM, ENOSYS = 1, 38
CLONE_THREAD = 0x10000
X32_BIT = 0x40000000
NUMBER_OFFSET, ARCHITECTURE_OFFSET, FIRST_ARGUMENT_OFFSET = 0, 4, 16
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH of the machines whose calls are known here."""
SECCOMP = (317, 277)
CLONE = (56, 220)
CLONE3 = (435, 435)
DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "prlimit64": (302, 261),
    "setrlimit": (160, 164),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Of files, what Landlock leaves alone.
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    # Before its version 3.
    "truncate": (76, 45),
    # Of other processes of the same user.
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    # What outlives the process.
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
}
"""Calls that fail, by their numbers on x86_64 and aarch64, which has not all of them."""


def main() -> None:
    """Run the program of stdin."""
    task = json.load(sys.stdin)
    verdict = _detach_streams()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Neither its memory nor its environment can be read through /proc.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _limit_resources(task["limits"])
    _drop_capabilities(libc)
    layers = {"landlock": _restrict_files(libc), "seccomp": _restrict_calls(libc)}
    os.write(verdict, (json.dumps(layers) + "\n").encode())

    message = _execute(task["source"]) or task["secret"]
    os.write(verdict, message.encode(errors="replace"))
    # Without the program's own handlers of the end.
    os._exit(0)


def _detach_streams() -> int:
    """Point the streams to /dev/null; return the descriptor that stdout was."""
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.environ.clear()
    return verdict


def _limit_resources(limits: dict[str, int]) -> None:
    for name, value in (
        ("AS", limits["memory_bytes"]),
        ("FSIZE", limits["file_bytes"]),
        ("CORE", 0),
        ("NOFILE", 64),
        # Does not count for root, whom seccomp keeps from it.
        ("NPROC", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    # A signal that Python does not turn into an exception, then one that cannot be held back.
    seconds = limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _drop_capabilities(libc: Any) -> None:  # noqa: ANN401  a library of ctypes
    """Give up what root may do besides; others have none of it."""
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    libc.capset(header, bytes(NUM_CAPABILITY_BYTES))


def _execute(source: str) -> str | None:
    """Run a program; return what it raised, None if it came to its end."""
    # Some parts of the standard library look the module of a class up.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001  SystemExit as well: the tests did not pass
        return f"error: {_describe(error)}"[:MAX_MESSAGE]
    return None


def _describe(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except BaseException:  # noqa: BLE001  an exception of the program, whose text is its own code
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _restrict_files(libc: Any) -> int:  # noqa: ANN401  a library of ctypes
    """Allow reading Python's own files and libraries, and no file else; return Landlock's version, 0 without it."""
    version: int = libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    if version < 1:
        return 0
    num_rights = max(bits for first, bits in FS_RIGHTS.items() if first <= version)
    fields = [(1 << num_rights) - 1]
    if version >= NET_VERSION:
        fields.append(0b11)  # bind and connect of TCP
    if version >= SCOPE_VERSION:
        fields.append(0b11)  # abstract sockets, signals
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    rules: int = libc.syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return 0

    libraries = [
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/usr/share/zoneinfo",
    ]
    files = ["/dev/null", "/dev/urandom", "/etc/localtime", "/etc/ld.so.cache"]
    for path in {*sys.path, f"{sys.base_prefix}/lib", *libraries, *files}:
        if Path(path).exists():
            _allow_reading(libc, rules, path)
    if libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, rules, 0) != 0:
        return 0
    os.close(rules)
    return version


def _allow_reading(libc: Any, rules: int, path: str) -> None:  # noqa: ANN401  a library of ctypes
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rights = READ_FILE | READ_DIR if Path(path).is_dir() else READ_FILE
    rule = struct.pack("=Qi", rights, descriptor)
    libc.syscall(SYS_LANDLOCK_ADD_RULE, rules, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    os.close(descriptor)


def _restrict_calls(libc: Any) -> int:  # noqa: ANN401  a library of ctypes
    """Let calls of the system that a calculation does not need fail; return 1, or 0 where this is not possible."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return 0
    column = list(ARCHITECTURES).index(machine)
    filters = [
        (LOAD, 0, 0, ARCHITECTURE_OFFSET),
        (JUMP_IF_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_OFFSET),
        # Calls of x32, which have numbers of their own.
        (JUMP_IF_ABOVE, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL),
    ]
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            filters += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, FAIL | EPERM)]
    filters += [
        # Its flags lie in memory; the C library takes clone where it is missing.
        (JUMP_IF_EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, FAIL | ENOSYS),
        # Threads may begin, processes may not.
        (JUMP_IF_EQUAL, 0, 3, CLONE[column]),
        (LOAD, 0, 0, FIRST_ARGUMENT_OFFSET),
        (JUMP_IF_SET, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, FAIL | EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in filters)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a length, padding, a pointer.
    program = struct.pack("@HP", len(filters), ctypes.addressof(buffer))
    return int(libc.syscall(SECCOMP[column], SECCOMP_SET_MODE_FILTER, 0, program) == 0)


if __name__ == "__main__":
    main()
