"""Groups of flags: a command takes several flags as one dataclass, and several commands share it.

typer reads a command's flags from the parameters of a function. `flattened` writes the fields of a dataclass in the
place of the parameter that has its type, so that a group is declared once, with its help texts and defaults, and
arrives as one object. `reads_tables` gives a command the flag of all that read rows from files, `reads_rows` also that
of all that read rows of training data.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from whence.cli.options import pairs
from whence.corpus.bounds import MAX_ROW_BYTES, rows_up_to
from whence.corpus.columns import columns_called
from whence.corpus.plain_text import text_rows_are


def flattened(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with every parameter that is a dataclass replaced by the dataclass' fields, as flags.

    Args:
        command: Its groups are annotated with a dataclass, of which every field has a default and is annotated as
            typer wants a flag to be; field names are unique over the groups.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters, annotations = [], {}
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            annotations[parameter.name] = hints[parameter.name]
            continue
        group = groups[parameter.name]
        flags = get_type_hints(group, include_extras=True)
        for field in fields(group):
            assert field.default is not MISSING, f"{group.__name__}.{field.name} has no default"
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=flags[field.name]
                )
            )
            annotations[field.name] = flags[field.name]

    @wraps(command)
    def call(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    del call.__wrapped__  # typer would read the signature of what is wrapped
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = annotations
    return call


MaxRowBytes = Annotated[int, typer.Option(help="Bytes of the largest row that is read from a file.")]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="NAME=COLUMN",
        help="Read a column under a name that Whence knows: prompt=question,completion=answer. Repeatable.",
    ),
]


TextRows = Annotated[
    str | None,
    typer.Option(metavar="line|paragraph|file|WORDS", help="What is a row of a .txt file.", show_default="line"),
]


def reads_tables(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the flag --max-row-bytes, under which it runs."""
    return _with_flag(command, "max_row_bytes", MaxRowBytes, MAX_ROW_BYTES, rows_up_to)


def reads_rows(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the flags --map, --text-rows and --max-row-bytes, under which it runs."""
    with_map = _with_flag(reads_tables(command), "map", Map, None, lambda texts: columns_called(_columns(texts)))
    return _with_flag(with_map, "text_rows", TextRows, None, text_rows_are)


def _columns(texts: list[str] | None) -> dict[str, str] | None:
    """Columns of --map, several of which may stand in one text with commas between."""
    return None if not texts else pairs("--map", [text for several in texts for text in several.split(",")])


def _with_flag(
    command: Callable[..., Any],
    name: str,
    kind: Any,
    default: Any,
    context: Callable[[Any], AbstractContextManager[None]],
) -> Callable[..., Any]:
    """The command with one more flag, whose value makes a context under which it runs."""
    hints = get_type_hints(command, include_extras=True) | {name: kind}
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
        for parameter in inspect.signature(command).parameters.values()
    ]
    flag = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    @wraps(command)
    def call(**values: Any) -> Any:
        with context(values.pop(name)):
            return command(**values)

    del call.__wrapped__  # typer would read the signature of what is wrapped
    call.__signature__ = inspect.Signature([*parameters, flag])  # type: ignore[attr-defined]
    call.__annotations__ = hints
    return call
