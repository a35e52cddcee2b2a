"""A suggested mixture in the terminal, and the losses of its average beside those of simpler ones."""

from rich.console import Group, RenderableType
from rich.text import Text

from whence.ablation.suggestion import Suggestion
from whence.reports.tables import plain_table
from whence.reports.text import visible
from whence.reports.wide_table import WideTable


def suggest_answer(suggestion: Suggestion) -> str:
    """Whether the suggestion beats all partitions alike, and by how much, in a sentence."""
    gain, low, high = suggestion.gain
    by = f"{gain:+.3f} nats a token (95%: {low:+.3f} to {high:+.3f}, on the rows that it was found by)"
    if low > 0:
        return f"The suggestion beats all partitions alike: {by}."
    if high < 0:
        return f"The suggestion is worse than all partitions alike: {by}."
    return f"The suggestion does not surely beat all partitions alike: {by}."


def suggest_tables(suggestion: Suggestion) -> RenderableType:
    """The mixture, and losses of its average beside those of all alike, the best alone, and the parent."""
    mixture = plain_table()
    mixture.add_column("partition")
    mixture.add_column("share", justify="right")
    for name, weight in sorted(suggestion.mixture.items(), key=lambda pair: -pair[1]):
        mixture.add_row(Text(visible(name)), f"{weight:.1%}")
    table = WideTable("Loss of the average, nats a token", "", list(suggestion.losses))
    lines = (("suggested", suggestion.losses), ("all alike", suggestion.uniform), 
             (f"{suggestion.alone} alone", suggestion.best_alone), ("the parent", suggestion.parent))  # fmt: skip
    for label, losses in lines:
        table.add_row(Text(visible(label)), [f"{loss:.3f}" for loss in losses.values()])
    caption = "Losses of averages rank mixtures; they are not those of a model trained on one."
    return Group(mixture, Text(""), table, Text(caption, "yellow"))
