"""Sizes in bytes as people write them, and the memory of this process and of the machine.

`M` and `G` are 10^6 and 10^9 bytes, `MiB` and `GiB` 2^20 and 2^30: a bound that is kept in the first is kept in both.
"""

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

from whence.errors import SettingError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]I?|)B?\s*", re.IGNORECASE)
_PROCESS, _MACHINE = Path("/proc/self"), Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def size_of(text: int | str, flag: str = "--memory") -> int:
    """Bytes of a size, such as 2G, 800M, 1.5GiB or 2000000000.

    Raises:
        SettingError: It is no size, or none of a byte at least.

    >>> size_of("800M"), size_of("2GiB"), size_of("1.5g"), size_of(7)
    (800000000, 2147483648, 1500000000, 7)
    """
    match = _SIZE.fullmatch(str(text))
    count = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if count < 1:
        raise SettingError(f"{flag} {text}: a size is expected, such as 800M, 2G, 2GiB or 2000000000")
    return count


def shown_size(count: int | float) -> str:
    """A size in the largest unit of which there is one.

    >>> shown_size(999), shown_size(1_356_000_000), shown_size(21_504)
    ('999 bytes', '1.36 GB', '21.5 kB')
    """
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:,.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"
    return f"{count:,.0f} bytes"


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
