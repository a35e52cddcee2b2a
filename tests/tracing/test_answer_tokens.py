"""A stretch of an answer is ranked from its tokens' scores as a query about that stretch is."""

import pytest
import torch

from conftest import corpus_rows
from whence.errors import SettingError
from whence.indexing.build import index
from whence.tracing.answer_tokens import about, answer_tokens, is_linear, stretch_scores
from whence.tracing.queries import Query, encode_queries, query_vectors

PROMPT, COMPLETION = "5 and 3?", " yes, 12"


def encoded(opened, **more):
    return encode_queries([Query(PROMPT, COMPLETION, **more)], opened.model(), kind=opened.layout)[0]


def queried(opened, query, *, cosine):
    """Scores of a query by a scan of its own."""
    vectors = query_vectors(opened, [query.sequences])
    out = torch.zeros(opened.store.rows)
    for first, scores in opened.store.scores(vectors, torch.tensor(opened.weights), cosine=cosine):
        out[first : first + scores.shape[1]] = scores[0]
    return out


def stretches(count):
    return [
        [True] * count,
        [place == 0 for place in range(count)],
        [place in (1, count - 1) for place in range(count)],
    ]


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("settings", [
    {"projection": "two_sided", "codec": "float32"},
    {"reduction": "sum"},
    {"reduction": "mean"},
])  # fmt: skip
def test_a_stretch_scores_as_a_query_about_it(tiny_llama, tmp_path, settings, cosine):
    opened = index(tiny_llama, corpus_rows(20), tmp_path / "index", progress=False, **settings)
    query = encoded(opened)
    tokens = answer_tokens(opened, query)
    for asked in stretches(tokens.tokens):
        wanted = queried(opened, about(query, asked), cosine=cosine)
        torch.testing.assert_close(
            tokens.scores(asked, cosine=cosine), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
        )


@pytest.mark.parametrize("cosine", [True, False])
def test_several_checkpoints_and_a_contrast(tiny_run, tmp_path, cosine):
    opened = index(tiny_run, corpus_rows(20), tmp_path / "index", checkpoints="all", progress=False)
    assert len(opened.weights) > 1
    query = encoded(opened, contrast=" no, 7")
    tokens = answer_tokens(opened, query)
    for asked in stretches(tokens.tokens):
        stretch = about(query, asked)
        wanted = queried(opened, stretch, cosine=cosine)
        torch.testing.assert_close(
            tokens.scores(asked, cosine=cosine), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
        )
        norms = query_vectors(opened, [stretch.sequences]).norm(dim=2)[:, 0]
        torch.testing.assert_close(tokens.norms(asked), norms, rtol=1e-4, atol=1e-6)


def test_layers_that_are_divided_by_their_norms_take_a_pass_a_stretch(tiny_llama, tmp_path):
    opened = index(tiny_llama, corpus_rows(20), tmp_path / "index", normalise="layer", progress=False)
    query = encoded(opened)
    assert not is_linear(opened)
    with pytest.raises(SettingError, match="do not add up to it"):
        answer_tokens(opened, query)
    count = len(query.answer.tokens)
    asked = [place == 1 for place in range(count)]
    whole = stretch_scores(opened, query, asked)
    torch.testing.assert_close(whole.scores([True], cosine=True), queried(opened, about(query, asked), cosine=True))


def test_rows_that_cannot_be_ranked_score_nothing(tiny_llama, tmp_path):
    rows = [*corpus_rows(5), {"id": "empty", "prompt": "a", "completion": ""}, *corpus_rows(5, first=5)]
    opened = index(tiny_llama, rows, tmp_path / "index", progress=False)
    tokens = answer_tokens(opened, encoded(opened))
    finite = tokens.scores([True] * tokens.tokens, cosine=True).isfinite()
    assert finite.nonzero()[:, 0].tolist() == opened.store.rankable().tolist()


def test_a_stretch_has_a_token(tiny_llama, tmp_path):
    opened = index(tiny_llama, corpus_rows(5), tmp_path / "index", progress=False)
    tokens = answer_tokens(opened, encoded(opened))
    for asked in ([False] * tokens.tokens, [True]):
        with pytest.raises(SettingError, match="with one of them or more"):
            tokens.scores(asked, cosine=True)
