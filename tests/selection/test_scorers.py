"""The contract of every scorer that reads a corpus. A new one is tested by its line in the catalogue.

Those that read an index' vectors are tested with them.
"""

import importlib
import inspect
import math
import re
from dataclasses import replace

import pytest
import torch
from small_views import Rows, asking, each, query, text_alone, texts
from tiny_judges import save_tiny_judge

from conftest import corpus_rows, save_tiny_llama
from whence import catalogue
from whence.corpus.tokens import encode_query
from whence.errors import SettingError, UnknownNameError
from whence.models.loading import load_model
from whence.selection.protocols import QueryText, Scorer, Target, View
from whence.selection.scorers.uniform import Uniform

NAMES = [name for name, entry in catalogue.SCORERS.items() if not (entry.needs_index or entry.needs_run)]
DETERMINED = [name for name in NAMES if name not in ("random", "density")]
"""Their scores follow from the rows, not from a seed."""
COMPARING = [name for name in NAMES if catalogue.SCORERS[name].reads_tasks]
"""Their scores are for a target; the others' are the same for any, but for random ones."""
BY_QUERY = ["bm25", "rds", "rds+"]
"""They compare rows with a query at a time."""

STRANGE = [
    {"prompt": "日本語の文章は単語の間に空白がない。", "completion": "はい、そうです。"},
    {"prompt": "Où niche le héron ? 🦉🦉", "completion": "Dans les saules."},
    {"prompt": "يقف مالك الحزين في الماء", "completion": " نعم"},
    {"prompt": "a\ud800b", "completion": "\udfff"},
    {"prompt": "", "completion": "x"},
    {"prompt": "x", "completion": ""},
    {"prompt": "\u0000\u200b", "completion": "\u00a0"},
]
"""Rows of other scripts, of one token, with halves of surrogate pairs."""


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(tiny_llama, device="cpu")


@pytest.fixture
def view(model):
    return Rows(corpus_rows(30), model)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a scorer by its name, with what it needs to work on thirty short rows."""
    folder = tmp_path_factory.mktemp("scorers")
    settings = {
        "dsir": {"least_words": 1},
        "density": {"functions": 200, "buckets": 1000},
        "loss_drop": {"base": save_tiny_llama(folder / "base", seed=5)},
        "ask_llm": {"model": save_tiny_judge(folder / "judge"), "question": "{text}? yes or no:"},
    }
    return lambda name, seed=0: catalogue.scorer(name)(seed=seed, **settings.get(name, {}))


@pytest.mark.parametrize("name", catalogue.SCORERS)
def test_catalogue_entry_is_a_scorer(name):
    scorer = catalogue.scorer(name)(seed=3)
    assert isinstance(scorer, Scorer)
    assert list(inspect.signature(scorer).parameters) == ["view", "targets"]
    entry = catalogue.scorer_entry(name)
    assert entry.selector in catalogue.SELECTORS
    assert entry.by in ("task", "example")


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_a_score_for_every_target(name, made, view, model):
    assert isinstance(view, View)
    targets = [Target("both", [query(view.listed[n], model) for n in (4, 9)]), *each([query(view.listed[2], model)])]
    scores = made(name, seed=3)(view, targets)
    assert scores.shape == (2, 30)
    assert scores.dtype == torch.float32
    assert scores.device.type == "cpu"
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("name", NAMES)
def test_scorer_says_whether_it_needs_a_model(name, made, view):
    """One that does not never asks the view for one, nor for tokens."""

    class Modelless(Rows):
        def model(self):
            raise LookupError("no model")

    asked = asking("41 and 5?")
    if catalogue.SCORERS[name].needs_model:
        with pytest.raises(LookupError, match="no model"):
            catalogue.scorer(name)()(Modelless(view.listed, None), asked)
    else:
        made(name)(Modelless(view.listed, None), asked)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_scores_whatever_is_asked_with_it(name, made, view, model):
    targets = each([query(view.listed[n], model) for n in (4, 9, 2)])
    scores = made(name, seed=3)(view, targets)
    assert torch.equal(made(name, seed=3)(view, targets), scores)
    torch.testing.assert_close(made(name, seed=3)(view, targets[:1]), scores[:1])


@pytest.mark.parametrize("name", [*DETERMINED, "density"])
def test_scores_follow_their_rows(name, made, view, model):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    targets = each([query(view.listed[n], model) for n in (4, 9)])
    scores = made(name)(view, targets)
    moved = made(name)(replace(view, listed=[view.listed[n] for n in order]), targets)
    # an embedding that moves by rounding may change its bucket under a hash function or two
    close = {"rtol": 0.02, "atol": 0.02} if name == "density" else {}
    torch.testing.assert_close(moved, scores[:, order], **close)


@pytest.mark.parametrize("name", [name for name in COMPARING if name != "ekfac"])  # it has the length of gradients
def test_copy_of_the_target_ranks_first(name, made, view, model):
    """Shown a planted copy, whose words and tokens are the target's own."""
    planted = {"prompt": "Where does the night heron nest?", "completion": " In old willows by the water."}
    scores = made(name)(replace(view, listed=[*view.listed, planted]), each([query(planted, model)]))
    assert scores.argmax() == 30
    everyone = each([query(row, model) for row in view.listed])
    assert made(name)(view, everyone).argmax(1).tolist() == list(range(30))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COMPARING and name != "random"])
def test_scores_without_a_comparison_are_the_same_for_any_target(name, made, view, model):
    targets = [Target("none of it", [text_alone("")]), *each([query(view.listed[n], model) for n in (4, 9)])]
    scores = made(name)(view, targets)
    assert torch.equal(scores, scores[:1].expand(3, -1))


@pytest.mark.parametrize("name", BY_QUERY)
def test_score_for_a_target_is_the_mean_over_its_queries(name, made, view, model):
    queries = [query(view.listed[n], model) for n in (4, 9, 2)]
    alone = made(name)(view, each(queries))
    together = made(name)(view, [Target("all", queries), Target("two", queries[1:])])
    torch.testing.assert_close(together, torch.stack([alone.mean(0), alone[1:].mean(0)]))


@pytest.mark.parametrize("name", NAMES)
def test_one_row_and_one_query(name, made, view, model):
    scores = made(name)(replace(view, listed=view.listed[:1]), each([query(view.listed[0], model)]))
    assert scores.shape == (1, 1)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("name", NAMES)
def test_empty_rows_are_scored_below_the_rest_or_not_at_all(name, made, view, model):
    """A null, an empty text, a text without words: none disturbs the others."""
    empty = [{"prompt": None, "completion": None}, {"prompt": "", "completion": ""}, {"prompt": "?", "completion": "!"}]
    targets = each([query(view.listed[4], model)])
    scores = made(name)(replace(view, listed=[*view.listed, *empty]), targets)
    assert scores.shape == (1, 33)
    assert not torch.isnan(scores).any()
    assert (scores < math.inf).all()
    if catalogue.SCORERS[name].needs_model or name == "dsir":
        assert scores[0, 30] == -math.inf
        assert torch.isfinite(scores[0, :30]).all()
    if name in COMPARING:
        assert (scores[0, 30:] < scores[0, 4]).all()
    if name in DETERMINED and name not in ("bm25", "dsir", "ekfac"):  # those count over all rows
        torch.testing.assert_close(scores[:, :30], made(name)(view, targets))


@pytest.mark.parametrize("name", NAMES)
def test_any_script_has_scores_and_may_be_asked_for(name, made, view, model):
    listed = [*view.listed, *STRANGE]
    scores = made(name)(replace(view, listed=listed), [Target("all", [query(row, model) for row in STRANGE])])
    assert scores.shape == (1, 37)
    assert not torch.isnan(scores).any()
    assert (scores < math.inf).all()
    assert torch.isfinite(scores[0, :33]).all()


@pytest.mark.parametrize("name", DETERMINED)
def test_duplicated_rows_have_equal_scores(name, made, view, model):
    targets = each([query(view.listed[n], model) for n in (4, 9)])
    scores = made(name)(replace(view, listed=[*view.listed, view.listed[4], view.listed[7]]), targets)
    torch.testing.assert_close(scores[:, 30:], scores[:, [4, 7]])


def test_target_without_a_query_is_refused():
    with pytest.raises(SettingError, match="target 'bbh/sorting' has no query"):
        Target("bbh/sorting", [])


def test_every_scorer_shows_its_source_in_its_file():
    for name, entry in catalogue.SCORERS.items():
        text = importlib.import_module(entry.implementation.partition(":")[0]).__doc__
        assert "ource:" in text or "https://" in text, name
        for paper in re.findall(r"\d[\d.]*[\d/]\d+|P\d\d-\d+", entry.source):
            assert paper in text, f"{name}: {entry.source}"


def test_unknown_scorer_is_told_the_names():
    with pytest.raises(UnknownNameError, match=r"--method bm52: no such method. Did you mean bm25\? There are less, i"):
        catalogue.scorer("bm52")


def test_queries_in_another_language_than_the_pool_are_answered(made, view, model):
    """Nothing is shared with them but single bytes; every row stays rankable."""
    told = "鷺はどこに巣を作りますか"
    targets = [Target("鷺", [QueryText(told, "柳", encode_query(told, "柳", model.tokenizer, kind="prompt"))])]
    for name in COMPARING:
        assert torch.isfinite(made(name)(view, targets)).all(), name


def test_uniform_scores_differ_by_seed_target_and_row_and_are_uniform(view):
    targets = asking("red", "red")
    scores = Uniform(seed=0)(view, targets)
    assert len(scores.unique()) == scores.numel()
    for other in (1, 1 << 32):
        assert not torch.equal(Uniform(seed=other)(view, targets), scores)
    many = Uniform()(texts(*["x"] * 20_000), targets[:1])
    assert many.min() >= 0
    assert many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)
