"""Groups of flags: a command takes several flags as one dataclass, and several commands share it.

typer reads a command's flags from the parameters of a function. `flattened` writes the fields of a dataclass in the
place of the parameter that has its type, so that a group is declared once, with its help texts and defaults, and
arrives as one object. `reads_rows` gives a command the one flag of all that read rows from files.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from whence.corpus.bounds import MAX_ROW_BYTES, rows_up_to


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


def reads_rows(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the flag --max-row-bytes, under which it runs."""
    hints = get_type_hints(command, include_extras=True)
    hints["max_row_bytes"] = Annotated[int, typer.Option(help="Bytes of the largest row that is read from a file.")]
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
        for parameter in inspect.signature(command).parameters.values()
    ]
    flag = inspect.Parameter(
        "max_row_bytes", inspect.Parameter.KEYWORD_ONLY, default=MAX_ROW_BYTES, annotation=hints["max_row_bytes"]
    )

    @wraps(command)
    def call(max_row_bytes: int, **values: Any) -> Any:
        with rows_up_to(max_row_bytes):
            return command(**values)

    del call.__wrapped__  # typer would read the signature of what is wrapped
    call.__signature__ = inspect.Signature([*parameters, flag])  # type: ignore[attr-defined]
    call.__annotations__ = hints
    return call
