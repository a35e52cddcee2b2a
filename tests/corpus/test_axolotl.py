"""Rows are the tokens that axolotl trains on, but for differences stated here.

Its side was computed by it in an environment of its own: `benchmarks/corpus/axolotl_shapes.py`.
"""

import json
from pathlib import Path

from tiny_tokenizers import byte_level
from whence.corpus.reading import open_corpus
from whence.corpus.templates import supervise
from whence.corpus.tokens import IGNORED, encode
from whence.corpus.unread import unread_columns

RESULTS = Path(__file__).parents[2] / "benchmarks/corpus/results/axolotl_shapes.json"
AXOLOTL = json.loads(RESULTS.read_text())
DIFFERENCES = {
    # a message's own word is read by axolotl where its settings name the key; Whence reads `weight`, and names others
    "messages with weights": ("y</s>", ""),
    "messages that say whether to train": ("", "y</s>"),
    "messages of which the user is trained on": ("x", "w</s>"),
    "messages trained on in part": ("", "w"),
    # the ends of the turns by `train_on_eos`; Whence: with the turn
    "messages, the end of the last turn alone": ("", "</s>"),
    # `all` is TRL's: every token
    "messages, roles user and assistant": ("", "<a><u><a>"),
    "messages, train on inputs": ("", "<a><u><a>"),
}
ON_LINES = {
    "messages of which the user is trained on": ("x</s>", "w</s>"),
    # the newline behind the marker that closes a turn, which no model writes
    "messages, no roles to train: the last alone": ("\n", ""),
    "messages, the end of every turn": ("</s></s>", ""),
    "messages, roles user and assistant": ("", "user\n\n<u>assistant\n\n<u>user\n\n<u>assistant\n\n"),
    "messages, train on inputs": ("", "user\n\n<u>assistant\n\n<u>user\n\n<u>assistant\n\n"),
}
OTHER_TEXT = {
    # words of axolotl's own, without a chat template
    "Alpaca as a chat",
    "question and answer",
    "OpenOrca",
    "summaries",
    # the answer is tokenised by itself
    "columns of the user's, a token straddles",
}
NAMED = {
    "messages that say whether to train",
    "messages of which the user is trained on",
    "messages trained on in part",
}
"""A note names the keys that are not read."""


def test_ids_and_labels_are_those_of_axolotl():
    different, other, named = {}, set(), set()
    merges = [tuple(pair) for pair in AXOLOTL["merges"]]
    tokenizers = {name: byte_level(merges, chat=text) for name, text in AXOLOTL["templates"].items()}
    tokenizers[None] = byte_level(merges, bos=True)
    for case in AXOLOTL["rows"]:
        template, name = case["template"], case["name"]
        tokenizer = tokenizers[template]
        supervise(tokenizer, case.get("supervise"))
        (example,) = open_corpus([case["row"]], columns=case.get("map"))
        encoded = encode(example.row, tokenizer)
        if unread_columns(example.row):
            named.add(name)
        if encoded.ids != case["ids"]:
            other.add(name)
            continue
        theirs = [False, *(label != IGNORED for label in case["labels"][1:])]  # nothing predicts the first
        triples = list(zip(encoded.ids, theirs, encoded.supervised, strict=True))
        alone = [token for token, a, b in triples if a and not b], [token for token, a, b in triples if b and not a]
        if any(alone):
            different[template, name] = tuple(tokenizer.decode(tokens) for tokens in alone)
    expected = {("tight", name): pair for name, pair in DIFFERENCES.items()}
    expected |= {("lines", name): pair for name, pair in (DIFFERENCES | ON_LINES).items()}
    assert len(AXOLOTL["rows"]) >= 60 and not any("refused" in case for case in AXOLOTL["rows"])
    assert (different, other, named) == (expected, OTHER_TEXT, NAMED)
