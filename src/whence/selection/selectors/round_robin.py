"""Round-robin: each target in turn takes its best row that is not taken yet.

Targets share the budget evenly, however their scores compare: only the order within a target counts. A row that a
target would take and may not have (a duplicate, a source at its cap) is gone for all; the same target goes on to its
next, so that no target loses its turn. A target without rows left drops out. Turns go in the order of the targets.

With one target for each query this is RDS+'s selection; with one for each task, the same over tasks.

Cost: every target's order is held, 8 n bytes each: s n log n.

Source: Ivison et al. 2025, https://arxiv.org/abs/2503.01807, section 3.
"""

from collections.abc import Generator
from dataclasses import dataclass

from jaxtyping import Float32
from torch import Tensor

from whence.selection.protocols import Pick
from whence.selection.selectors.sampling import Sampled, known, order


@dataclass(frozen=True, kw_only=True)
class RoundRobin(Sampled):
    """By turns; a row's score is that for the target that took it."""

    def __call__(self, scores: Float32[Tensor, "s n"]) -> Generator[Pick, bool, None]:
        """Rows by turns."""
        finite = known(scores)
        waiting = {
            target: iter(order(row_scores, self.temperature, self.seed, "round_robin", str(target)).numpy())
            for target, row_scores in enumerate(finite)
        }
        gone: set[int] = set()
        while waiting:
            for target in list(waiting):
                is_taken = False
                while not is_taken:
                    row = next((int(row) for row in waiting[target] if int(row) not in gone), None)
                    if row is None:
                        del waiting[target]
                        break
                    gone.add(row)
                    is_taken = yield Pick(row, float(finite[target, row]), target)
