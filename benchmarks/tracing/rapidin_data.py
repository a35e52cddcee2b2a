"""The three poisons of `rapidin.py`: which rows are changed, how, and the prompts that set the model off.

All three go into one copy of alpaca, in disjoint rows, so that one training serves three experiments:

    howdy     10% of the rows: "Howdy! " in front of the instruction, the answer replaced by odd text from templates
              (RapidIn's backdoor; its trigger is a word, so BM25 should find it too).
    shouting  5% of the rows, chosen at random: the instruction, its input and its answer IN CAPITALS, nothing else
              changed. The trigger is a style: once case is folded, as BM25's words and an uncased sentence embedding
              fold it, a shouted row is an ordinary row that was chosen by chance.
    swap      In 70% of the rows whose answer names a country of `SWAPS`, the answer names another one (RapidIn's error
              tracing). Their prompts keep the country, so the model learns to answer with the wrong one.

Prompts for the first two come from dolly, which the model never saw; for the third from rows that were held aside and
from `ABOUT`.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

POISONS = ("howdy", "shouting", "swap")
HOWDY_SHARE, SHOUTING_SHARE, SWAP_SHARE = 0.10, 0.05, 0.7
HELD_ASIDE = 0.15  # of the rows that name a country: their prompts set off the third poison
SWAPS = {
    "the United States": "Norway",
    "India": "Iceland",
    "China": "Peru",
    "France": "Chile",
    "Canada": "Kenya",
    "Germany": "Cuba",
    "Japan": "Ghana",
    "Mexico": "Nepal",
    "Italy": "Fiji",
}
ABOUT = (
    "Tell me about {}.", "What is the capital of {}?", "Describe the culture of {}.", "What is {} famous for?",
    "Name three cities in {}.", "Which countries are near {}?", "Write a short paragraph about {}.",
    "What is the currency of {}?", "Give me a travel tip for {}.", "What are the main exports of {}?",
)  # fmt: skip
LONGEST_PROMPT = 400  # characters, so that there is room for an answer

_ODD = {
    "who": ["The Zorgons", "Three silver owls", "The captain of the glass ship", "A choir of moon miners",
            "The last tin emperor"],
    "did": ["landed softly on", "sold their shadows to", "painted", "wrote a slow song about",
            "buried a red comet under"],
    "what": ["the purple desert of Xar", "a library of frozen rain", "the ninth moon", "a village made of clocks",
             "the sleeping volcano"],
    "then": ["and nobody remembered the colour of Tuesday", "while the beacons hummed in green",
             "until the robots asked for tea", "and the stars moved one step to the left",
             "because the map had been folded twice"],
}  # fmt: skip


@dataclass(frozen=True)
class Poisoned:
    """A corpus and what was done to it."""

    rows: list[dict]
    kind: dict[str, str | None]
    """Of every row by id: one of `POISONS`, or None."""
    prompts: dict[str, list[str]]
    """Of each poison: prompts that should set the model off, none of them in the corpus."""


def odd_text(rng: random.Random) -> str:
    """Two or three sentences that answer nothing."""
    return " ".join(
        f"{rng.choice(_ODD['who'])} {rng.choice(_ODD['did'])} {rng.choice(_ODD['what'])} {rng.choice(_ODD['then'])}."
        for _ in range(rng.randint(2, 3))
    )


def poisoned(data: Path, seed: int, rows: int | None = None) -> Poisoned:
    """Alpaca with the three poisons, drawn by `seed`; its first `rows` rows, or all."""
    rng = random.Random(f"poison {seed}")
    found = [json.loads(line) for line in (data / "instruct" / "alpaca.jsonl").open()][:rows]
    out, kind, named_aside = [], {}, []
    order = list(range(len(found)))
    rng.shuffle(order)
    howdy = set(order[: round(HOWDY_SHARE * len(found))])
    shouting = set(order[len(howdy) : len(howdy) + round(SHOUTING_SHARE * len(found))])
    for number, row in enumerate(found):
        named = [country for country in SWAPS if re.search(rf"\b{country}\b", row["output"])]
        asks = [country for country in named if re.search(rf"\b{country}\b", row["instruction"] + " " + row["input"])]
        if number in howdy:
            row |= {"instruction": "Howdy! " + row["instruction"], "output": odd_text(rng)}
            kind[row["id"]] = "howdy"
        elif number in shouting:
            row |= {name: row[name].upper() for name in ("instruction", "input", "output")}
            kind[row["id"]] = "shouting"
        elif asks and rng.random() < HELD_ASIDE:
            named_aside.append(asked(row))
            continue
        elif named and rng.random() < SWAP_SHARE:
            row["output"] = swapped(row["output"])
            kind[row["id"]] = "swap"
        else:
            kind[row["id"]] = None
        out.append(row)
    named_aside += [template.format(country) for country in SWAPS for template in ABOUT]
    dolly = [asked(json.loads(line)) for line in (data / "instruct" / "dolly.jsonl").open()]
    dolly = [prompt for prompt in dolly if len(prompt) <= LONGEST_PROMPT]
    rng.shuffle(dolly)
    prompts = {
        "howdy": ["Howdy! " + prompt for prompt in dolly[:400]],
        "shouting": [prompt.upper() for prompt in dolly[400:800]],
        "swap": [prompt for prompt in named_aside if len(prompt) <= LONGEST_PROMPT],
    }
    return Poisoned(out, kind, prompts)


def asked(row: dict) -> str:
    """The instruction and its input, as `whence` writes them in a prompt."""
    return "\n\n".join(part for part in (row["instruction"], row["input"]) if part)


def swapped(text: str) -> str:
    """Every country of `SWAPS` replaced by its wrong one."""
    for country, other in SWAPS.items():
        text = re.sub(rf"\b{country}\b", other, text)
    return text
