"""An index and a bench in the terminal: what `info`, `index`, `append` and `bench` print."""

from typing import Any

from rich.table import Table

from whence.counts import duration, number_of
from whence.indexing.speed import BenchResult
from whence.reports.tables import pairs_table


def info_table(info: dict[str, Any]) -> Table:
    """An index in a few lines."""
    space = info["settings"]["space"]
    counts = {name: count for name, count in info["counts"].items() if count and name != "ok"}
    lines = {
        "index": info["path"],
        "state": "complete" if info["complete"] else f"not complete: {info['to_do']}",
        "rows": f"{info['rows']:,}, of which {info['ok_rows']:,} can be ranked",
        "other counts": ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none",
        "pairs of answers": "contrasts" if info["settings"].get("preferences") else None,
        "vectors": f"{info['width']:,} numbers as {info['codec']}, {info['bytes_per_row']:,.0f} bytes a row",
        "size": f"{info['bytes'] / 1e6:,.1f} MB",
        "gradients": ", ".join(f"{name} {value}" for name, value in space.items() if value is not None),
        "layers": f"{len(info['settings']['layer_names'])}, {info['settings']['traced_fraction']:.0%} of the weights",
        "checkpoints": "\n".join(
            f"{entry['path']}" + (f" (weight {entry['weight']:.3f})" if len(info["checkpoints"]) > 1 else "")
            for entry in info["checkpoints"]
        ),
        "corpora": "\n".join(f"{entry['name']} ({number_of(entry['rows'], 'row')})" for entry in info["corpora"]),
    }
    return pairs_table({name: line for name, line in lines.items() if line is not None})


def info_answer(info: dict[str, Any]) -> str:
    """Whether the index can be asked, in a sentence."""
    if not info["complete"]:
        return f"The index is not complete: {info['to_do']}."
    return f"The index is complete: {info['ok_rows']:,} of its {number_of(info['rows'], 'row')} can be ranked."


def bench_answer(result: BenchResult) -> str:
    """What an index costs, in a sentence."""
    return (
        f"Indexing a batch takes {result.ratio:.2f} of the time of a training step; 100,000 such examples take about "
        f"{duration(1e5 / max(result.examples_per_second, 1e-9))} here."
    )


def bench_table(result: BenchResult) -> Table:
    """A bench in a few lines."""
    least, most = result.spread["index"]
    return pairs_table(
        {
            "batch": f"{number_of(result.examples_per_batch, 'example')} of "
            f"{number_of(round(result.tokens_per_example), 'token')}, "
            f"{number_of(result.batches, 'batch', 'batches')} each",
            "training step": f"{result.step_seconds:.4f} s "
            f"(forward + backward {result.forward_backward_seconds:.4f} s)",
            "index": f"{result.index_seconds:.4f} s ({least:.4f} to {most:.4f})",
            "ratio": f"{result.ratio:.3f} of a training step, "
            f"{result.ratio_to_forward_backward:.3f} of forward + backward",
            "throughput": f"{result.examples_per_second:,.1f} examples/s, {result.tokens_per_second:,.0f} tokens/s",
            "peak memory": f"index {result.peak_bytes / 1e6:,.0f} MB, training {result.step_peak_bytes / 1e6:,.0f} MB",
            "an example": f"{result.width:,} numbers, {result.bytes_per_example:,} bytes",
        }
    )
