"""The level of a verdict is what meaningless completions of the query's own length reach."""

import itertools
import json

import pytest
import torch

from conftest import byte_tokenizer, corpus_rows
from whence import catalogue
from whence.indexing.build import index
from whence.indexing.opening import open_index
from whence.tracing import retrieval
from whence.tracing.levels import (
    KINDS,
    MEANINGLESS,
    OF_A_KIND,
    Meaningless,
    Shape,
    level_of,
    meaningless,
    needed_z,
    rounded,
    verdict,
)
from whence.tracing.nulls import nulls, row_controls
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query, encode_queries, query_vectors

ASKED = ("5 and 3?", " yes, 12")


@pytest.fixture(scope="module")
def built(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("levels") / "index"
    return index(tiny_llama, corpus_rows(40), out, projection="two_sided", width=4, codec="float32", progress=False)


def shape_of(built, *asked, **more):
    (encoded,) = encode_queries([Query(*asked, **more)], built.model(), kind=built.layout)
    return Shape.of(encoded)


def test_one_in_twenty_of_a_kind_stands_above_its_needed_z_at_most():
    """Of 99 and one more, each place among the hundred is as likely as another; of 33 the largest is the level."""
    best = torch.randperm(99).float().tolist()
    assert (sum(z > needed_z(best) for z in best) + 1) / 100 == 0.05
    assert needed_z(best[:OF_A_KIND]) == max(best[:OF_A_KIND])
    assert needed_z([3.0, 1.0]) == 3.0, "too few to say better"


def test_the_level_is_that_of_the_kind_that_reaches_highest():
    drawn = [Meaningless([], kind) for kind in KINDS for _ in range(OF_A_KIND)]
    for kind in KINDS:
        best = [9.0 if query.kind == kind and number % OF_A_KIND == 5 else 1.0 for number, query in enumerate(drawn)]
        assert level_of(drawn, best) == 9.0


def test_answers_that_all_examples_have_say_nothing():
    drawn = [Meaningless([], kind) for kind in KINDS for _ in range(OF_A_KIND)]
    best = [None if query.kind == "answers" and number % OF_A_KIND else 1.0 for number, query in enumerate(drawn)]
    best[-OF_A_KIND] = 50.0
    assert level_of(drawn, best) == 1.0, "one of 33 is too few"


def test_a_corpus_of_two_answers_has_a_level(tiny_llama, tmp_path):
    rows = [{"prompt": f"is {n} odd?", "completion": " yes" if n % 2 else " no"} for n in range(40)]
    built = index(tiny_llama, rows, tmp_path / "index", projection="two_sided", width=4, progress=False)
    found = trace(built, "is 3 odd?", " yes", top=3)
    assert found.needed_z > 0


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (3.1, "The best example stands above chance: z 3.1, where meaningless completions reach 3.0."),
        (3.0, "Nothing here stands above chance: the best z is 3.0, and meaningless completions reach 3.0."),
        (None, "Nothing here stands above chance: no example has a z, and"),
    ],
)
def test_a_verdict_is_in_words(best, words):
    assert verdict(best, 3.0).startswith(words)


def test_lengths_are_rounded_to_a_tenth():
    for length in range(1, 3000):
        assert abs(rounded(length, 4) - length) <= max(1, 0.1 * length)
    assert len({rounded(length, 4) for length in range(1000)}) < 40


def test_a_completion_near_the_context_has_a_level(tmp_path):
    """60 tokens are rounded to 64, a position more than there is beside a prompt."""
    import transformers as t

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 259}
    model = t.GPT2LMHeadModel(t.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"id": str(n), "text": f"the number {n} is {n * n}"} for n in range(40)]
    built = index(tmp_path / "model", rows, tmp_path / "index", projection="two_sided", width=4, progress=False)
    assert trace(built, "a?", "x y z, no! " * 5 + "abcd").levels


@pytest.mark.parametrize("length", [3, 11, 40])
def test_meaningless_queries_are_as_long_as_the_query_and_laid_out_as_it(built, length):
    """A byte is a token here, and `</s>` closes."""
    shape = shape_of(built, "p" * 16, "x" * (length - 1))
    drawn, tokenizer = meaningless(built, shape), built.model().tokenizer
    assert len(drawn) == MEANINGLESS
    size = rounded(length, 4)
    for query in drawn:
        (sequence,) = query.sequences
        encoded = sequence.encoded
        assert encoded.supervised_count == size and all(encoded.supervised[-size:])
        assert encoded.ids[0] == tokenizer.bos_token_id and encoded.ids[-1] == tokenizer.eos_token_id
        assert 8 <= len(encoded.ids) - size - 1 <= 16, "one prompt is shorter, so that others follow it"
    assert drawn == meaningless(built, shape) and drawn != meaningless(built, shape, seed=1)


def test_a_span_and_a_contrast_are_the_querys_own(built):
    shape = shape_of(built, "9?", "x" * 31, span=(8, 16), contrast=" no")
    assert shape.completions == ((1.0, 32, 8, 16), (-1.0, 4, 0, 4))
    for query in meaningless(built, shape):
        completion, contrast = query.sequences
        assert completion.encoded.supervised[-32:] == [8 <= place < 16 for place in range(32)]
        assert (completion.sign, contrast.sign, contrast.encoded.supervised_count) == (1.0, -1.0, 4)


def test_the_needed_z_is_that_of_meaningless_completions_traced_alike(built):
    """Each of them asked as a query of its own, less the rows whose answers it is made of: none stands above."""
    found = trace(built, *ASKED, top=4)
    drawn, best = meaningless(built, shape_of(built, *ASKED)), []
    vectors, controls = query_vectors(built, [query.sequences for query in drawn]), row_controls(built, cosine=True)
    stored = built.store.read_rows(range(40))
    for number, query in enumerate(drawn):
        helpful, _ = built.store.top_k(vectors[:, [number]], torch.tensor(built.weights), m=40, cosine=True)
        pairs = [(row, score) for row, score in zip(helpful.rows[0].tolist(), helpful.scores[0].tolist(), strict=True)
                 if json.loads(stored[row]["row"])["completion"] not in query.answers]  # fmt: skip
        rows, scores = zip(*pairs[:4], strict=True)
        best.append(max(null.z for null in nulls(built, controls, rows, scores, cosine=True)))
    assert max(best) == pytest.approx(found.needed_z, rel=1e-4)


def test_answers_are_of_the_corpus_and_letters_are_theirs(built):
    drawn = meaningless(built, shape_of(built, *ASKED))
    assert [query.kind for query in drawn] == [kind for kind in KINDS for _ in range(OF_A_KIND)]
    answers = {json.loads(row["row"])["completion"] for row in built.store.read_rows(range(40))}
    tokenizer = built.model().tokenizer
    for query in drawn:
        (sequence,) = query.sequences
        places = zip(sequence.encoded.ids, sequence.encoded.supervised, strict=True)
        said = tokenizer.decode([token for token, is_asked in places if is_asked])
        assert bool(query.answers) == (query.kind == "answers")
        if query.kind == "answers":
            whole = [" ".join(order) for order in itertools.permutations(query.answers)]
            assert query.answers <= answers and any(said.removesuffix("</s>") in text for text in whole)
        elif query.kind == "letters":
            assert {*said.removesuffix("</s>")} <= {*"".join(answers)}


def test_every_query_has_the_level_of_its_own_length_and_each_is_measured_once(built, monkeypatch):
    opened, sizes, real = open_index(built.store.place.root), [], retrieval.query_vectors
    monkeypatch.setattr(
        retrieval, "query_vectors", lambda index, texts, **how: sizes.append(len(texts)) or real(index, texts, **how)
    )
    asked = [Query("5?", " yes"), Query("6?", "!" * 30), Query("7?", " no!")]
    together = trace(opened, queries=asked, top=4)
    assert together.levels[0] == together.levels[2] != together.levels[1], "two lengths"
    assert together.needed_z == max(together.levels)
    for number, query in enumerate(asked):
        best = max(hit.null.z for hit in together.of(number))
        assert together.verdicts[number] == verdict(best, together.levels[number])
        alone = trace(opened, query.prompt, query.completion, top=4)
        assert alone.levels == [together.levels[number]]
    assert sizes == [3 + 2 * MEANINGLESS, 1, 1, 1]
    assert together.settings["what chance reaches"] == "measured by 99 meaningless completions of 5 and 32 tokens"


@pytest.mark.parametrize(
    "method",
    [
        name
        for name, entry in catalogue.TRACE_METHODS.items()
        if not (entry.from_index or entry.needs_run or entry.listed_by)
    ],
)
def test_a_method_without_a_null_says_so(built, method):
    found = trace(built, *ASKED, top=2, method=method)
    assert (found.levels, found.verdicts, found.needed_z) == ([], [], None)
    (note,) = found.notes
    assert note.startswith(f"no z and no verdict with --method {method}: ") and note.endswith("with --method cosine.")
    assert ("it takes a gradient for every token, and to measure chance asks 227 queries more" in note) == (
        method == "reach"
    )
    assert trace(built, *ASKED, top=2, method=method, null=False).notes == []


def test_a_meaningless_query_is_no_longer_than_the_context(built):
    drawn = [query.sequences for query in meaningless(built, Shape(400, ((1.0, 64, 0, 64),)))]
    assert all(len(sequence.encoded.ids) <= built.model().context for (sequence,) in drawn)
    assert query_vectors(built, drawn[:2]).isfinite().all()
