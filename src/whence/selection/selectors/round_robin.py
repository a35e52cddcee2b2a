"""Round-robin: each target in turn takes its best row that is not taken yet.

Targets share the budget evenly, however their scores compare: only the order within a target counts. A row that
is refused (a duplicate, a source at its cap) is not offered again; the same target goes on to its next one, so that no
target loses its turn. A target without rows left drops out. Turns go in the order of the targets.

With a target for each query this is RDS+'s selection; with a target for each task, tasks take turns.

Cost: s n log n; every target's order is in memory, 8 n bytes each.

Source: Ivison et al. 2025, https://arxiv.org/abs/2503.01807, section 3.
"""

from collections.abc import Generator
from dataclasses import dataclass

from jaxtyping import Float32
from torch import Tensor

from whence.selection.protocols import Pick
from whence.selection.sampling import Sampled, finite_scores, order


@dataclass(frozen=True, kw_only=True)
class RoundRobin(Sampled):
    """Rows by turns of the targets; a row's score is its score for the target that took it."""

    def __call__(self, scores: Float32[Tensor, "s n"]) -> Generator[Pick, bool, None]:
        """Rows in the order of the targets' turns."""
        finite = finite_scores(scores)
        orders = {
            target: iter(order(row_scores, self.temperature, self.seed, "round_robin", str(target)).numpy())
            for target, row_scores in enumerate(finite)
        }
        offered: set[int] = set()
        while orders:
            for target in list(orders):
                is_taken = False
                while not is_taken:
                    row = next((int(row) for row in orders[target] if int(row) not in offered), None)
                    if row is None:
                        del orders[target]
                        break
                    offered.add(row)
                    is_taken = yield Pick(row, float(finite[target, row]), target)
