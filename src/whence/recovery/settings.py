"""Settings of a recover job: how evidence is gathered, how a shadow is trained, how rows are scored and chosen.

The command line checks them before it imports torch, so that this module does not.
"""

from dataclasses import dataclass

from whence.catalogue import recover_method
from whence.corpus.layouts import Row, row_text
from whence.errors import SettingError

MATCHING_METHODS = ("nnls", "matching", "cosine")
"""Methods that match rows jointly to T, which re-linearising changes."""
SKETCH_WIDTH = 16_384
"""Numbers of a row's sketch."""
UNDO = ("none", "moments", "rows")
"""Ways to undo an optimizer's scaling; see `preconditioner`."""
LABELLINGS = ("hard", "sampled")
"""Ways to choose a row's label; see `pseudo_labels`."""
MOST_POINTS = 100
"""Synthetic checkpoints, at each of which every row is read."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How rows are labelled."""

    choices: tuple[str, ...]
    """Labels that the model may give."""
    template: str = "{text}"
    """Prompt, with the row's text in place of `{text}`."""
    how: str = "hard"
    """"hard": the most likely choice; "sampled": one drawn by its probability."""

    def __post_init__(self):
        if len({*self.choices}) < 2 or not all(self.choices):
            raise SettingError(f"--choices {','.join(self.choices)}: two or more different labels are expected")
        if self.template.count("{text}") != 1:
            raise SettingError(f"--template {self.template!r}: {{text}} is expected in it, once")
        if self.how not in LABELLINGS:
            raise SettingError(f"--labels {self.how}: choose one of {', '.join(LABELLINGS)}")

    def prompt(self, row: Row) -> str:
        """The prompt of a row."""
        return self.template.replace("{text}", row_text(row))

    def completion(self, choice: str) -> str:
        """A choice as it continues the prompt."""
        return choice if self.template[-1].isspace() or choice[0].isspace() else f" {choice}"


@dataclass(frozen=True, kw_only=True)
class RecoverSettings:
    """Settings of a recover job; defaults are those of the command line."""

    method: str = "calibrated"
    """Name in `catalogue.RECOVER_METHODS`."""
    points: int = 0
    """Synthetic checkpoints on the line between the two models, evenly spaced, beside its ends."""
    checkpoints: str = "last"
    """Checkpoints to read where the final is a Trainer's directory: "last", or "all", the earlier ones as points."""
    layers: str | None = None
    """Patterns of layer names; None: all linear layers but the head, or an adapter's B."""
    tokenizer: str | None = None
    """Where to find the tokenizer, and the chat template, that rows are read with at every point and by the shadow;
    None: the final's."""
    chat_template: str | None = None
    """File of a chat template, or its text, that rows are written by; None: the tokenizer's own."""
    date: str | None = None
    """Day that a chat template writes that writes the date, as YYYY-MM-DD; None: that of `work`, else of the
    training of the final model, if `whence train` wrote it, else today."""
    supervise: str | None = None
    """Which tokens of a row are supervised; see `corpus.templates.SUPERVISED`. None: as in the training of the final
    model, if `whence train` wrote it, else "assistant"."""
    max_tokens: int | None = None
    tokens_per_batch: int = 4096
    width: int = SKETCH_WIDTH
    """Numbers of a row's sketch, by which rows are matched jointly."""
    short_list: int = 12_000
    """Rows that are matched jointly, at most: their inner products with each other are held, 576 MB. Others are judged
    by their own evidence alone."""
    optimizer: str | None = None
    """Optimizer that trains the shadow, "adamw" or "sgd", as it trained the model; None: guessed."""
    epochs: float | None = None
    """Passes of the shadow's training over its rows; None: guessed, see `shadow_model`."""
    lr: float | None = None
    """Peak learning rate of the shadow; None: the one that moves the weights as far."""
    batch_size: int | None = None
    """Rows of a step of the shadow's training; None: guessed."""
    undo: str = "none"
    """How the optimizer's scaling is undone on T: not at all ("none"), by the final's own optimizer file ("moments"),
    or by an estimate from the corpus ("rows"); see `preconditioner`."""
    remove_decay: bool = False
    """Take off T what weight decay took off the weights."""
    choices: tuple[str, ...] = ()
    """Labels by which theta_f labels the rows, for a model that was trained to classify; none: rows as they are."""
    template: str = "{text}"
    """Prompt that a row's text is put into, where there are choices."""
    labels: str = "hard"
    """Which choice a row gets, see `pseudo_labels`."""
    balanced: bool | None = None
    """Choose as many rows of every label, as far as there are, where there are choices. None: where a count is asked
    for too, since a model trained on the chosen rows then comes closer to theta_f."""
    rounds: int = 0
    """Rounds of re-linearising, at most, for the methods of `MATCHING_METHODS`."""
    mixture: str | None = None
    """How shares of sources are estimated: by "gradients", their means; by "runs", models trained on each source; or
    "none". None: by runs where a shadow is trained, so that the recipe is known, and there are 2 to
    `source_models.MOST_SOURCES` sources; else by gradients."""
    seed: int = 0

    def __post_init__(self):
        recover_method(self.method)
        if self.choices:
            self.labelling()
        elif (self.template, self.labels) != ("{text}", "hard") or self.balanced:
            raise SettingError("--template, --labels and --balanced need --choices, the labels that the model answers")
        if self.short_list < 2:
            raise SettingError(f"--short-list {self.short_list}: 2 or more are expected")
        if self.mixture not in (None, "gradients", "runs", "none"):
            raise SettingError(f"--mixture {self.mixture}: choose one of gradients, runs, none")
        if self.mixture == "runs" and self.method != "calibrated":
            raise SettingError("--mixture runs needs --method calibrated, whose shadow tells the recipe")
        if self.undo not in UNDO:
            raise SettingError(f"--undo {self.undo}: choose one of {', '.join(UNDO)}")
        if not 0 <= self.points <= MOST_POINTS:
            raise SettingError(f"--points {self.points}: a number from 0 to {MOST_POINTS:,} is expected")
        if self.rounds < 0 or (self.rounds and self.method not in MATCHING_METHODS):
            raise SettingError(
                f"--rounds {self.rounds}: 0 or more are expected, with --method {' or '.join(MATCHING_METHODS)}, which "
                "match rows jointly"
            )
        if self.points and self.checkpoints == "all":
            raise SettingError("--points and --checkpoints all: choose one of them, synthetic points or real ones")

    def labelling(self) -> Labels:
        """How rows are labelled."""
        return Labels(choices=tuple(self.choices), template=self.template, how=self.labels)


def check_count(count: int | None, settings: RecoverSettings) -> None:
    """Refuse a number of rows that cannot be, or that a method without probabilities lacks.

    Raises:
        SettingError: It is one.
    """
    if count is None and settings.method != "calibrated":
        raise SettingError(f"--method {settings.method} ranks rows and draws no line: add --count N")
    if count is not None and count < 1:
        raise SettingError(f"--count {count}: 1 or more are expected")
