"""The contract of every scorer in the catalogue, and what each of them computes. A new one is tested by its line."""

import importlib
import inspect
import logging
import math
import re
from dataclasses import dataclass, replace

import pytest
import torch

from conftest import ARCHITECTURES, corpus_rows, random_examples, tiny_model
from whence import catalogue
from whence.errors import ModelError, UnknownNameError
from whence.interfaces import QueryText, Scorer, View
from whence.model import load_model
from whence.scorers import embedding
from whence.scorers.embedding import Embedding, embeddings, pooled
from whence.scorers.lexical import BM25
from whence.scorers.uniform import Uniform
from whence.tokens import Encoded, encode, encode_query

NAMES = list(catalogue.SCORERS)
DETERMINED = [name for name in NAMES if name != "random"]
"""Their scores follow from the rows, not from a seed."""


@dataclass
class Rows:
    """A view of rows in memory."""

    listed: list
    loaded: object
    tokens_per_batch: int = 200

    @property
    def rows(self):
        """Their number."""
        return len(self.listed)

    def examples(self):
        """As they are."""
        return iter(self.listed)

    def encoded(self):
        """In the model's tokens."""
        return (encode(row, self.loaded.tokenizer) for row in self.listed)

    def model(self):
        """The model given."""
        return self.loaded


@dataclass
class Tokens(Rows):
    """A view of token ids alone."""

    def encoded(self):
        """As they are."""
        return iter(self.listed)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(tiny_llama, device="cpu")


@pytest.fixture
def view(model):
    return Rows(corpus_rows(30), model)


def query(row, model):
    prompt, completion = row["prompt"], row["completion"]
    return QueryText(prompt, completion, encode_query(prompt, completion, model.tokenizer, kind="prompt"))


def ids_alone(example):
    return QueryText("", "", example)


def text_alone(text):
    return QueryText("", text, Encoded([], []))


def texts(*listed):
    return Rows([{"text": text} for text in listed], None)


@pytest.mark.parametrize("name", NAMES)
def test_catalogue_entry_scores_every_row_for_every_query(name, view, model):
    scorer = catalogue.scorer(name)(seed=3)
    assert isinstance(scorer, Scorer)
    assert isinstance(view, View)
    assert list(inspect.signature(scorer).parameters) == ["view", "queries"]
    scores = scorer(view, [query(view.listed[n], model) for n in (4, 9)])
    assert scores.shape == (2, 30)
    assert scores.dtype == torch.float32
    assert scores.device.type == "cpu"
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_scores_whatever_is_asked_with_it(name, view, model):
    queries = [query(view.listed[n], model) for n in (4, 9, 2)]
    scores = catalogue.scorer(name)(seed=3)(view, queries)
    assert torch.equal(catalogue.scorer(name)(seed=3)(view, queries), scores)
    torch.testing.assert_close(catalogue.scorer(name)(seed=3)(view, queries[:1]), scores[:1])


@pytest.mark.parametrize("name", DETERMINED)
def test_scores_follow_their_rows(name, view, model):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    queries = [query(view.listed[n], model) for n in (4, 9)]
    scores = catalogue.scorer(name)()(view, queries)
    moved = catalogue.scorer(name)()(replace(view, listed=[view.listed[n] for n in order]), queries)
    torch.testing.assert_close(moved, scores[:, order])


@pytest.mark.parametrize("name", DETERMINED)
def test_copy_of_the_query_ranks_first(name, view, model):
    """Shown a planted copy, whose words and tokens are the query's own."""
    planted = {"prompt": "Where does the night heron nest?", "completion": " In old willows by the water."}
    scores = catalogue.scorer(name)()(replace(view, listed=[*view.listed, planted]), [query(planted, model)])
    assert scores.argmax() == 30
    everyone = [query(row, model) for row in view.listed]
    assert catalogue.scorer(name)()(view, everyone).argmax(1).tolist() == list(range(30))


@pytest.mark.parametrize("name", NAMES)
def test_one_row_and_one_query(name, view, model):
    scores = catalogue.scorer(name)()(replace(view, listed=view.listed[:1]), [query(view.listed[0], model)])
    assert scores.shape == (1, 1)
    assert scores.item() > 0


@pytest.mark.parametrize("name", NAMES)
def test_empty_rows_are_scored_below_the_rest_or_not_at_all(name, view, model):
    """A null, an empty text, a text without words: none disturbs the others."""
    empty = [{"prompt": None, "completion": None}, {"prompt": "", "completion": ""}, {"prompt": "?", "completion": "!"}]
    queries = [query(view.listed[4], model)]
    scores = catalogue.scorer(name)()(replace(view, listed=[*view.listed, *empty]), queries)
    assert scores.shape == (1, 33)
    assert not torch.isnan(scores).any()
    if name in DETERMINED:
        assert (scores[0, 30:] < scores[0, 4]).all()


def test_every_scorer_shows_its_source_in_its_file():
    for name, entry in catalogue.SCORERS.items():
        text = importlib.import_module(entry.target.partition(":")[0]).__doc__
        assert "Source:" in text, name
        for paper in re.findall(r"\d[\d.]*[\d/]\d+", entry.source):
            assert paper in text, f"{name}: {entry.source}"


def test_unknown_scorer_is_told_the_names():
    with pytest.raises(UnknownNameError, match=r"--method bm52: no such method. Did you mean bm25\? There are bm25, e"):
        catalogue.scorer("bm52")


def test_bm25_worked_by_hand():
    """Four rows of 3, 2, 1 and 2 words: the mean is 2. `red` is in 3 of them, `fox` in 1, `owl` in 0.

    idf(red) = ln(1 + 1.5 / 3.5), idf(fox) = ln(1 + 3.5 / 1.5); a row of |row| words divides by
    tf + 1.5 (0.25 + 0.75 |row| / 2).
    """
    view = texts("Red red FOX", "red hen", "red", "blue hen")
    red, fox = math.log(1 + 1.5 / 3.5), math.log(1 + 3.5 / 1.5)
    lengths = {words: 1.5 * (0.25 + 0.75 * words / 2) for words in (1, 2, 3)}
    expected = [
        red * 2 / (2 + lengths[3]) + fox * 1 / (1 + lengths[3]),
        red * 1 / (1 + lengths[2]),
        red * 1 / (1 + lengths[1]),
        0.0,
    ]
    scores = BM25()(view, [text_alone("A red fox? An owl!"), text_alone("red red"), text_alone("owl")])
    torch.testing.assert_close(scores[0], torch.tensor(expected))
    once = BM25()(view, [text_alone("red")])[0]
    torch.testing.assert_close(scores[1], 2 * once)
    assert scores[2].tolist() == [0, 0, 0, 0]


def test_bm25_settings_are_those_of_the_formula():
    """With k1 = 0 a word counts once and length does not; with b = 0 length does not."""
    view = texts("red red fox", "red", "hen")
    idf = math.log(1 + 1.5 / 2.5)
    torch.testing.assert_close(BM25(k1=0.0)(view, [text_alone("red")]), torch.tensor([[idf, idf, 0.0]]))
    expected = torch.tensor([[idf * 2 / (2 + 1.2), idf / (1 + 1.2), 0.0]])
    torch.testing.assert_close(BM25(k1=1.2, b=0.0)(view, [text_alone("red")]), expected)


def test_bm25_reads_prompt_and_completion_of_every_layout():
    rows = [
        {"text": "Heron"},
        {"prompt": "heron?", "completion": "x"},
        {"prompt": "x", "completion": "HERON"},
        {"instruction": "heron", "input": None, "output": "x"},
        {"messages": [{"role": "user", "content": "heron"}, {"role": "assistant", "content": "x"}]},
        {"text": "x"},
    ]
    scores = BM25()(Rows(rows, None), [QueryText("The", "heron", Encoded([], []))])
    assert (scores[0] > 0).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("listed", [["", "?!", ""], [""]])
def test_bm25_of_a_corpus_without_words_is_zero(listed):
    assert BM25()(texts(*listed), [text_alone("red fox"), text_alone("")]).tolist() == [[0] * len(listed)] * 2


def test_bm25_of_a_query_without_words_is_zero():
    assert BM25()(texts("red fox", "hen"), [text_alone("?"), text_alone("")]).tolist() == [[0, 0], [0, 0]]


def test_bm25_says_nothing_while_it_works(caplog, capfd):
    with caplog.at_level(logging.NOTSET):
        BM25()(texts("red fox", "hen"), [text_alone("red")])
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embedding_equals_a_loop_over_rows_and_positions(architecture):
    model = tiny_model(architecture)
    rows, asked = random_examples(7, seed=1), random_examples(3, seed=2)

    def vector(example):
        states, _ = model.decode(torch.tensor([example.ids]), torch.ones(1, len(example.ids), dtype=torch.bool))
        total = sum(range(1, len(example.ids) + 1))
        return sum(state * (place / total) for place, state in enumerate(states[0], start=1))

    expected = [[torch.cosine_similarity(vector(q), vector(row), dim=0) for row in rows] for q in asked]
    scores = Embedding()(Tokens(rows, model), [ids_alone(example) for example in asked])
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embedding_does_not_depend_on_batch_mates_and_padding(architecture):
    model, rows = tiny_model(architecture), random_examples(12, seed=1)
    queries = [ids_alone(example) for example in random_examples(3, seed=2)]
    alone, together = (Embedding()(Tokens(rows, model, size), queries) for size in (1, 10_000))
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_embedding_does_not_depend_on_windows(monkeypatch):
    model, rows = tiny_model("llama"), random_examples(11, seed=1)
    rows[4] = Encoded([], [])
    queries = [ids_alone(example) for example in random_examples(2, seed=2)]
    whole = Embedding()(Tokens(rows, model), queries)
    monkeypatch.setattr(embedding, "ROWS_PER_WINDOW", 3)
    torch.testing.assert_close(Embedding()(Tokens(rows, model), queries), whole)


def test_rows_without_an_embedding_score_minus_infinity_and_leave_the_others_alone():
    """A token whose embedding is NaN, one whose embedding is infinite, and a row of no tokens."""
    model, rows = tiny_model("llama"), random_examples(8, seed=1, longest=9)
    rows = [Encoded([1 + i % 50 for i in row.ids], row.supervised) for row in rows]
    queries = [ids_alone(rows[0]), ids_alone(rows[3])]
    expected = Embedding()(Tokens(rows, model), queries)
    weight = model.base.get_input_embeddings().weight
    weight[59], weight[60] = math.nan, math.inf
    broken = [*rows, Encoded([3, 59, 4], [False, True, True]), Encoded([60, 5], [False, True]), Encoded([], [])]
    scores = Embedding()(Tokens(broken, model), queries)
    torch.testing.assert_close(scores[:, :8], expected, rtol=1e-4, atol=1e-5)
    assert scores[:, 8:].tolist() == [[-math.inf] * 3] * 2


@pytest.mark.parametrize(
    "ids, reason", [([], "it has no token"), ([3, 60], "the model's states for it are not finite")]
)
def test_query_without_an_embedding_is_refused(ids, reason):
    model = tiny_model("llama")
    model.base.get_input_embeddings().weight[60] = math.nan
    with pytest.raises(ModelError, match=f"query 'why'.*{reason}"):
        Embedding()(Tokens(random_examples(3, seed=1), model), [QueryText("why", "", Encoded(ids, [False] * len(ids)))])


def test_pooling_ignores_whatever_stands_at_padding():
    states = torch.tensor([[[1.0, 0.0], [4.0, 3.0], [math.nan, math.inf]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(pooled(states, mask), torch.tensor([[3.0, 2.0], [1.0, 1.0]]))


def test_embeddings_are_pooled_in_fp32_and_without_gradients():
    """A sum of bfloat16 ones stops at 256; the weighted mean of 1000 equal states is that state."""
    states = torch.full((1, 1000, 4), 1.5, dtype=torch.bfloat16)
    found = pooled(states, torch.ones(1, 1000, dtype=torch.bool))
    torch.testing.assert_close(found, torch.full((1, 4), 1.5))
    model = tiny_model("llama")
    model.model.to(torch.bfloat16).requires_grad_(True)
    ((numbers, vectors),) = embeddings(model, random_examples(2, seed=0), 1000)
    assert sorted(numbers) == [0, 1]
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad


def test_uniform_scores_differ_by_seed_query_and_row_and_are_uniform(view):
    queries = [text_alone("red"), text_alone("red")]
    scores = Uniform(seed=0)(view, queries)
    assert len(scores.unique()) == scores.numel()
    for other in (1, 1 << 32):
        assert not torch.equal(Uniform(seed=other)(view, queries), scores)
    many = Uniform()(texts(*["x"] * 20_000), queries[:1])
    assert many.min() >= 0
    assert many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)
