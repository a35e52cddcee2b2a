"""How a plan is printed, by `plan` and by the verbs with --dry-run, and the command that goes on from it."""

import sys
from typing import TYPE_CHECKING

from whence.cli.console import print_json, print_part

if TYPE_CHECKING:
    from whence.indexing.planning import Plan

DRY_RUN = "--dry-run"


def print_plan(plan: "Plan", as_json: bool) -> tuple[str, ...]:
    """Print a plan's table, or all of it as JSON.

    Returns:
        For the last line: the limit in words, and the command as it stands or with the flag that mends it.
    """
    from whence.reports.plan_tables import plan_answer, plan_table

    words = [word for word in sys.argv[1:] if word != DRY_RUN]
    if words[:1] == ["plan"]:
        out = [] if any(word.startswith(("-o", "--out")) for word in words) else ["-o", "INDEX"]
        words = ["index", *words[1:], *out]
    command = ["whence", *words, *plan.remedies.get(plan.limit, ())]
    if as_json:
        print_json(plan.as_json() | {"next": command})
        return ()
    print_part(plan_table(plan))
    for note in plan.notes:
        print_part(note)
    if not plan.fits:
        command.append(DRY_RUN)
    return plan_answer(plan), *command
