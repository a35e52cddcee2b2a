"""The settings that decide what vector an example becomes.

A query is scored only in the space of its index, so these settings are written in the index' manifest.
"""

from dataclasses import asdict, dataclass
from typing import Any

from whence.catalogue import default_projection
from whence.errors import SettingError

VIEWS = ("sgd", "adam")
ADAM_MODES = ("torch", "less")


LARGEST_WIDTH = 2**30
"""A row of so many numbers takes 4 GB."""


@dataclass(frozen=True, kw_only=True)
class GradientSpace:
    """All that decides what vector an example becomes. A query is scored only in the space of its index."""

    layers: str | None = None
    """Patterns of layer names; None for the default of `LoadedModel.layers`."""
    reduction: str = "mean"
    """Reduction over an example's supervised tokens: "mean", as in a Trainer's loss of one row, or "sum"."""
    normalise: str = "none"
    """"layer" divides each layer's gradient by its norm, as RapidIn does; a score then weighs all layers alike."""
    view: str = "sgd"
    """The optimizer's view of a training example: "sgd" takes its gradient as it is, "adam" what Adam with the
    checkpoint's moments makes of it (see `adam`). Queries are plain gradients under both."""
    adam_mode: str = "torch"
    """For the view adam: "torch", the step that AdamW really takes, or "less", the formula of LESS' released code."""
    projection: str | None = None
    """Name in `catalogue.PROJECTIONS`; None: the `catalogue.default_projection` of the view."""
    width: int | None = None
    """Width of the projection: a side of `two_sided` (16 gives 16 x 16 per layer), the total of the others; None for
    its default."""
    seed: int = 0
    shuffle_rounds: int | None = None
    """RapidIn's lambda, for the projection `shuffle_sum`: rounds of two shuffles each; None for its default, 20."""

    def __post_init__(self):
        if self.shuffle_rounds is not None and self.projection != "shuffle_sum":
            raise SettingError(f"--shuffle-rounds {self.shuffle_rounds}: it belongs to --projection shuffle_sum alone")
        if self.shuffle_rounds is not None and self.shuffle_rounds < 1:
            raise SettingError(f"--shuffle-rounds {self.shuffle_rounds}: a positive number is expected")
        if self.reduction not in ("mean", "sum"):
            raise SettingError(f"--reduction {self.reduction}: choose mean or sum")
        if self.normalise not in ("none", "layer"):
            raise SettingError(f"--normalise {self.normalise}: choose none or layer")
        if self.view not in VIEWS:
            hint = "; frozen-v is a view of `whence select`, on an index of --view sgd"
            raise SettingError(
                f"--view {self.view}: choose one of {', '.join(VIEWS)}{hint if self.view == 'frozen-v' else ''}"
            )
        if self.adam_mode not in ADAM_MODES:
            raise SettingError(f"--adam-mode {self.adam_mode}: choose one of {', '.join(ADAM_MODES)}")
        if self.width is not None and not 0 < self.width <= LARGEST_WIDTH:
            raise SettingError(f"--width {self.width}: a number from 1 to {LARGEST_WIDTH:,} is expected")

    @property
    def sketch(self) -> str:
        """Name of the projection, with the default filled in."""
        if self.projection is not None:
            return self.projection
        return default_projection(self.view)

    def as_json(self) -> dict[str, Any]:
        """The fields by name, for a manifest.

        `normalise` is left out if it is "none", `adam_mode` if the view is another, and `shuffle_rounds` if it is not
        set, as in an index that was built before these choices existed.
        """
        unused = {"normalise"} if self.normalise == "none" else set()
        unused |= {"adam_mode"} if self.view != "adam" else set()
        unused |= {"shuffle_rounds"} if self.shuffle_rounds is None else set()
        return {name: value for name, value in asdict(self).items() if name not in unused} | {"projection": self.sketch}
