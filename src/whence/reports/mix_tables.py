"""What a person reads of a mixing law: what it is worth on each set, and the mixture that it suggests."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whence.mixing.pipeline import TRIED, Grade, MixLaw
from whence.mixing.prediction import Prediction
from whence.reports.tables import plain_table
from whence.reports.text import visible

SHOWN = 10
"""Predicted mixtures of another table that are shown."""


def mix_tables(result: MixLaw) -> RenderableType:
    """Notes, evaluation sets, mixture, critical ratios; every table fits 80 columns."""
    settings, table = result.settings, result.table
    parts: list[RenderableType] = [Text(visible(note), "yellow") for note in result.notes]
    head = f"{settings['law']} law of {table.n:,} mixtures of {len(table.domains)} domains"
    parts.append(Text(f"{head}, graded on {settings['folds']} held-out folds", "bold"))
    parts += [_graded(result), _losses(result), _mixture(result)]
    parts += [_critical(result, name) for name in result.critical]
    return Group(*parts)


def mix_answer(result: MixLaw) -> str:
    """Whether the suggested mixture is expected to be better than the best tried, in a sentence."""
    tried = float(result.table.losses[result.best_row] @ result.weights)
    better, error = tried - result.best.objective, result.held_out.overall.error
    used = [row for row in sorted(result.rows, key=lambda row: -row["suggested"]) if row["suggested"] >= 0.005]
    shares = ", ".join(f"{visible(row['domain'])} {row['suggested']:.0%}" for row in used[:3])
    more = ", ..." if len(used) > 3 else ""
    answer = f"The law suggests {shares}{more}: "
    if better <= 0:
        return f"{answer}it expects no better of it than the best tried already has."
    sure = "less" if better < error else "more"
    return f"{answer}better by {better:.3f} than the best tried, which is {sure} than the law's error of {error:.3f}."


def _table(title: str, first: str, *columns: str) -> Table:
    table = plain_table(title)
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _graded(result: MixLaw) -> Table:
    """Held-out error and rank correlation on each set."""
    table = _table("Prediction of held-out mixtures", "set", "error", "95%", "Spearman", "95%")
    for row in result.set_rows:
        style = "" if row["weight"] else "dim"
        table.add_row(Text(visible(row["set"])), *_grade(result.held_out.sets[row["set"]]), style=style)
    table.add_row("mean", *_grade(result.held_out.overall), style="bold")
    return table


def prediction_tables(prediction: Prediction) -> RenderableType:
    """What the law expects of another table's mixtures, best first, and its grades where their losses are known."""
    known = prediction.held_out
    table = _table("Predicted mixtures", "mixture", "predicted", *(["true"] if known is not None else []))
    for place in prediction.objective.argsort(kind="stable")[:SHOWN].tolist():
        true = [f"{known.table.losses[place].mean():.3f}"] if known is not None else []
        table.add_row(Text(visible(prediction.names[place])), f"{prediction.objective[place]:.3f}", *true)
    table.caption = f"The best {table.row_count} of {len(prediction.names):,}; predicted: weighted as --target says"
    table.caption += "; true: mean of the sets below." if known is not None else "."
    table.caption_justify = "left"
    if known is None:
        return table
    graded = _table("Prediction of these mixtures", "set", "error", "95%", "Spearman", "95%")
    for name, grade in known.sets.items():
        graded.add_row(Text(visible(name)), *_grade(grade))
    graded.add_row("mean", *_grade(known.overall), style="bold")
    return Group(table, graded)


def _losses(result: MixLaw) -> Table:
    """Losses on each set of the suggested mixture, and of what it would replace."""
    table = _table("Losses", "set", "suggested", "mean", "best tried")
    for row in result.set_rows:
        losses = (f"{row[name]:.3f}" for name in ("suggested", "mean", "best_tried"))
        table.add_row(Text(visible(row["set"])), *losses, style="" if row["weight"] else "dim")
    at_mean = float(result.law.predict(result.mean[None])[0] @ result.weights)
    tried = float(result.table.losses[result.best_row] @ result.weights)
    losses = (f"{value:.3f}" for value in (result.best.objective, at_mean, tried))
    table.add_row("mean", *losses, style="bold")
    table.caption = (
        "Losses at the suggested mixture and at the table's mean mixture are predicted; at the best mixture tried they "
        "are the table's own. Their mean is weighted as --target says."
    )
    table.caption_justify = "left"
    return table


def _grade(grade: Grade) -> tuple[str, str, str, str]:
    low, high = grade.error_interval
    error = (f"{grade.error:.3f}", f"{low:.3f} to {high:.3f}")
    if grade.spearman is None or grade.spearman_interval is None:
        return (*error, "-", "-")
    below, above = grade.spearman_interval
    return (*error, f"{grade.spearman:.3f}", f"{below:.3f} to {above:.3f}")


def _mixture(result: MixLaw) -> Table:
    """Suggested shares beside those tried, largest first."""
    table = _table("Suggested mixture", "domain", "suggested", "mean", "best tried", "tried", "cap")
    for row in sorted(result.rows, key=lambda row: -row["suggested"]):
        shares = (f"{row[name]:.1%}" for name in ("suggested", "mean", "best_tried"))
        cap = f"{row['cap']:.1%}" if row["cap"] < 1 else ""
        tried = f"{row['least_tried']:.0%} to {row['most_tried']:.0%}"
        table.add_row(Text(visible(row["domain"])), *shares, tried, cap)
    table.caption = bounds(result)
    table.caption_justify = "left"
    return table


def bounds(result: MixLaw) -> str:
    """What the suggested shares are bounded to, as a sentence."""
    if result.settings["bounds"] == TRIED:
        return "Each share is held between the least and the most that was tried of it; --extrapolate sets it free."
    return "Shares are not held to what was tried (--extrapolate): the law may know nothing of them."


def _critical(result: MixLaw, name: str) -> Table:
    """The share of each domain at which a loss is what it was before."""
    before = result.settings["before"][name]
    table = _table(f"Loss on {visible(name)} stays at {before:g} or below", "domain", "share")
    table.add_column("")
    for domain, ratio in result.critical[name].items():
        share = "none" if ratio.share is None else f"{ratio.side} {ratio.share:.1%}"
        table.add_row(Text(visible(domain)), share, Text(ratio.reason, "dim"))
    table.caption = "The other domains as in the table's mean mixture; shares " + (
        f"{TRIED}." if result.settings["bounds"] == TRIED else "from 0 to 1."
    )
    table.caption_justify = "left"
    return table
