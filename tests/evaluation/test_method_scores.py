"""Scores of methods side by side: aligned by id, equal to their sources, refused where they cannot be."""

import pytest
import torch
from graded_bank import QUERIES, ROWS, make_bank

from whence import catalogue
from whence.errors import SettingError, UnknownNameError
from whence.evaluation.method_scores import MethodName, MethodScores, score_methods, with_costs
from whence.indexing.opening import open_index
from whence.selection.pipeline import build_scorer, open_view
from whence.selection.views import IndexView
from whence.tracing.baselines import all_scores
from whence.tracing.queries import Query, encode_queries

IDS = [row["id"] for row in ROWS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="module")
def view(made):
    return IndexView(open_index(made[1]))


def test_scores_are_aligned_with_the_rows_by_id(view):
    whole = score_methods(["bm25"], QUERIES, view)[0].scores
    some = score_methods(["bm25"], QUERIES, view, IDS)[0].scores
    assert whole.shape == (3, 19) and some.shape == (3, 18)
    assert torch.equal(some, whole[:, 1:].flip(1))  # the index has them in the other order, and one more
    for query, scores in enumerate(some):
        assert IDS[int(scores.argmax())].startswith("abc"[query])


def test_exact_scores_equal_those_of_traces(view):
    queries = [Query(row["prompt"], row["completion"]) for row in QUERIES]
    encoded = encode_queries(queries, view.model(), kind=view.index.layout)
    for ours, theirs in (("exact-dot", "tracin"), ("exact-cosine", "tracin_cosine")):
        expected = all_scores(view.index, encoded, method=theirs, objective="loss", seed=0)
        torch.testing.assert_close(score_methods([ours], QUERIES, view)[0].scores, expected, rtol=1e-4, atol=1e-6)


def test_the_names_of_traces_are_scorers_and_an_identity_index_is_exact(view):
    scored = {method.name: method.scores
              for method in score_methods(["cosine", "less", "dot", "influence", "exact-cosine", "exact-dot"],
                                          QUERIES, view, IDS)}  # fmt: skip
    assert torch.equal(scored["cosine"], scored["less"]) and torch.equal(scored["dot"], scored["influence"])
    torch.testing.assert_close(scored["cosine"], scored["exact-cosine"], rtol=0.05, atol=0.02)  # bfloat16
    assert torch.corrcoef(torch.stack([scored["dot"].flatten(), scored["exact-dot"].flatten()]))[0, 1] > 0.999


def test_exact_scores_of_a_corpus_are_those_of_its_index(made, view):
    of_rows = open_view(ROWS, "loss", model=made[2])
    for name in ("exact-dot", "exact-cosine", "loss", "bm25"):
        one, other = (score_methods([name], QUERIES, *each)[0].scores for each in ((of_rows, None), (view, IDS)))
        assert one.shape == (3, 18)
        if name != "bm25":  # whose weights of words depend on the other rows
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_target_of_several_queries_has_their_mean_gradient(view):
    from whence.evaluation.exact_scores import ExactDot
    from whence.selection.pipeline import targets_of

    together, apart = (ExactDot()(view, targets_of(QUERIES, view, by=by)[0]) for by in ("task", "example"))
    torch.testing.assert_close(together[0], apart.mean(0), rtol=1e-4, atol=1e-6)


def test_options_and_named_indexes(made, view):
    other = IndexView(open_index(made[1]))
    scored = score_methods(["less:within=mean_cosine", "less@again", "random"], QUERIES, view, IDS,
                           indexes={"again": other}, seed=3, index_seconds=100.0)  # fmt: skip
    expected = build_scorer("random", 3, {})
    assert [method.name for method in scored] == ["less:within=mean_cosine", "less@again", "random"]
    assert torch.equal(scored[0].scores, scored[1].scores)  # one query a target: both means are of one
    assert [method.seconds > 100 for method in scored] == [True, True, False]
    assert expected.seed == 3 and len(scored[2].scores.unique()) == 54
    with pytest.raises(SettingError, match="no --index has the name adam; named are again"):
        score_methods(["less@adam"], QUERIES, view, indexes={"again": other})


def test_costs_of_others_replace_what_was_measured():
    scored = [MethodScores("a", torch.zeros(1, 1), 2.0), MethodScores("b", torch.zeros(1, 1))]
    assert [method.seconds for method in with_costs(scored, {"b": 7.0})] == [2.0, 7.0]
    with pytest.raises(SettingError, match="--cost c: of no method that is graded; these are a, b"):
        with_costs(scored, {"c": 1.0})


def test_what_cannot_be_scored_is_refused(made, view):
    with pytest.raises(UnknownNameError, match=r"no such method\. Did you mean cosine"):
        MethodName.of("cosin")
    with pytest.raises(SettingError, match="x is no option"):
        MethodName.of("less:x")
    with pytest.raises(SettingError, match="exact-dot has no options"):
        score_methods(["exact-dot:a=b"], QUERIES, view)
    with pytest.raises(SettingError, match="it lacks 1 row of 19, such as zz: give an index of the same corpus"):
        score_methods(["bm25"], QUERIES, view, [*IDS, "zz"])
    with pytest.raises(SettingError, match="add --index INDEX"):
        score_methods(["cosine"], QUERIES, open_view(ROWS, "loss", model=made[2]))
    with pytest.raises(SettingError, match="without a supervised token: 1 of 4"):
        score_methods(["cosine"], [*QUERIES, {"messages": [{"role": "user", "content": "?"}], "id": "e"}], view)


def test_graded_methods_load():
    assert {*catalogue.SCORERS} < {*catalogue.GRADED}
    for entry in catalogue.GRADED.values():
        assert callable(entry.load())
