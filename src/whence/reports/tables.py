"""What a person reads: tables for the terminal, and rows of the same thing as files.

Corpus text is untrusted: it is shown as text, never read as markup, and control characters (which could move a
terminal's cursor) are made visible.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whence.errors import SettingError, StorageError
from whence.indexing.speed import BenchResult
from whence.storage import Place, reason
from whence.tracing.results import SURE, Answer, Hit, TokenMatrix, Trace

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the order in which others are shown."""
UNSURE = 0.1
"""Probability of a token below which it is shown as a guess; from `SURE` it is shown as sure."""


COLOURED = 3
"""Examples shown token by token in the terminal."""
WINDOW = 90
"""Their training tokens shown, around the one of most influence."""


def trace_tables(trace: Trace, *, most: int = 20) -> RenderableType:
    """Every answer with the model's certainty, and the examples behind it.

    Args:
        trace: What to show.
        most: Queries shown at most.
    """
    parts: list[RenderableType] = [Text(visible(note), "yellow") for note in trace.notes]
    for number, answer in enumerate(trace.answers[:most]):
        parts += [answer_text(answer), _hits_table(trace, number), *_words(trace, number)]
        parts += [_coloured(hit) for hit in trace.of(number)[:COLOURED] if hit.tokens is not None]
        parts.append(Text(""))
    if len(trace.answers) > most:
        parts.append(Text(f"... and {len(trace.answers) - most} more queries; write them all with -o FILE", "dim"))
    return Group(*parts)


def _words(trace: Trace, query: int) -> list[RenderableType]:
    """What the numbers say, in sentences."""
    said: list[RenderableType] = []
    if trace.verdicts:
        said.append(Text(trace.verdicts[query], "yellow" if trace.verdicts[query].startswith("Nothing") else "green"))
    if trace.overlaps:
        said.append(Text(f"Of the index' best, {trace.overlaps[query]:.0%} are among the exact best.", "dim"))
    if any(hit.null is not None and hit.null.generic for hit in trace.of(query)):
        said.append(Text("* generic: this example scores high whatever is asked; --specific corrects for that.", "dim"))
    return said


def _coloured(hit: Hit) -> Text:
    """A training example around its token of most influence, helpful tokens in blue, opposing ones in orange."""
    tokens: TokenMatrix = hit.tokens  # type: ignore[assignment]
    influence = tokens.matrix.sum(0).tolist()
    most = max((abs(value) for value in influence), default=0.0)
    centre = max(range(len(influence)), key=lambda place: abs(influence[place]), default=0)
    first = max(0, min(centre - WINDOW // 2, len(influence) - WINDOW))
    text = Text().append(f"{hit.rank:>4}  ", "bold")
    for place in range(first, min(first + WINDOW, len(influence))):
        text.append(visible(tokens.train[place]).replace("\n", "\u23ce"), _shade(influence[place], most))
    return text


def _shade(value: float, most: float) -> str:
    """Style of a token: none, faint, clear or strong, by its share of the largest influence."""
    share = abs(value) / most if most else 0.0
    if share < 0.15:
        return "dim"
    hues = ("#9ecae1", "#4292c6", "#2171b5") if value > 0 else ("#fdd0a2", "#fd8d3c", "#d94801")
    hue = hues[0 if share < 0.4 else 1 if share < 0.75 else 2]
    return hue if share < 0.4 else f"bold {'black' if share < 0.75 else 'white'} on {hue}"


def answer_text(answer: Answer) -> Text:
    """The prompt, the completion with each token coloured by its probability, and a word on certainty."""
    text = Text()
    text.append("prompt      ", "bold").append(visible(answer.prompt) + "\n")
    text.append("model said  " if answer.is_generated else "completion  ", "bold")
    asked = answer.asked or [True] * len(answer.tokens)
    _append_tokens(text, answer.tokens, answer.probabilities, asked)
    if answer.contrast is not None:
        text.append("\n").append("and not     ", "bold")
        count = len(answer.contrast_tokens)
        _append_tokens(text, answer.contrast_tokens, answer.contrast_probabilities, [True] * count)
    text.append("\n").append("how sure    ", "bold").append(answer.certainty).append("\n")
    return text


def _append_tokens(text: Text, tokens: list[str], probabilities: list[float], asked: list[bool]) -> None:
    """Tokens coloured by the model's probability; what a span leaves out is dim."""
    for token, probability, is_asked in zip(tokens, probabilities, asked, strict=True):
        style = "green" if probability >= SURE else "red" if probability < UNSURE else "yellow"
        text.append(visible(token), style if is_asked else "dim")


def _hits_table(trace: Trace, query: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    helpful, opposing = trace.of(query), trace.of(query, opposing=True)
    has_exact = any(hit.exact is not None for hit in helpful)
    has_null = any(hit.null is not None for hit in helpful)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    if has_exact:
        table.add_column("exact", justify="right")
    if has_null:
        table.add_column("z", justify="right")
    table.add_column("id", overflow="fold", max_width=32, style="cyan")
    table.add_column("training example", ratio=1)
    form = "+.4g" if trace.method in ("dot", "tracin") else "+.3f"
    for hits in (helpful, opposing):
        for hit in hits:
            table.add_row(*_cells(hit, form, has_exact, has_null))
        if hits is helpful and opposing:
            table.add_section()
    against = (
        "oppose the answer" if any(hit.score < 0 for hit in opposing) else "are the lowest; none opposes the answer"
    )
    table.caption = f"{trace.method} over {trace.rows:,} examples; negative ranks {against}"
    table.caption_justify = "left"
    return table


def _cells(hit: Hit, form: str, has_exact: bool, has_null: bool) -> list[RenderableType]:
    cells: list[RenderableType] = [str(hit.rank), _signed(hit.score, form)]
    if has_exact:
        cells.append(_signed(hit.exact, form) if hit.exact is not None else "")
    if has_null:
        null = hit.null
        cells.append("" if null is None else f"{null.z:+.1f}{'*' if null.generic else ' '}")
    row = hit.as_row()
    text = Text(overflow="ellipsis", no_wrap=True)
    if "text" in row:
        text.append(_one_line(row["text"]))
    else:
        text.append(_one_line(row["prompt"]) + " ", "dim").append(_one_line(row["completion"]))
    return [*cells, Text(visible(hit.id)), text]


def _signed(value: float, form: str) -> Text:
    return Text(f"{value:{form}}", "green" if value > 0 else "red")


def _one_line(value: Any) -> str:
    return " ".join(visible(str(value if value is not None else ""))[:400].split())


def visible(text: str) -> str:
    """Text without control characters but tab and newline; each becomes its Unicode picture or escape."""
    return "".join(
        f"\\u{ord(char):04x}"
        if char in BIDI
        else char
        if (char >= " " and char != "\x7f" and not "\x80" <= char <= "\x9f") or char in "\n\t"
        else _picture(char)
        for char in text
    )


def _picture(char: str) -> str:
    return chr(0x2400 + ord(char)) if char < " " else f"\\x{ord(char):02x}"


def info_table(info: dict[str, Any]) -> Table:
    """An index in a few lines."""
    space = info["settings"]["space"]
    counts = {name: count for name, count in info["counts"].items() if count and name != "ok"}
    lines = {
        "index": info["path"],
        "state": "complete" if info["complete"] else f"not complete: {info['to_do']}",
        "rows": f"{info['rows']:,}, of which {info['ok_rows']:,} can be ranked",
        "other counts": ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none",
        "vectors": f"{info['width']:,} numbers as {info['codec']}, {info['bytes_per_row']:,.0f} bytes a row",
        "size": f"{info['bytes'] / 1e6:,.1f} MB",
        "gradients": ", ".join(f"{name} {value}" for name, value in space.items() if value is not None),
        "layers": f"{len(info['settings']['layer_names'])}, {info['settings']['traced_fraction']:.0%} of the weights",
        "checkpoints": "\n".join(
            f"{entry['path']}" + (f" (weight {entry['weight']:.3f})" if len(info["checkpoints"]) > 1 else "")
            for entry in info["checkpoints"]
        ),
        "corpora": "\n".join(f"{entry['name']} ({entry['rows']:,} rows)" for entry in info["corpora"]),
    }
    return pairs_table(lines)


def pairs_table(lines: dict[str, str]) -> Table:
    """Names and values, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(value))
    return table


def write_rows(rows: Sequence[dict[str, Any]], out: str | Path) -> None:
    """Write rows by the ending of a file's name: .jsonl, .csv or .parquet; whole or not at all.

    Args:
        rows: What is found.
        out: A file, here or at an fsspec address.

    Raises:
        StorageError: The file cannot be written.
    """
    ending = Path(out).suffix
    rows = [{name: _storable(value) for name, value in row.items()} for row in rows]
    if ending == ".parquet":
        data = _parquet([_flat(row) for row in rows])
    elif ending == ".csv":
        data = _csv([_flat(row) for row in rows]).encode("utf-8", "replace")
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
    _write(out, data)


def write_page(page: str, out: str | Path) -> None:
    """Write a report, here or at an fsspec address, whole or not at all.

    Raises:
        StorageError: The file cannot be written.
    """
    _write(out, page.encode("utf-8", "replace"))


def _write(out: str | Path, data: bytes | memoryview) -> None:
    place, name = _destination(out)
    try:
        place.write(name, [data], total=len(data))
    except StorageError as error:
        raise StorageError(f"{out}: cannot be written ({reason(error.__cause__ or error)})") from None


def _destination(out: str | Path) -> tuple[Place, str]:
    """The directory that a file goes to, and its name there."""
    file = Place.at(out)
    folder, _, name = file.root.rpartition("/")
    return Place(file.fs, folder), name


def _storable(value: Any) -> Any:
    """Text without lone surrogates, which JSON may hold and UTF-8 lacks; numbers as JSON has them."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else finite(value)


def finite(value: Any) -> Any:
    """The same, with null for numbers that JSON has no word for.

    >>> finite({"z": [1.5, float("nan")]})
    {'z': [1.5, None]}
    """
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """For tables: what is nested becomes JSON text, one type a column."""
    return {name: json.dumps(value) if isinstance(value, dict | list) else value for name, value in row.items()}


def check_ending(
    path: str | Path, endings: Sequence[str] = (".jsonl", ".csv", ".parquet"), *, flag: str = "-o"
) -> None:
    """Refuse, before any work is done, a file name or address that nothing can be written to."""
    if Path(path).suffix not in endings:
        listed = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise SettingError(f"{flag} {path}: what is found is written to {listed}")
    place, _ = _destination(path)
    if place.is_local and not Path(place.root or "/").is_dir():
        raise SettingError(f"{flag} {path}: there is no directory {place.root}")


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _parquet(rows: Sequence[dict[str, Any]]) -> memoryview:
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getbuffer()


def bench_table(result: BenchResult) -> Table:
    """A bench in a few lines."""
    least, most = result.spread["index"]
    return pairs_table(
        {
            "batch": f"{result.examples_per_batch} examples of {result.tokens_per_example:,.0f} tokens, "
            f"{result.batches} batches each",
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
