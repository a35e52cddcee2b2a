"""Whether two runs are the same training: a run of `whence train --replayable`, and one that a Trainer made before.

What is asked of the first (its rows' scores) holds for the second if they are. Compared are the weights at the end, as
changes from the common parent, and what both logged at each step, which tells where they part: a learning rate that
differs is another recipe, a loss that differs is other rows, another order or other tokens.
"""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.nn.utils import get_total_norm

from whence.errors import ModelError
from whence.models.loading import load_model
from whence.models.runs import open_run
from whence.models.training_state import state_of
from whence.storage import Place
from whence.training.step_log import open_log

logger = logging.getLogger(__name__)

FILE = "whence_like.json"
LEAST_COSINE = 0.99
"""Of two weight changes that are taken for those of one training."""
TOLERANCE = {"learning_rate": 1e-6, "loss": 5e-3, "grad_norm": 5e-2}
"""Relative difference of what two runs logged at a step, below which they have not parted."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How far two runs are the same training."""

    like: str
    cosine: float
    """Of the two changes of all trained weights."""
    difference: float
    """Norm of the difference of the weights, over the norm of the other run's change."""
    logged_steps: int
    """Steps that both logged."""
    parted: str | None
    """The first step at which what they logged differs, and how, in words; None: at none."""

    @property
    def is_same(self) -> bool:
        """Whether they are one training."""
        return self.cosine >= LEAST_COSINE


def likeness(run: str | Path, other: str | Path) -> Likeness:
    """Compare a run with another's.

    Args:
        run: Directory of `whence train --replayable`, finished.
        other: Directory of a Trainer's run.

    Raises:
        ModelError: The other cannot be loaded, or has other weights.
    """
    log = open_log(run)
    start, end = (log.state(number).weights for number in (0, len(log.steps)))
    last = open_run(other).checkpoints[-1].path
    theirs = {name: w.cpu() for name, w in load_model(last, dtype="float32").model.named_parameters()}
    if missing := [name for name in end if name not in theirs or theirs[name].shape != end[name].shape]:
        raise ModelError(
            f"{last}: it has no weight {missing[0]} of shape {tuple(end[missing[0]].shape)}, which is trained"
        )
    changes = [{name: weights[name].detach() - start[name] for name in end} for weights in (end, theirs)]
    lengths = [float(get_total_norm(list(change.values()))) for change in changes]
    product = sum(float((changes[0][name].double() * changes[1][name].double()).sum()) for name in end)
    apart = float(get_total_norm([changes[0][name] - changes[1][name] for name in end]))
    logged = [_logged(directory) for directory in (run, other)]
    return Likeness(
        like=str(other),
        cosine=product / (lengths[0] * lengths[1]) if all(lengths) else math.nan,
        difference=apart / lengths[1] if lengths[1] else math.nan,
        logged_steps=len(logged[0].keys() & logged[1].keys()),
        parted=_parted(*logged),
    )


def require_likeness(run: str | Path, other: str | Path) -> Likeness:
    """Compare a run with another's, write what is found into the run, and refuse one that is another training.

    Raises:
        ModelError: It is another training.
    """
    found = likeness(run, other)
    Place.at(run).write_document(FILE, asdict(found))
    if not found.is_same:
        where = found.parted or f"nothing that both logged ({found.logged_steps:,} steps) differs"
        raise ModelError(
            f"{run}: this is not the training of {other}: the cosine of the two weight changes is {found.cosine:.4f}, "
            f"and one training has {LEAST_COSINE} or more. {where}. Train into another directory with that one's own "
            "--lr, --batch-size, --epochs, --warmup, --schedule, --weight-decay, --seed, --order and --supervise"
        )
    return found


def _logged(run: str | Path) -> dict[int, dict[str, Any]]:
    """What a run's last checkpoint says of the steps that it logged: losses are means since the one before."""
    history = state_of(open_run(run).checkpoints[-1].path).get("log_history", [])
    return {entry["step"]: entry for entry in history if isinstance(entry, dict) and {"step", "loss"} <= entry.keys()}


def _parted(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> str | None:
    """The first step that both logged at which they differ; losses are compared over the other's intervals."""
    before = 0
    for step in sorted(theirs):
        between = [ours[number]["loss"] for number in range(before + 1, step + 1) if number in ours]
        found = {"loss": math.fsum(between) / len(between)} if len(between) == step - before else {}
        found |= {name: ours[step].get(name) for name in ("learning_rate", "grad_norm") if step in ours}
        before = step
        for name, tolerance in TOLERANCE.items():
            one, other = found.get(name), theirs[step].get(name)
            if one is None or other is None or math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-12):
                continue
            words = name.replace("_", " ")
            return f"They part at step {step:,}, where the {words} is {one:.6g} here and {other:.6g} there"
    return None
