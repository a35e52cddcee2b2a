"""Pieces that stand word for word in the corpus, against a search that looks at every piece; and what they cost.

    python -m benchmarks.explorer.verbatim [--data DIR] [--model MODEL] [--completions 1000]

The corpus is the first ROWS rows of alpaca. Half of the completions are the model's own for the instructions of LATER
rows after these, half are those rows' answers. Written to benchmarks/explorer/results/verbatim.json:

    unequal     completions whose pieces, places, counts or rows differ from those of the naive search: 0 is right
    seconds     to sort the suffixes of MANY rows; then the median and the longest of an answer's pieces among them
    bytes       of the array and the text, by byte of text
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from benchmarks.indexing.speed import machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from whence.explorer.verbatim import LEAST, MOST_ROWS, Piece, VerbatimIndex

RESULTS = Path(__file__).parent / "results" / "verbatim.json"
ROWS = 2_000
"""The naive search reads all of them for each place of each completion."""
MANY = 14_000
NEW_TOKENS = 48


def main() -> None:
    """Compare, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--completions", type=int, default=1000)
    options = parser.parse_args()
    lines = (options.data / "instruct" / "alpaca.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = ["\n".join(map(str, row.values())) for row in rows]
    later = rows[MANY : MANY + options.completions]
    completions = written(options.model, [row["instruction"] for row in later[: len(later) // 2]])
    completions += [row["output"] for row in later[len(later) // 2 :]]
    index, unequal, pieces = VerbatimIndex(texts[:ROWS]), 0, 0
    for text in completions:
        found = index.pieces(text)
        pieces += len(found)
        unequal += found != naive(texts[:ROWS], text)
    result = {
        "date": time.strftime("%Y-%m-%d"), "machine": machine(), "rows": ROWS, "completions": len(completions),
        "characters": sum(map(len, completions)), "pieces": pieces, "unequal": unequal,
        "cost": cost(texts[:MANY], completions),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def cost(texts: list[str], completions: list[str]) -> dict[str, float]:
    """What the index takes."""
    start = time.perf_counter()
    index = VerbatimIndex(texts)
    sorting, seconds = time.perf_counter() - start, []
    for text in completions:
        start = time.perf_counter()
        index.pieces(text)
        seconds.append(time.perf_counter() - start)
    size = sum(len(text.encode()) for text in texts)
    return {
        "rows": len(texts), "bytes of text": size, "bytes by byte of text": round(index.bytes / size, 2),
        "seconds to sort": round(sorting, 2), "seconds an answer, median": round(statistics.median(seconds), 4),
        "seconds an answer, most": round(max(seconds), 3),
    }  # fmt: skip


def written(model: str, prompts: list[str]) -> list[str]:
    """What the model says, drawn with a temperature of .7."""
    torch.manual_seed(0)
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    out = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, -128:]
        made = loaded.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7,
                               pad_token_id=tokenizer.eos_token_id)  # fmt: skip
        out.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return out


def naive(texts: list[str], text: str) -> list[Piece]:
    """The longest pieces that occur in some row, by looking at each in each."""
    joined = "\0".join(texts)  # the texts hold none
    out, reached = [], 0
    for start in range(len(text)):
        if start + LEAST <= len(text) and text[start : start + LEAST] not in joined:
            continue  # no piece that counts begins here, and what is shorter reaches no further than a later one
        end = start
        while end < len(text) and text[start : end + 1] in joined:
            end += 1
        if end > reached:
            if end - start >= LEAST:
                piece = text[start:end]
                holding = [number for number, other in enumerate(texts) if piece in other]
                out.append(Piece(start, end, occurrences(joined, piece), holding[:MOST_ROWS]))
            reached = end
    return out


def occurrences(text: str, piece: str) -> int:
    """Times that a piece occurs in a text; those that overlap count each."""
    count, place = 0, text.find(piece)
    while place >= 0:
        count, place = count + 1, text.find(piece, place + 1)
    return count


if __name__ == "__main__":
    main()
