"""Whether Whence supervises what TRL's chat templates mark with `{% generation %}`.

python -m benchmarks.corpus.trl_templates TRL_ENVIRONMENT/lib/python3.11/site-packages/trl/chat_templates

TRL ships templates of models, and beside most of them a twin for training that marks what the assistant says. Each twin
writes nine conversations; its marks, as transformers gives them, are held against the mask of `encode` under the twin,
and under the original where that writes the same text. A token is a byte. Templates are read where TRL is installed,
and none is copied: the results hold masks and the differing stretches. Numbers go to
benchmarks/corpus/results/trl_templates.json; about a minute on one core.
"""

import argparse
import hashlib
import itertools
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from benchmarks.marked import filled

from tiny_tokenizers import byte_level
from whence.corpus.templates import TEMPLATE_ERRORS, Tokenizer
from whence.corpus.tokens import encode
from whence.errors import CorpusError

RESULTS = Path(__file__).with_name("results") / "trl_templates.json"
PAGE = Path(__file__).parents[2] / "docs/results/formats.md"
ENDING = "_training.jinja"
BEFORE, BEHIND, SILENT = "TRL alone, before a turn", "TRL alone, behind a turn", "TRL alone, a turn that says nothing"
WHENCE = "Whence alone"


def user(content: str) -> dict:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str, **more: object) -> dict:
    """A message of the assistant."""
    return {"role": "assistant", "content": content, **more}


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "One."}},
            "required": ["a"],
        },
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
PAIR = [user("What is a prime?"), assistant("A number with two divisors.")]
MORE = [*PAIR, user("Name one."), assistant("Seven.")]
TOOLS = [
    user("What is 2 + 2?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "4"},
    assistant("It is 4."),
]
CONVERSATIONS: dict[str, dict] = {
    "plain": {"messages": PAIR},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *PAIR]},
    "several turns": {"messages": [*MORE, user("Another?"), assistant("Eleven.")]},
    "reasoning": {
        "messages": [
            user("Is 9 prime?"),
            assistant("No.", reasoning_content="Three times three."),
            user("And 7?"),
            assistant("Yes.", reasoning_content="Nothing divides it."),
        ]
    },
    "tools": {"messages": TOOLS, "tools": [TOOL]},
    "empty system": {"messages": [{"role": "system", "content": ""}, *PAIR]},
    "two turns of the assistant at the end": {"messages": [*PAIR, assistant("So is seven.")]},
    "unicode": {"messages": [user("日本語で? 😀"), assistant("はい、naïve café 😀.\n\n  Zwei Zeilen.  ")]},
    "long": {"messages": [turn | {"content": turn["content"] * 9} for turn in [*MORE, *TOOLS[:1], *MORE[1:2]] * 3]},
}


def main() -> None:
    """Compare every twin, and write the results and the page's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("templates", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    twins = sorted(arguments.templates.glob(f"*{ENDING}"))
    names = {file.name.removesuffix(ENDING) for file in twins}
    without = sorted(file.stem for file in arguments.templates.glob("*.jinja") if file not in twins)
    cases = {
        twin.name.removesuffix(ENDING): {
            name: compared(twin.read_text(), twin.with_name(twin.name.replace("_training", "")).read_text(), row)
            for name, row in CONVERSATIONS.items()
        }
        for twin in twins
    }
    answer = {"without a twin": [name for name in without if name not in names], "templates": cases}
    lines = [f'  "{name}": {{\n' + _lines(found) + "\n  }" for name, found in cases.items()]
    head = json.dumps({"without a twin": answer["without a twin"]}).removesuffix("}")
    RESULTS.write_text(f'{head},\n "templates": {{\n' + ",\n".join(lines) + "\n }\n}\n")
    PAGE.write_text(filled(PAGE.read_text(), "templates", table(answer)))


def _lines(found: dict[str, dict]) -> str:
    return ",\n".join(f"   {json.dumps(name)}: {json.dumps(case, ensure_ascii=False)}" for name, case in found.items())


def compared(twin: str, original: str, row: dict) -> dict:
    """TRL's mask of a conversation and where Whence's differs, under the twin and under the original."""
    tokenizer = byte_level(chat=twin)
    if not _writes_text(tokenizer):
        parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in row["messages"]]
        row = row | {"messages": parts}
    try:
        marked = tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
    except TEMPLATE_ERRORS as error:
        return {"refused by the template": str(error)[:120]}
    ids, mask = marked["input_ids"], [bool(on) for on in marked["assistant_masks"]]
    mask[0] = False
    digest = hashlib.sha256(bytes(str(ids), "ascii")).hexdigest()[:16]
    out = {"tokens": len(ids), "sha256": digest, "marked": _spans(mask)}
    for name, template in (("twin", twin), ("original", original)):
        other = byte_level(chat=template)
        try:
            encoded = encode(row, other)
        except CorpusError as error:
            out[name] = {"refused": str(error)[:160]}
            continue
        if encoded.ids != ids:
            out[name] = {"another text": len(encoded.ids)}
            continue
        out[name] = differences(ids, mask, encoded.supervised, other)
    return out


def _writes_text(tokenizer: Tokenizer) -> bool:
    """Whether a template writes contents that are text; TRL gives parts to those of models that read images."""
    try:
        return "prime" in tokenizer.apply_chat_template(PAIR, tokenize=False)
    except TEMPLATE_ERRORS:
        return False


def _spans(mask: list[bool]) -> list[tuple[int, int]]:
    """Stretches that are marked, as [start, end) in tokens."""
    edges = [place for place, (a, b) in enumerate(itertools.pairwise([False, *mask, False])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def differences(ids: list[int], theirs: list[bool], ours: list[bool], tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Stretches of text that one of them supervises, by where they stand; empty where the masks are the same."""
    out: dict[str, list[str]] = {}
    for start, end in _spans([a and not b for a, b in zip(theirs, ours, strict=True)]):
        is_before = end < len(ids) and ours[end]
        place = BEFORE if is_before else BEHIND if ours[start - 1] else SILENT
        out.setdefault(place, []).append(tokenizer.decode(ids[start:end]))
    for start, end in _spans([b and not a for a, b in zip(theirs, ours, strict=True)]):
        out.setdefault(WHENCE, []).append(tokenizer.decode(ids[start:end]))
    return out


def table(answer: dict) -> str:
    """The page's table: for each template the conversations, by where the masks differ, and the stretches."""
    lines = [
        "| template | same | differ | refused by the template | before a turn | behind a turn |"
        " a turn that says nothing | Whence alone | the original's mask |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cases in answer["templates"].items():
        read = [case for case in cases.values() if "twin" in case]
        same = sum(not case["twin"] for case in read)
        texts = [
            dict.fromkeys(text for case in read for text in case["twin"].get(place, ()))
            for place in (BEFORE, BEHIND, SILENT, WHENCE)
        ]
        shown = [", ".join(_as_code(text) for text in found) for found in texts]
        other = sum("another text" in case["original"] for case in read)
        refused = sum("refused" in case["original"] for case in read)
        unlike = sum(case["original"] != case["twin"] for case in read) - other - refused
        counted = ((other, "another text"), (refused, "refused"), (unlike, "another mask"))
        notes = [f"{count} {words}" for count, words in counted if count]
        cells = [
            name,
            same,
            len(read) - same,
            len(cases) - len(read),
            *shown,
            ", ".join(notes) or ("as here" if read else ""),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _as_code(text: str) -> str:
    """A text in a cell of a table, its newlines as the two characters that write them."""
    return f"`{json.dumps(text, ensure_ascii=False)[1:-1]}`".replace("|", "\\|")


if __name__ == "__main__":
    main()
