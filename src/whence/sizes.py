"""Sizes in bytes as people write them.

`M` and `G` are 10^6 and 10^9 bytes, `MiB` and `GiB` 2^20 and 2^30: a bound that is kept in the first is kept in both.
"""

import re

from whence.errors import SettingError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]I?|)B?\s*", re.IGNORECASE)


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
