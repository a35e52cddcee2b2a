"""What README.md and the pages under docs/ show: commands and Python, in order, each with the output below it.

A block shows a session where it has a line that begins with `$ `: such lines are its commands, and the others what they
printed. Else every line is a command if the first one is. A block without commands shows output of what came last.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = ("docs/reference/cli.md", "docs/LOG.md")
"""The help itself; a diary, whose commands are of its days."""
PAGES = [
    name
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if (name := str(file.relative_to(ROOT))) not in GENERATED
]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
PROGRAM = re.compile(r"(?:\w+=\S+ )*(?:whence|make|pip|python|pytest|ls|head|cat|cd|printf|accelerate)\b(?!:)")
DATA = ("json",)
"""Languages of blocks that are neither commands nor code."""
NEXT = re.compile(r" Next: (whence .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """A command, or Python."""

    page: str
    line: int
    text: str
    is_python: bool
    shown: str = ""
    """The output that the page shows below it, in this block or the next."""

    @property
    def words(self) -> list[str]:
        """A command's words, as a shell would split them."""
        return shlex.split(self.text, comments=True)

    @property
    def next(self) -> str | None:
        """The next command that this output names."""
        named = NEXT.findall(self.shown)
        return named[-1] if named else None

    def __str__(self) -> str:
        """For the message of a test."""
        return f"{self.page}:{self.line}: {self.text}"


def steps_of(page: str) -> list[Step]:
    """The steps of a page, in order."""
    text, steps = (ROOT / page).read_text(), []
    for block in FENCE.finditer(text):
        language, body = block[1], block[2]
        line = text[: block.start()].count("\n") + 2
        if language == "python":
            steps.append(Step(page, line, body, is_python=True))
        elif language not in (*DATA, ""):
            raise ValueError(f"{page}:{line}: a block of {language!r}: pages show commands in plain blocks, or python")
        elif language == "" and (commands := _commands(page, line, body)):
            steps += commands
        elif steps and not steps[-1].shown:
            steps[-1] = Step(steps[-1].page, steps[-1].line, steps[-1].text, steps[-1].is_python, body)
    return steps


def shown_block(page: str, first: str) -> str:
    """The block of a page that begins with a text."""
    return next(block[2] for block in FENCE.finditer((ROOT / page).read_text()) if block[2].startswith(first))


def output_lines(page: str) -> list[str]:
    """Lines of plain blocks that are no command."""
    text = (ROOT / page).read_text()
    bodies = [block[2] for block in FENCE.finditer(text) if block[1] == ""]
    return [line for body in bodies for command, line, _ in _lines(body) if not command]


def commands_in_text(page: str) -> list[list[str]]:
    """Words of commands that a page's sentences and tables hold, in back quotes."""
    text = FENCE.sub("", (ROOT / page).read_text())
    quoted = [" ".join(words.split()) for words in re.findall(r"`(whence [^`]*)`", text)]
    return [shlex.split(re.sub(r"[][|]", " ", words)) for words in quoted]


def _commands(page: str, line: int, body: str) -> list[Step]:
    steps: list[Step] = []
    for is_command, text, number in _lines(body):
        if is_command:
            steps.append(Step(page, line + number, text, is_python=False))
        elif steps:
            last = steps[-1]
            steps[-1] = Step(last.page, last.line, last.text, last.is_python, f"{last.shown}{text}\n")
    return steps


def _lines(body: str) -> list[tuple[bool, str, int]]:
    """Whether each line is a command, its text, and its number; lines that end in a backslash are one."""
    lines = body.replace("\\\n", "\0").split("\n")[:-1]
    has_prompts = any(line.startswith("$ ") for line in lines)
    starts = bool(lines) and PROGRAM.match(lines[0]) is not None
    out, number = [], 0
    for line in lines:
        is_command = line.startswith("$ ") if has_prompts else starts and PROGRAM.match(line) is not None
        out.append((is_command, line.removeprefix("$ ").replace("\0", " ") if is_command else line, number))
        number += 1 + line.count("\0")
    return out
