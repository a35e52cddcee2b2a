"""A bank whose truth is known: an index of the tiny Llama, and losses that follow its exact scores."""

import torch

from conftest import save_tiny_llama
from whence.evaluation.bank_store import (
    BankRow,
    Description,
    Member,
    Protocol,
    write_description,
    write_member,
    write_queries,
    write_rows,
)
from whence.evaluation.method_scores import score_methods
from whence.indexing.build import index as build_index
from whence.indexing.opening import open_index
from whence.models.loading import directory_digest
from whence.numerics import generator
from whence.selection.views import IndexView
from whence.storage import Place

ROWS = [{"id": f"{s}{n}", "source": s, "prompt": f"{s} {n % 4}?", "completion": f" {s * 2} {n * 7 % 11}"}
        for s in "abc" for n in range(6)]  # fmt: skip
QUERIES = [{"id": f"q{s}", "prompt": f"{s} {n}?", "completion": f" {s * 2} {n}"} for n, s in enumerate("abc")]


def make_bank(folder, members=12):
    """An index and a bank of its rows; members' losses are those that exact inner products predict.

    The index holds the bank's rows in another order, and one more.
    """
    model = str(save_tiny_llama(folder / "model"))
    more = {"id": "more", "source": "d", "prompt": "d?", "completion": " dd"}
    index = folder / "index"
    build_index(model, [more, *reversed(ROWS)], index, max_tokens=32, projection="identity", progress=False)
    view = IndexView(open_index(index))
    ids = [row["id"] for row in ROWS]
    scores = score_methods(["exact-dot"], QUERIES, view, ids)[0].scores.double()
    included = torch.stack([torch.randperm(18, generator=generator(n, "bank")) < 9 for n in range(members)])
    losses = 3 - included.double() @ (scores / scores.std()).T * 0.1
    write_bank(folder / "bank", model, included, losses)
    return str(folder / "bank"), str(index), model


def write_bank(path, model, included, losses, *, queries=QUERIES, max_tokens=32):
    """Write a bank of `ROWS`; a query whose losses are NaN has none before training and after it either."""
    place = Place.at(path)
    rows = [BankRow(row["id"], row["source"], 9, 4, row) for row in ROWS]
    protocol = Protocol(leave_out="zero", run=model, run_weights=directory_digest(model), model=model,
                        model_weights="1" * 64, corpus="rows.jsonl", rows_digest="2" * 64,
                        training={"max_tokens": max_tokens, "lr": 1e-3}, keep_weights=False)  # fmt: skip
    files = write_rows(place, rows), write_queries(place, 0, queries)
    write_description(place, Description(protocol=protocol, rows=files[0], queries=(files[1],)))
    known = losses.isfinite().all(0)
    for name, kind, seconds, value in (("parent", "parent", 0.0, 4.0), ("full", "full", 2.0, 1.0)):
        values = torch.where(known, value, torch.nan).tolist()
        write_member(place, Member(name=name, kind=kind, seed=0, losses=tuple(values), steps=3, seconds=seconds))
    for number, (line, values) in enumerate(zip(included, losses, strict=True)):
        left_out = tuple((~line).nonzero()[:, 0].tolist())
        write_member(place, Member(name=f"random-{number:04d}", kind="random", left_out=left_out, seed=0,
                                   losses=tuple(values.tolist()), steps=3, seconds=1.0))  # fmt: skip
