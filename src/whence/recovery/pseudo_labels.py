"""Pseudo-labels: the model in question labels rows that have no label, where it was trained to classify.

A row's text x is put into a template, and theta_f scores each choice y as its continuation:

    p(y | x) = softmax over the choices of sum over y's tokens of ln p(token | template(x), tokens before)

`hard` takes the most likely choice, as SELECT does. `sampled` draws one by p, whose gradient is on average that of the
soft labels, sum over y of p(y | x) gradient(y). (At theta_f itself that sum is 0 by definition when only the choices
count; at theta_0 it is not.)

Labelled rows are written in parts, so that a labelling that was stopped goes on; together they are a corpus.

Source: SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553, whose code labels by the argmax of one token.
"""

import json
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from whence.corpus.layouts import Row, row_text
from whence.corpus.reading import Corpus, Example, open_corpus
from whence.corpus.tokens import encode
from whence.errors import CorpusError
from whence.gradients.forward_passes import losses
from whence.models.loading import LoadedModel, directory_digest
from whence.numerics import generator
from whence.recovery.evidence import ROWS_PER_PART, claim, parts_of
from whence.recovery.settings import Labels
from whence.runner import Tick
from whence.storage import Place

PROBABILITY = "whence_label_p"
"""Column of a label's probability."""


def label_corpus(
    model: LoadedModel,
    corpus: Corpus,
    labels: Labels,
    place: Place,
    *,
    digest: str,
    max_tokens: int | None = None,
    tokens_per_batch: int = 4096,
    seed: int = 0,
    tick: Tick = lambda examples, tokens: None,
) -> Corpus:
    """Make a corpus of `prompt` and `completion` from any corpus, or go on doing so.

    Args:
        model: theta_f, which labels.
        corpus: Rows of any layout; an answer in a row counts as part of its text.
        labels: Template and choices.
        place: Directory of the parts.
        digest: Digest of the corpus; parts of another are refused.
        max_tokens: Longest row with its label; a longer one loses the left of its prompt.
        tokens_per_batch: Tokens of a forward pass.
        seed: Seed of `sampled`.
        tick: Called with the rows and tokens that are done.

    Raises:
        CorpusError: No row has text.
        ManifestMismatchError: `place` holds labels of another model, corpus or kind.
        ChecksumError: A file of `place` is damaged.
    """
    provenance = {"corpus": digest, "model": directory_digest(model.path), "max_tokens": max_tokens, "seed": seed}
    claim(place, provenance | {"choices": list(labels.choices), "template": labels.template, "how": labels.how})
    rng, stored_bytes = generator(seed, "labels"), 0
    for number, part in enumerate(parts_of(corpus)):
        name = f"rows/part-{number:05d}.jsonl"
        uniform = torch.rand(ROWS_PER_PART, generator=rng, dtype=torch.float64)[: len(part)]
        if place.exists(name):
            place.check_recorded(name)
        else:
            rows = _labelled(model, part, labels, uniform, max_tokens, tokens_per_batch)
            data = "".join(json.dumps(row, default=str) + "\n" for row in rows).encode()
            place.write_recorded(name, data)
        stored_bytes += place.size(name)
        tick(len(part), 0)
    if not stored_bytes:
        raise CorpusError(f"{corpus.name}: no row has text to label")
    return open_corpus(f"{place.root}/rows")


def choice_probabilities(
    model: LoadedModel,
    rows: Sequence[Row],
    labels: Labels,
    *,
    max_tokens: int | None = None,
    tokens_per_batch: int = 4096,
) -> Float64[Tensor, "n c"]:
    """p(choice | row) of each row and choice; rows sum to 1, NaN where the model gives a row no finite loss."""
    longest = min((limit for limit in (max_tokens, model.context) if limit), default=None)
    encoded = [encode({"prompt": labels.prompt(row), "completion": labels.completion(choice)}, model.tokenizer, longest)
               for row in rows for choice in labels.choices]  # fmt: skip
    sums = torch.full((len(encoded),), torch.nan, dtype=torch.float64)
    for numbers, batch_losses in losses(model, encoded, tokens_per_batch):
        counts = torch.tensor([encoded[number].supervised_count for number in numbers], dtype=torch.float64)
        sums[numbers] = -batch_losses.double() * counts
    return sums.reshape(len(rows), len(labels.choices)).softmax(1)


def _labelled(
    model: LoadedModel,
    part: Sequence[Example],
    labels: Labels,
    uniform: Float64[Tensor, " n"],
    max_tokens: int | None,
    tokens_per_batch: int,
) -> Iterator[Row]:
    """The rows of a part that have text, labelled."""
    with_text = [number for number, example in enumerate(part) if row_text(example.row).strip()]
    rows = [part[number].row for number in with_text]
    p = choice_probabilities(model, rows, labels, max_tokens=max_tokens, tokens_per_batch=tokens_per_batch)
    drawn = (p.cumsum(1) < uniform[with_text, None]).sum(1).clamp(max=p.shape[1] - 1)
    chosen = p.argmax(1) if labels.how == "hard" else drawn
    for number, row, probabilities, label in zip(with_text, rows, p.tolist(), chosen.tolist(), strict=True):
        choice = labels.choices[label]
        source = {"source": row["source"]} if row.get("source") is not None else {}
        yield {
            "id": part[number].id,
            **source,
            "prompt": labels.prompt(row),
            "completion": labels.completion(choice),
            "label": choice,
            PROBABILITY: probabilities[label],
        }
