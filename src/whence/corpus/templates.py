"""A tokenizer's chat template: messages in, text out; another template in its place, and the day that it writes.

Some templates write the current date into every prompt (`strftime_now`). Rows that were indexed on one day would then
be other tokens on the next, so a loaded tokenizer has one day for ever, midnight of which is the template's "now".
"""

import datetime
import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import TemplateError

from whence.corpus.roles import names_in
from whence.errors import CorpusError, SettingError
from whence.records import read_record
from whence.storage import AGAIN, Place
from whence.time_limits import time_limit

Tokenizer = Any  # a transformers tokenizer; its classes share no useful static type

DIRECTIVES = "aAwdbBmyYHIMpSfzZjUWcxXGuVeDFTRhklnrst"
"""Letters that `strftime` knows after a %, or after %-."""
TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError),
)
"""How a template ends that refuses messages, or that is itself at fault."""
SECONDS = 10.0
"""Time of a template for one conversation, a thousand times what it takes."""
PROBE = "\uf8ff"
"""A letter that no template writes by itself, of Unicode's private use."""
STORED_DATE = "template_date.json"
"""File of a work directory whose rows are written by a chat template with a date."""
ASSISTANT, LAST = "assistant", "last"
SUPERVISED = {
    ASSISTANT: "what the assistant says, or the completion, with the token that closes it",
    LAST: "the assistant's last turn alone, as LLaMA-Factory's mask_history",
    "all": "every token of a row, as TRL's default for conversations",
}
"""Which tokens of a row are supervised. A question to a trace is about its answer whatever they are."""
_defaults: ContextVar[tuple[str | Path | None, str | None, str | None]] = ContextVar(
    "_defaults", default=(None, None, None)
)


@contextmanager
def written_by(template: str | Path | None, date: str | None, supervised: str | None = None) -> Iterator[None]:
    """Let tokenizers that are loaded meanwhile have this chat template, day and supervision, unless told others."""
    token = _defaults.set((template, date, supervised))
    try:
        yield
    finally:
        _defaults.reset(token)


def writing_defaults() -> tuple[str | Path | None, str | None, str | None]:
    """What `written_by` has set, for another process to set it too."""
    return _defaults.get()


def today() -> str:
    """The current day as YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def checked_date(date: str) -> str:
    """The date as YYYY-MM-DD.

    Raises:
        SettingError: It is none.
    """
    try:
        return datetime.date.fromisoformat(date).isoformat()
    except ValueError:
        raise SettingError(f"--date {date}: a day as YYYY-MM-DD is expected, such as {today()}") from None


def template_text(template: str | Path) -> str:
    """The text of a chat template that is given as a file, or as the text itself.

    Raises:
        SettingError: There is no such file, or it cannot be read.
    """
    if "{" in str(template):
        return str(template)
    try:
        text = Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingError(f"--chat-template {template}: cannot be read ({error}). A Jinja file is expected.") from None
    if "{" not in text:
        raise SettingError(f"--chat-template {template}: no Jinja template in it; one that writes messages is expected")
    return text


def prepare(
    tokenizer: Tokenizer,
    template: str | Path | None = None,
    date: str | None = None,
    trained: str | None = None,
) -> None:
    """Give a tokenizer another chat template where one is named, and its day.

    Args:
        tokenizer: It is changed.
        template: A file, or a template's text; None: that of `written_by`, else its own.
        date: The day that its template writes, as YYYY-MM-DD; None: that of `written_by`, else `trained`, else today.
        trained: The day with which the rows were written that the model was trained on, if that is recorded.

    Raises:
        SettingError: There is no such file, or the date is none.
    """
    default_template, default_date, _ = _defaults.get()
    if (chosen := template or default_template) is not None:
        tokenizer.chat_template = template_text(chosen)
    tokenizer.template_date = checked_date(date or default_date or trained or today())


def supervise(tokenizer: Tokenizer, supervised: str | None = None, trained: str | None = None) -> None:
    """Say which tokens of the rows that a tokenizer reads are supervised.

    Args:
        tokenizer: It is changed.
        supervised: One of `SUPERVISED`; None: that of `written_by`, else `trained`, else "assistant".
        trained: With which the model was trained, if that is recorded.

    Raises:
        SettingError: There is no such choice.
    """
    chosen = supervised or _defaults.get()[2] or trained or ASSISTANT
    if chosen not in SUPERVISED:
        raise SettingError(f"--supervise {chosen}: choose one of {', '.join(SUPERVISED)}")
    tokenizer.supervised = chosen


def supervision(tokenizer: Tokenizer) -> str:
    """Which tokens of the rows that a tokenizer reads are supervised: one of `SUPERVISED`."""
    return getattr(tokenizer, "supervised", ASSISTANT)


def same_supervision(supervised: str | None, stored: str | None, where: str) -> str:
    """What an index' rows are supervised by.

    Raises:
        SettingError: Another one is asked for.
    """
    stored = stored or ASSISTANT
    if supervised and supervised != stored:
        raise SettingError(f"--supervise {supervised}: the rows of {where} were read with {stored}. Leave it out.")
    return stored


def writes_date(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's chat template writes the date."""
    return "strftime_now" in str(tokenizer.chat_template)


class _StoredDate(TypedDict):
    date: str


def date_of(place: Place, tokenizer: Tokenizer, date: str | None = None, trained: str | None = None) -> str | None:
    """The day with which the rows of a work directory are written, kept there; None for a template without a date.

    Args:
        place: The directory.
        tokenizer: Its template decides whether there is a day.
        date: The day that is asked for; None: the stored one, else `trained`, else today.
        trained: The day with which the rows were written that the model was trained on, if that is recorded.

    Raises:
        SettingError: Another day than the stored one is asked for.
    """
    if not writes_date(tokenizer):
        return None
    stored = stored_date(place)
    chosen = same_date(date, stored, place.root) or trained or today()
    if stored is None:
        place.write_document(STORED_DATE, {"date": chosen})
    return chosen


def stored_date(place: Place) -> str | None:
    """The day that `date_of` kept in a directory; None where there is none."""
    if not place.exists(STORED_DATE):
        return None
    return checked_date(read_record(_StoredDate, place.read(STORED_DATE), place.path(STORED_DATE), AGAIN)["date"])


def same_date(date: str | None, stored: str | None, where: str) -> str | None:
    """The day that is asked for or stored; None where neither is.

    Raises:
        SettingError: Another day than the stored one is asked for.
    """
    if date and stored and checked_date(date) != stored:
        raise SettingError(f"--date {date}: the rows of {where} were written with {stored}. Leave --date out.")
    chosen = date or stored
    return checked_date(chosen) if chosen else None


def templated(
    messages: list[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    opened: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Messages as the tokenizer's chat template writes them; `opened` adds the prompt for the assistant's turn.

    Raises:
        CorpusError: The template refuses them.
    """
    options: dict[str, Any] = {} if tools is None else {"tools": tools}
    try:
        if names := names_in(str(tokenizer.chat_template)):
            messages = [message | {"role": names.get(message["role"], message["role"])} for message in messages]
        if _takes_parts_alone(tokenizer, str(tokenizer.chat_template)):
            messages = [message | {"content": _as_parts(message.get("content"))} for message in messages]
        date = getattr(tokenizer, "template_date", None)
        if date is not None and writes_date(tokenizer):
            options["chat_template"] = _dated(tokenizer.get_chat_template(None, tools), date)
        with time_limit(SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened, **options)
        return text.encode("utf-8", "replace").decode()  # a role or a tool may hold lone surrogates, as JSON does
    except TimeoutError:
        raise CorpusError(
            f"the tokenizer's chat template took more than {SECONDS:g} s for these messages, as an endless loop does. "
            "Give another with --chat-template."
        ) from None
    except TEMPLATE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise CorpusError(f"the tokenizer's chat template refuses these messages: {reason}") from None


def templated_or_none(
    messages: list[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    opened: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str | None:
    """As `templated`; None if the template refuses these messages, which are only a piece of a conversation."""
    try:
        return templated(messages, tokenizer, opened=opened, tools=tools)
    except CorpusError:
        return None


@functools.lru_cache(maxsize=4)
def _takes_parts_alone(tokenizer: Tokenizer, template: str) -> bool:
    """Whether a chat template leaves out contents that are text, and writes those that are lists of parts.

    Templates of models that read images do: SmolVLM's and Idefics 3's write nothing of a text, LLaVA-NeXT's refuses it.
    """

    def writes(content: Any) -> bool:
        try:
            with time_limit(SECONDS):
                return PROBE in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except (*TEMPLATE_ERRORS, TimeoutError):
            return False

    return "type" in template and not writes(PROBE) and writes(_as_parts(PROBE))


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _dated(template: str, date: str) -> str:
    """The template with a `strftime_now` of its own, whose "now" is midnight of a day.

    transformers takes no function from a caller. The line break behind the macro is one that Jinja removes, so that
    the template itself begins at the beginning of a line, as before.
    """
    moment = datetime.datetime.fromisoformat(date)
    written = {f"%{flag}{letter}": moment.strftime(f"%{flag}{letter}") for letter in DIRECTIVES for flag in ("", "-")}
    pairs = [("%%", "\0"), *written.items(), ("\0", "%")]  # two signs of per cent are one, and begin nothing
    replacements = "".join(f".replace({json.dumps(old)}, {json.dumps(new)})" for old, new in pairs)
    return f"{{% macro strftime_now(format) %}}{{{{ format{replacements} }}}}{{% endmacro %}}\n{template}"


def generation_prompt(messages: list[dict[str, Any]], tokenizer: Tokenizer, tools: list[dict] | None) -> str | None:
    """What the template writes after messages to open the assistant's turn; None if it refuses them.

    A template may close a conversation that is not to go on (Phi-3's end of text), so the two texts are compared from
    the left; a marker such as `<|assistant|>` is never cut.
    """
    opened = templated_or_none(messages, tokenizer, opened=True, tools=tools)
    ended = templated_or_none(messages, tokenizer, tools=tools)
    if opened is None or ended is None:
        return None
    start = common_prefix_length(opened, ended)
    if start < len(opened) and (marker := re.search(r"[<\[][^<>\[\]\s]*$", opened[:start])):
        start = marker.start()
    return opened[start:]


def common_prefix_length(first: str, second: str) -> int:
    """Number of characters that two texts have in common at their beginnings."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
