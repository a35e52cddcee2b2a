"""The memory of this process and of the machine."""

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

_PROCESS, _MACHINE = Path("/proc/self"), Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def peak_resident() -> int:
    """Largest resident size of this process, in bytes, since it began or since `forget_peak`."""
    if (peak := _status("VmHWM")) is not None:  # getrusage on Linux also counts the parent, at the time of the fork
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident() -> int:
    """Resident size of this process now, in bytes; its peak, where the system does not say."""
    now = _status("VmRSS")
    return peak_resident() if now is None else now


def forget_peak() -> None:
    """Let the peak begin anew at what is resident now; where the system does not allow it, it stays as it is."""
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def available_memory() -> int | None:
    """Bytes that this machine, or the group of processes that this one is in, has room for; None: not known."""
    limits = []
    with suppress(OSError, StopIteration):
        line = next(line for line in _MACHINE.read_text().splitlines() if line.startswith("MemAvailable"))
        limits.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError, StopIteration):  # "max" is no limit
        lines = (_GROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        held = int((_GROUP / "memory.current").read_text()) - cached  # files' pages make room
        limits.append(int((_GROUP / "memory.max").read_text()) - held)
    if not limits:
        with suppress(OSError, ValueError):
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0, min(limits)) if limits else None


def _status(name: str) -> int | None:
    with suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
