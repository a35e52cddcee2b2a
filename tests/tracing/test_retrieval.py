"""From an index' vectors to what is shown: exact scores, tokens, contrasts, and every method's ranking."""

import math
from dataclasses import dataclass

import pytest
import torch

from conftest import corpus_rows
from whence.catalogue import TRACE_METHODS
from whence.corpus.tokens import encode_query
from whence.errors import SettingError
from whence.indexing.build import index
from whence.indexing.opening import Index
from whence.selection.protocols import QueryText, Target
from whence.selection.scorers.influence import DataInf
from whence.selection.scorers.second_moment import TRAK
from whence.selection.views import IndexView
from whence.tracing import nulls
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query

PROMPT, COMPLETION = "5 and 3?", " yes, 12"
QUERIES = [
    Query(PROMPT, COMPLETION),
    Query(PROMPT, COMPLETION, "yes"),
    Query("9?", " no, 3", (1, 4), " yes"),
]
COARSE = {"projection": "two_sided", "width": 3}


@pytest.fixture(scope="module")
def made(tiny_run, tmp_path_factory):
    """Indexes of two checkpoints, each made once."""
    kept = {}

    def build(rows=8, checkpoints="all", **options):
        key = (rows, checkpoints, *sorted(options.items()))
        if key not in kept:
            out = tmp_path_factory.mktemp("made") / "index"
            chosen = {"codec": "float32", "checkpoints": checkpoints, "progress": False}
            kept[key] = index(tiny_run, corpus_rows(rows), out, **chosen, **options)
        return kept[key]

    return build


@pytest.fixture(scope="module")
def exact(made):
    """An index of whole gradients, nothing rounded."""
    return made(20, checkpoints="last", projection="identity")


def scores_of(hits):
    return {hit.id: hit.score for hit in hits}


def near(expected):
    """Equal but for rounding, by the largest."""
    values = expected.values() if isinstance(expected, dict) else expected
    return pytest.approx(expected, rel=1e-3, abs=1e-4 * max(map(abs, values)))


@pytest.mark.parametrize(
    ("checkpoints", "normalise", "objective", "method"),
    [
        ("last", "none", "loss", "cosine"),
        ("last", "layer", "margin", "dot"),
        ("all", "none", "margin", "dot"),
        ("all", "layer", "loss", "cosine"),
    ],
)
def test_tokens_add_up_to_the_score_and_the_matrix_to_the_exact_one(made, checkpoints, normalise, objective, method):
    built = made(checkpoints=checkpoints, **COARSE, normalise=normalise)
    basis, queries = "position" if objective == "margin" else "loss", QUERIES[::2]
    found = trace(built, queries=queries, method=method, tokens=True, objective=objective, basis=basis, top=1)
    exact_scores = trace(built, queries=queries, method=method, exact=True, objective=objective)
    for hit in found.hits:
        asked, size = found.answers[hit.query].query_tokens(), hit.tokens.matrix.abs().sum()
        own = {each.id: each.exact for each in exact_scores.of(hit.query)}
        assert sum(hit.by_token) == pytest.approx(hit.score, rel=1e-3, abs=1e-4 * sum(map(abs, hit.by_token)))
        assert float(hit.tokens.matrix.sum()) == pytest.approx(own[hit.id], rel=1e-3, abs=1e-4 * float(size))
        assert hit.exact == pytest.approx(own[hit.id], rel=1e-3, abs=1e-4 * float(size))
        assert (hit.tokens.basis, hit.tokens.query) == (basis, asked)
        assert hit.tokens.matrix.shape == (len(asked), len(hit.tokens.train))
        assert len(hit.by_token) == len(asked)


@pytest.mark.parametrize(("closer", "stages"), [({"exact": False}, 1), ({}, 2), ({"exact": True, "tokens": True}, 3)])
def test_each_checkpoint_is_loaded_once_a_stage_however_many_queries(made, monkeypatch, closer, stages):
    loads, real, path = [], Index._checked_model, made(**COARSE).store.place.root
    monkeypatch.setattr(Index, "_checked_model", lambda self, number: loads.append(number) or real(self, number))
    together = trace(path, queries=QUERIES, top=1, shortlist=2, **closer)
    assert loads == [1, 0] * stages
    for number in (0, 2):
        alone = trace(path, queries=[QUERIES[number]], top=1, shortlist=2, **closer)
        (one,), (other,) = together.of(number), alone.of(0)
        assert (one.id, one.score) == (other.id, pytest.approx(other.score, rel=1e-4))
        if stages > 1:
            assert one.exact == pytest.approx(other.exact, rel=1e-4)
        if one.tokens is not None:
            assert torch.allclose(one.tokens.matrix, other.tokens.matrix, atol=1e-5)


def test_both_bases_share_a_query_tokens_influence_out_among_the_examples_tokens(made):
    position, loss = (
        trace(made(checkpoints="last", **COARSE), queries=QUERIES[1:], tokens=True, basis=basis, top=1)
        for basis in ("position", "loss")
    )
    for one, other in zip(position.hits, loss.hits, strict=True):
        assert one.id == other.id
        assert one.tokens.matrix.sum(1).tolist() == near(other.tokens.matrix.sum(1).tolist())
        ids = ["<s>", *one.row["prompt"], *one.row["completion"], "</s>"]
        assert one.tokens.train == ids
        assert other.tokens.train == [*one.row["completion"], "</s>"]
        assert [token for token, is_target in zip(ids, one.tokens.supervised, strict=True) if is_target] == (
            other.tokens.train
        )
        assert all(other.tokens.supervised)


def test_what_comes_after_the_last_prediction_has_no_influence(made):
    """The closing token is predicted, and predicts nothing: no gradient arises at its position."""
    for hit in trace(made(**COARSE), PROMPT, COMPLETION, tokens=True, top=2).hits:
        assert hit.tokens.matrix[:, -1].tolist() == [0.0] * len(hit.tokens.query)
        assert float(hit.tokens.matrix[:, :-1].abs().min(1).values.max()) > 0


@pytest.mark.parametrize("method", ["cosine", "dot"])
@pytest.mark.parametrize("normalise", ["none", "layer"])
def test_the_exact_score_is_that_of_an_index_of_whole_gradients(made, method, normalise):
    whole = trace(made(projection="identity", normalise=normalise), queries=QUERIES, method=method)
    found = trace(made(**COARSE, normalise=normalise), queries=QUERIES, method=method, exact=True)
    for query in range(len(QUERIES)):
        assert {hit.id: hit.exact for hit in found.of(query)} == near(scores_of(whole.of(query)))


def test_exact_scores_decide_the_order_of_both_short_lists_together(made):
    whole = trace(made(20, projection="identity"), PROMPT, COMPLETION, top=20)
    coarse = trace(made(20, projection="two_sided", width=1), PROMPT, COMPLETION, top=20, exact=False)
    true = scores_of(whole.of(0))
    for shortlist, top in ((20, 5), (8, 3), (2, 4)):
        found = trace(
            made(20, projection="two_sided", width=1), PROMPT, COMPLETION, exact=True, shortlist=shortlist, top=top
        )
        sides = [[hit.id for hit in coarse.of(0, opposing=side)][: max(shortlist, 2 * top)] for side in (False, True)]
        for opposing, sign in ((False, -1), (True, 1)):
            short = sides[opposing]
            expected = sorted({*sides[0], *sides[1]}, key=lambda name: sign * true[name])[:top]
            assert expected != short[:top], "this compression changes nothing"
            hits = found.of(0, opposing=opposing)
            assert [hit.id for hit in hits] == expected
            assert [hit.rank for hit in hits] == [-sign * place for place in range(1, top + 1)]
            assert scores_of(hits) == near({name: scores_of(coarse.of(0))[name] for name in expected})
            assert all(hit.rank_score == hit.exact for hit in hits)
            if not opposing:
                assert found.overlaps == [len({*expected} & {*short[:top]}) / top]


def test_an_index_of_whole_gradients_overlaps_in_full(exact):
    found = trace(exact, queries=QUERIES[:2], exact=True, top=4)
    assert found.overlaps == [1, 1]
    assert trace(exact, PROMPT, COMPLETION).overlaps == []


def test_a_contrast_scores_the_difference_of_the_two_completions(made):
    built = made(**COARSE)
    yes, no, both = (
        scores_of(trace(built, PROMPT, completion, contrast=contrast, method="dot").of(0))
        for completion, contrast in ((" yes", None), (" no", None), (" yes", " no"))
    )
    assert both == near({name: yes[name] - no[name] for name in yes})
    swapped = scores_of(trace(built, PROMPT, " no", contrast=" yes", method="dot").of(0))
    assert swapped == near({name: -score for name, score in both.items()})


def test_a_span_scores_the_mean_of_its_tokens_and_all_spans_the_whole(made):
    built, count = made(**COARSE), len(COMPLETION) + 1
    whole = scores_of(trace(built, PROMPT, COMPLETION, method="dot").of(0))
    parts = [
        scores_of(trace(built, PROMPT, COMPLETION, span=span, method="dot").of(0)) for span in ((0, 3), (3, count))
    ]
    assert whole == near({name: (3 * parts[0][name] + (count - 3) * parts[1][name]) / count for name in whole})


RAPIDIN = {"projection": "shuffle_sum", "normalise": "layer", "width": 64, "checkpoints": "last"}


@pytest.mark.parametrize("method", sorted(name for name, entry in TRACE_METHODS.items() if not entry.needs_run))
def test_every_method_ranks_by_finite_scores(made, method):
    fitting = RAPIDIN if method == "rapidin" else COARSE
    found = trace(made(**fitting), queries=QUERIES[:2], method=method, exact=False)
    names = {f"row-{number}" for number in range(8)}
    assert found.method == method
    for query in range(2):
        helpful, opposing = found.of(query), found.of(query, opposing=True)
        scores = [hit.score for hit in helpful]
        assert all(map(math.isfinite, scores))
        assert scores == sorted(scores, reverse=True)
        assert [hit.score for hit in opposing] == sorted(scores)
        assert {hit.id for hit in helpful} == {hit.id for hit in opposing} == names


def test_rapidin_is_the_dot_of_its_own_gradients_and_of_no_other(made, exact):
    fitting = made(**RAPIDIN)
    dot, rapidin = (trace(fitting, PROMPT, COMPLETION, method=method) for method in ("dot", "rapidin"))
    assert scores_of(rapidin.hits) == scores_of(dot.hits)
    with pytest.raises(SettingError, match=r"--method rapidin needs .* has --projection identity --normalise none"):
        trace(exact, PROMPT, COMPLETION, method="rapidin")
    with pytest.raises(SettingError, match="has --projection two_sided --normalise layer"):
        trace(made(**COARSE, normalise="layer"), PROMPT, COMPLETION, method="rapidin")
    with pytest.raises(SettingError, match=r"--method rapidin is of one checkpoint; .* has 2"):
        trace(made(**RAPIDIN | {"checkpoints": "all"}), PROMPT, COMPLETION, method="rapidin")


@pytest.mark.parametrize(
    ("method", "same", "normalise"),
    [("tracin", "dot", "none"), ("tracin_cosine", "cosine", "none"), ("tracin_layer", "dot", "layer")],
)
def test_tracin_is_what_an_index_of_whole_gradients_says(made, method, same, normalise):
    expected = trace(made(projection="identity", normalise=normalise), queries=QUERIES, method=same)
    for coarse in (made(**COARSE), made(**COARSE, normalise="layer")):  # whatever the index holds
        found = trace(coarse, queries=QUERIES, method=method)
        for query in range(len(QUERIES)):
            assert scores_of(found.of(query)) == near(scores_of(expected.of(query)))


@pytest.mark.parametrize("method", [name for name, entry in TRACE_METHODS.items() if not entry.from_index])
@pytest.mark.parametrize("option", ["exact", "tokens", "specific"])
def test_a_baseline_has_no_index_to_look_closer_at(exact, method, option):
    with pytest.raises(SettingError, match=rf"--{option} belongs to .* not to --method {method}$"):
        trace(exact, PROMPT, COMPLETION, method=method, **{option: True})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"objective": "accuracy"}, "--objective accuracy: choose one of loss, margin"),
        ({"objective": "margin", "method": "ekfac"}, "--objective margin: --method ekfac is about the loss"),
        ({"objective": "margin", "method": "bm25"}, "--objective margin: --method bm25 is about the loss"),
        ({"options": {"damping": 1}}, "--set damping: --method cosine has no such option. It has none."),
        ({"options": {"x": 1}, "method": "embedding"}, "--set x: --method embedding has no such option. It has none."),
        ({"options": {"curvature": "b"}, "curvature": "a"}, "--set curvature=b: --curvature a is given too"),
        ({"options": {"size": 1}, "method": "ekfac"}, "--set size: --method ekfac has no such option. It has: kind, "),
        ({"basis": "token"}, "--basis token: choose one of position, loss"),
        ({"shortlist": 0}, "--shortlist 0: a number above 0"),
        ({"span": "maybe"}, "--span 'maybe' does not occur in the completion ' yes, 12</s>'"),
        ({"span": (0, 99)}, "--span-tokens 0:99: the completion has the tokens 0:9"),
    ],
)
def test_what_cannot_be_chosen_is_said(exact, option, message):
    with pytest.raises(SettingError, match=message):
        trace(exact, PROMPT, COMPLETION, **option)


@pytest.mark.parametrize("method", ["cosine", "tracin", "bm25"])
def test_fewer_rows_than_asked_for_are_all_shown_with_a_note(made, method):
    found = trace(made(**COARSE), PROMPT, COMPLETION, method=method, top=9, null=False)
    assert found.notes == ["--top 9: only 8 rows can be ranked; all are shown."]
    assert len(found.hits) == 16
    assert trace(made(**COARSE), PROMPT, COMPLETION, method=method, top=8, null=False).notes == []


def test_a_method_of_texts_says_that_it_leaves_span_and_contrast_out(made):
    (note,) = trace(made(**COARSE), PROMPT, COMPLETION, span="yes", method="bm25", top=4, null=False).notes
    assert note.startswith("--method bm25 compares whole texts")
    for method in ("tracin", "reach"):
        assert trace(made(**COARSE), PROMPT, COMPLETION, span="yes", method=method, top=4, null=False).notes == []
    assert trace(made(**COARSE), PROMPT, COMPLETION, contrast=" no", method="reach", top=4, null=False).notes == [
        "--method reach is of one completion: the contrast is left out of it."
    ]


def test_a_row_without_a_score_is_not_ranked(made, monkeypatch):
    @dataclass
    class Holes:
        seed: int

        def __call__(self, view, targets):
            return torch.tensor([[1.0, -torch.inf, 3.0, torch.nan, -2.0, 0.0, 5.0, 4.0]])

    monkeypatch.setattr("whence.catalogue.scorer", lambda name: Holes)
    found = trace(made(**COARSE), PROMPT, COMPLETION, method="random", top=3)
    assert [hit.id for hit in found.of(0)] == ["row-6", "row-7", "row-2"]
    assert [hit.id for hit in found.of(0, opposing=True)] == ["row-4", "row-5", "row-0"]


def test_a_method_takes_its_own_options(made):
    """As `select` does; they are among the settings."""
    index = made(**COARSE)
    encoded = encode_query(PROMPT, COMPLETION, index.model().tokenizer, kind=index.layout)
    target = Target("all", [QueryText(PROMPT, COMPLETION, encoded)])
    for damping in (0.01, 10.0):
        found = trace(index, PROMPT, COMPLETION, method="trak", options={"damping": str(damping)}, top=8)
        (expected,) = TRAK(damping=damping)(IndexView(index), [target])
        by_id = {row["id"]: score for row, score in zip(IndexView(index).examples(), expected.tolist(), strict=True)}
        assert scores_of(found.hits) == near(by_id)
        assert found.settings["options"] == f"damping={damping}"


def trak_by_hand(index, *texts):
    """R^-1 written out, the rows, and the vector that rows are multiplied by: of one answer, less that of another."""
    rows = torch.cat([vectors[0] for vectors, _ in IndexView(index).vectors()]).double()
    lines = rows / len(rows) ** 0.5
    damping = 0.1 * lines.square().sum(1).mean()
    inverse = torch.linalg.inv(lines.T @ lines + damping * torch.eye(lines.shape[1], dtype=torch.float64))
    asked = [encode_query(PROMPT, text, index.model().tokenizer, kind=index.layout) for text in texts]
    vectors = IndexView(index).query_vectors(asked)[0].double()
    signs = torch.tensor([1.0, -1.0][: len(texts)], dtype=torch.float64)
    return inverse, rows, index.weights[0] * inverse @ (signs @ vectors)


def test_trak_has_the_null_of_its_own_scores(made):
    """Controls are rows of the index, divided by the same curvature and scaled to the query's length."""
    index = made(rows=48, checkpoints="last", **COARSE)
    traced = trace(index, PROMPT, COMPLETION, method="trak", top=5)
    inverse, rows, asked = trak_by_hand(index, COMPLETION)
    ids = [row["id"] for row in IndexView(index).examples()]
    controls = nulls.control_rows(index)
    own = torch.nn.functional.normalize(rows[controls] @ inverse, dim=1) * asked.norm()
    for hit in traced.hits:
        place = ids.index(hit.id)
        scores = own[controls != place] @ rows[place]
        assert hit.score == pytest.approx(float(rows[place] @ asked), rel=1e-3)
        assert hit.null.z == pytest.approx(float((hit.score - scores.mean()) / scores.std()), rel=1e-2)
    assert len(traced.levels) == len(traced.verdicts) == 1 and traced.rerankings == []
    assert not any(note.startswith("no z") for note in traced.notes)


def test_datainf_has_a_null_too(made):
    index = made(rows=48, checkpoints="last", **COARSE)
    target = Target("all", [QueryText(PROMPT, COMPLETION, encode_query(PROMPT, COMPLETION, index.model().tokenizer,
                                                                       kind=index.layout))])  # fmt: skip
    (expected,) = DataInf()(IndexView(index), [target])
    by_id = {row["id"]: score for row, score in zip(IndexView(index).examples(), expected.tolist(), strict=True)}
    traced = trace(index, PROMPT, COMPLETION, method="datainf", top=5)
    assert [hit.score for hit in traced.hits] == pytest.approx([by_id[hit.id] for hit in traced.hits], rel=1e-3)
    assert [hit.id for hit in traced.of(0)] == sorted(by_id, key=by_id.__getitem__, reverse=True)[:5]
    assert all(hit.null is not None for hit in traced.hits) and len(traced.verdicts) == 1


def test_trak_takes_a_contrast_and_no_tokens(made):
    index = made(rows=48, checkpoints="last", **COARSE)
    traced = trace(index, PROMPT, COMPLETION, contrast=" no, 3", method="trak", top=5)
    _, rows, asked = trak_by_hand(index, COMPLETION, " no, 3")
    ids = [row["id"] for row in IndexView(index).examples()]
    by_id = dict(zip(ids, (rows @ asked).tolist(), strict=True))
    assert [hit.score for hit in traced.hits] == pytest.approx([by_id[hit.id] for hit in traced.hits], rel=1e-3)
    assert "contrast" not in " ".join(traced.notes)
    for flag in ("tokens", "exact"):
        with pytest.raises(SettingError, match=rf"--{flag} belongs to the methods that compare gradients as they are"):
            trace(index, PROMPT, COMPLETION, method="trak", **{flag: True})
    assert trace(index, PROMPT, COMPLETION, method="trak", specific=True, top=5).hits
