"""A plan in the terminal: what `plan` and --dry-run print."""

from rich.table import Table

from whence.counts import duration
from whence.indexing.planning import DISK, TIME, Plan
from whence.reports.tables import pairs_table
from whence.sizes import shown_size


def plan_table(plan: Plan) -> Table:
    """A plan in a few lines."""
    kind = "GPU memory" if plan.on_gpu else "memory"
    lines: dict[str, str | None] = {
        "plan": plan.about,
        "bytes a row": None if plan.bytes_per_row is None else f"{plan.bytes_per_row:,} of vectors",
        "disk": _with_free(plan.disk_bytes, plan.free_disk),
        **{f"  {name}": shown_size(size) for name, size in plan.disk.items() if len(plan.disk) > 1},
        kind: _with_free(plan.memory, plan.free_memory, " at the peak"),
        "time": duration(plan.seconds),
        **{f"  {phase.name}": _phase(phase.seconds, phase.about) for phase in plan.phases},
    }
    return pairs_table({name: line for name, line in lines.items() if line is not None})


def _phase(seconds: float, about: str) -> str:
    return f"{duration(seconds)} ({about})" if about else duration(seconds)


def _with_free(needed: int, free: int | None, what: str = "") -> str:
    return f"{shown_size(needed)}{what}" + ("" if free is None else f", of {shown_size(free)} that are free")


def plan_answer(plan: Plan) -> str:
    """Which limit binds, in a sentence."""
    kind = "GPU memory" if plan.on_gpu else "memory"
    if plan.limit == TIME:
        return (
            f"It fits: time is the limit, about {duration(plan.seconds)}, with {shown_size(plan.disk_bytes)} of disk "
            f"and {shown_size(plan.memory)} of {kind}."
        )
    if plan.limit == DISK:
        return (
            f"It does not fit: disk is the limit, {shown_size(plan.disk_bytes)} are needed and "
            f"{shown_size(plan.free_disk or 0)} are free."
        )
    return (
        f"It does not fit: {kind} is the limit, {shown_size(plan.memory)} are needed and "
        f"{shown_size(plan.free_memory or 0)} are free."
    )
