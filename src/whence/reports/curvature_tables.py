"""Curvature in the terminal: what `curvature` and `info` print of it."""

from typing import Any

from rich.console import Group, RenderableType

from whence.counts import duration, number_of
from whence.reports.tables import pairs_table, plain_table
from whence.second_order.eigen import DAMPING
from whence.second_order.store import CurvatureStore
from whence.sizes import shown_size

NAMES = {"ekfac": "EK-FAC", "kfac": "K-FAC"}


def curvature_facts(store: CurvatureStore) -> dict[str, Any]:
    """What was measured, and of each kind of layer how steep the loss is, and along how many directions.

    `mean` is the mean eigenvalue, in nats^2 over squared weights for a row's loss; `directions` the share of a layer's
    directions whose eigenvalue is above a tenth of that, which damping of the default leaves alone.
    """
    measured, rows = store.measured, list[dict[str, Any]]()
    groups: dict[str, list[Any]] = {}
    for name, values in store.eigenvalues().items():
        groups.setdefault(name.rpartition(".")[2], []).append(values)
    for name, values in groups.items():
        steep = [(value > DAMPING * value.mean()).float().mean() for value in values]
        rows.append({"layers": name, "count": len(values),
                     "mean": sum(float(value.mean()) for value in values) / len(values),
                     "directions": sum(map(float, steep)) / len(values)})  # fmt: skip
    return {
        "curvature": store.place.root,
        "kind": measured.kind,
        "answers": "the rows' own" if measured.is_empirical else f"drawn by the model, seed {measured.seed}",
        "model": measured.model,
        "index": measured.index,
        "measured_rows": measured.rows,
        "of_rows": measured.of_rows,
        "bytes": store.bytes,
        "seconds": store.description.seconds,
        "rows": rows,
    }


def curvature_table(facts: dict[str, Any]) -> RenderableType:
    """The facts in a few lines, and a line for each kind of layer."""
    lines = {
        "curvature": f"{facts['curvature']}, {shown_size(facts['bytes'])}",
        "of": facts["model"],
        "rows": f"{facts['measured_rows']:,} of {number_of(facts['of_rows'], 'row')} of {facts['index']}",
        "answers": facts["answers"],
        "time": duration(facts["seconds"]),
    }
    table = plain_table("Layers")
    table.add_column("layers", no_wrap=True)
    for name in ("count", "mean eigenvalue", "steep directions"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in facts["rows"]:
        table.add_row(row["layers"], f"{row['count']:,}", f"{row['mean']:.2e}", f"{100 * row['directions']:.1f}%")
    return Group(pairs_table(lines), table)


def curvature_answer(facts: dict[str, Any]) -> str:
    """What there is now, in a sentence."""
    layers = sum(row["count"] for row in facts["rows"])
    return (
        f"{NAMES[facts['kind']]} of {number_of(facts['measured_rows'], 'row')} and {number_of(layers, 'layer')}: a "
        "query's gradient can be divided by it."
    )
