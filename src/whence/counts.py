"""How many of a thing, as a sentence has it: 1 row, 2 rows."""

from numbers import Integral


def number_of(count: int | float, one: str, many: str | None = None) -> str:
    """A count and its noun.

    Args:
        count: How many; a fraction is written as one, and is many.
        one: The noun where there is one; what follows it may come along, as in "row has".
        many: The same where there are more or none; `one` with an s unless given.

    >>> number_of(1, "row"), number_of(1200, "row"), number_of(0.5, "epoch"), number_of(1, "query", "queries")
    ('1 row', '1,200 rows', '0.5 epochs', '1 query')
    """
    words = one if count == 1 else f"{one}s" if many is None else many
    return f"{count:,} {words}" if isinstance(count, Integral) else f"{count:,.6g} {words}"


def duration(seconds: int | float) -> str:
    """A time in the largest unit of which there are two.

    >>> duration(0.4), duration(100), duration(500), duration(9000), duration(10**6)
    ('0.4 seconds', '100 seconds', '8.3 minutes', '2.5 hours', '11.6 days')
    """
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, unit = next(pair for pair in units if seconds >= 2 * pair[0] or pair[0] == 1)
    count = seconds / size
    digits = 1 if round(count, 1) < 10 or size > 60 else 0
    return f"{count:,.{digits}f}".removesuffix(".0") + f" {unit}"
