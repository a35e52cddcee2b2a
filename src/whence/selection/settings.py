"""The settings of a choice, and the lines that tell a person how a choice was made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whence import catalogue
from whence.counts import number_of
from whence.errors import SettingError
from whence.evidence import select_evidence
from whence.selection import frozen_adam
from whence.selection.budget import Amount, Budget
from whence.selection.protocols import Target, View
from whence.selection.views import CorpusView, IndexView


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """How to choose."""

    method: str = "less"
    """Name in `catalogue.SCORERS`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's own options, by the names of its fields, such as {"within": "mean_cosine"}."""
    selector: str | None = None
    """Name in `catalogue.SELECTORS`; None: the method's own."""
    by: str | None = None
    """What a target is: a "task", or each "example" of the task file; None: the method's own."""
    caps: Mapping[str, Amount] = field(default_factory=dict)
    """The most that is chosen of each source: rows, or a share of the budget."""
    floors: Mapping[str, Amount] = field(default_factory=dict)
    """The least that is chosen of each source."""
    duplicates: float | None = 1.0
    """Similarity of texts from which a row is a duplicate of one already chosen; None takes duplicates too."""
    temperature: float = 0.0
    """0 takes the best rows; above 0 rows are drawn with probability softmax(score / temperature)."""
    seed: int = 0
    """Seed of whatever is drawn."""

    def __post_init__(self):
        entry = catalogue.scorer_entry(self.method)
        if self.by not in (None, "task", "example"):
            raise SettingError(f"--by {self.by}: choose task or example")
        object.__setattr__(self, "selector", self.selector or entry.selector)
        object.__setattr__(self, "by", self.by or entry.by)


def described_settings(
    settings: SelectSettings, budget: Budget, targets: Sequence[Target], view: View
) -> dict[str, str]:
    """How a choice was made, for a person; settings that were not used are left out."""
    examples = sum(len(target.queries) for target in targets)
    over = (number_of(len(targets), str(settings.by)), number_of(examples, "example"))
    described = {
        "method": settings.method,
        "options": ", ".join(f"{name}={value}" for name, value in settings.options.items()),
        "selector": f"{settings.selector} over {', '.join(dict.fromkeys(over))}",
        "budget": str(budget),
        "caps": ", ".join(f"{name}={value}" for name, value in settings.caps.items()),
        "floors": ", ".join(f"{name}={value}" for name, value in settings.floors.items()),
        "duplicates": "kept" if settings.duplicates is None else f"left out from similarity {settings.duplicates:g}",
        "temperature": f"{settings.temperature:g}, seed {settings.seed}" if settings.temperature else "",
        "evidence": select_evidence(settings.method) if catalogue.scorer_entry(settings.method).reads_tasks else "",
    }
    if isinstance(view, IndexView):
        space = view.index.space.as_json()
        described["index"] = str(view.index.store.place.root)
        described["pairs of answers"] = "contrasts" if view.index.has_contrasts else ""
        if isinstance(view, frozen_adam.FrozenView):
            described["view"] = f"{frozen_adam.NAME}, mode {view.adam_mode}"
        described["gradients"] = ", ".join(f"{name} {value}" for name, value in space.items() if value is not None)
    else:
        described["corpus"] = view.corpus.name if isinstance(view, CorpusView) else ""
    return {name: value for name, value in described.items() if value}
