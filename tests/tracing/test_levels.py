"""The level of a verdict is what meaningless completions of the query's own length reach."""

import pytest
import torch

from conftest import byte_tokenizer, corpus_rows
from whence import catalogue
from whence.indexing.build import index
from whence.indexing.opening import open_index
from whence.tracing import retrieval
from whence.tracing.levels import MEANINGLESS, Shape, meaningless, needed_z, rounded, verdict
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


def test_one_in_twenty_meaningless_queries_stands_above_the_needed_z():
    """Of 99 and one more, each place among the hundred is as likely as another."""
    best = torch.randperm(MEANINGLESS).float().tolist()
    needed = needed_z(best)
    assert (sum(z > needed for z in best) + 1) / (MEANINGLESS + 1) == 0.05
    assert needed_z([3.0, 1.0]) == 3.0, "too few to say better"


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
    for (sequence,) in drawn:
        encoded = sequence.encoded
        assert encoded.supervised_count == size and all(encoded.supervised[-size:])
        assert encoded.ids[0] == tokenizer.bos_token_id and encoded.ids[-1] == tokenizer.eos_token_id
        assert 8 <= len(encoded.ids) - size - 1 <= 16, "one prompt is shorter, so that others follow it"
    assert drawn == meaningless(built, shape) and drawn != meaningless(built, shape, seed=1)


def test_a_span_and_a_contrast_are_the_querys_own(built):
    shape = shape_of(built, "9?", "x" * 31, span=(8, 16), contrast=" no")
    assert shape.completions == ((1.0, 32, 8, 16), (-1.0, 4, 0, 4))
    for completion, contrast in meaningless(built, shape):
        assert completion.encoded.supervised[-32:] == [8 <= place < 16 for place in range(32)]
        assert (completion.sign, contrast.sign, contrast.encoded.supervised_count) == (1.0, -1.0, 4)


def test_the_needed_z_is_that_of_meaningless_completions_traced_alike(built):
    """Each of them asked as a query of its own: four of 99 stand above the level, by its definition."""
    found = trace(built, *ASKED, top=4)
    drawn, best = meaningless(built, shape_of(built, *ASKED)), []
    vectors, controls = query_vectors(built, drawn), row_controls(built, cosine=True)
    for number in range(len(drawn)):
        helpful, _ = built.store.top_k(vectors[:, [number]], torch.tensor(built.weights), m=4, cosine=True)
        rows, scores = helpful.rows[0].tolist(), helpful.scores[0].tolist()
        best.append(max(null.z for null in nulls(built, controls, rows, scores, cosine=True)))
    assert sum(z > found.needed_z + 1e-4 for z in best) == 4


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
    "method", [name for name, entry in catalogue.TRACE_METHODS.items() if not (entry.from_index or entry.needs_run)]
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
    drawn = meaningless(built, Shape(400, ((1.0, 64, 0, 64),)))
    assert all(len(sequence.encoded.ids) <= built.model().context for (sequence,) in drawn)
    assert query_vectors(built, drawn[:2]).isfinite().all()
