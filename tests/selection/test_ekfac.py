"""Scores by curvature against autograd's gradients and an explicit inverse, and what holds of any of them."""

from dataclasses import replace

import pytest
import torch
from small_views import Rows, each, query

from conftest import corpus_rows
from whence.errors import SettingError, WhenceError
from whence.gradients import corpus_scores
from whence.indexing.build import index as build_index
from whence.indexing.opening import open_index
from whence.models.loading import load_model
from whence.second_order.eigen import ekfac, ekfac_sums, kfac
from whence.second_order.factors import kfac_factors
from whence.selection.scorers.ekfac import EKFAC
from whence.selection.views import IndexView


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(tiny_llama, device="cpu")


@pytest.fixture
def view(model):
    return Rows(corpus_rows(12), model)


def loss_gradient(model, layers, row, *, mean):
    """By autograd, of the sum or mean over the row's supervised tokens, by layer."""
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    with torch.enable_grad():
        logits = model.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(1)
        losses = [-logits[t - 1, row.ids[t]] for t in range(1, len(row.ids)) if row.supervised[t]]
        found = torch.autograd.grad(sum(losses) / (len(losses) if mean else 1), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return dict(zip(layers, found, strict=True))


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_scores_are_inner_products_by_the_explicit_inverse(kind, view, model):
    layers, rows = model.layers(), list(view.encoded())
    curvature = kfac(kfac_factors(model, layers, rows))
    if kind == "ekfac":
        curvature = ekfac(curvature, ekfac_sums(model, layers, curvature, rows), len(rows))
    asked = query(view.listed[3], model)
    target = loss_gradient(model, layers, asked.encoded, mean=True)
    expected = torch.zeros(len(rows), dtype=torch.float64)
    for number, row in enumerate(rows):
        own = loss_gradient(model, layers, row, mean=False)
        for name, layer in curvature.items():
            basis = torch.kron(layer.slopes, layer.inputs).double()
            damped = layer.eigenvalues.double().flatten() + 0.1 * layer.eigenvalues.double().mean()
            rotated = basis.T @ target[name].double().flatten() / damped
            expected[number] += own[name].double().flatten() @ (basis @ rotated)
    expected /= len(rows)
    found = EKFAC(kind=kind)(view, each([asked]))[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_row_helps_its_own_answer_most_among_rows_of_its_length(view, model):
    scores = EKFAC()(view, each([query(row, model) for row in view.listed]))
    assert (scores.diagonal() > 0).all(), "a quadratic form of a positive matrix"


def test_targets_that_do_not_fit_at_once_take_several_passes(view, model, monkeypatch):
    asked = each([query(row, model) for row in view.listed[:3]])
    whole = EKFAC()(view, asked)
    monkeypatch.setattr(corpus_scores, "HELD_BYTES", 1)
    torch.testing.assert_close(EKFAC()(view, asked), whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    empty = query(view.listed[3], model)
    empty = replace(empty, encoded=replace(empty.encoded, supervised=[False] * len(empty.encoded.ids)))
    monkeypatch.setattr("whence.selection.scorers.ekfac.kfac_factors", None)
    with pytest.raises(SettingError, match="none of its 1 examples has a finite gradient"):
        EKFAC()(view, [*asked, *each([empty])])  # before curvature is measured


def test_large_damping_leaves_inner_products(view, model):
    layers, rows = model.layers(), list(view.encoded())
    target = loss_gradient(model, layers, query(view.listed[3], model).encoded, mean=True)
    found = EKFAC(kind="kfac", damping=1e6)(view, each([query(view.listed[3], model)]))[0]
    curvature = kfac(kfac_factors(model, layers, rows))
    plain = torch.zeros(len(rows))
    for number, row in enumerate(rows):
        own = loss_gradient(model, layers, row, mean=False)
        plain[number] = sum(
            (target[name] * own[name]).sum() / (1e6 * curvature[name].eigenvalues.mean()) for name in layers
        )
    plain /= len(rows)
    torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max()))


def test_a_plain_index_serves_as_it_is(tiny_llama, tmp_path):
    rows = corpus_rows(12)
    build_index(tiny_llama, rows, tmp_path / "whole", projection="identity", codec="float32", progress=False)
    build_index(tiny_llama, rows, tmp_path / "sketch", width=43008, projection="count_sketch", progress=False)
    whole, sketch = (IndexView(open_index(tmp_path / name)) for name in ("whole", "sketch"))
    asked = each([query(rows[3], whole.model()), query(rows[5], whole.model())])
    expected = EKFAC()(whole, asked)
    torch.testing.assert_close(
        EKFAC(sketched=True)(whole, asked), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )
    found = EKFAC(sketched=True)(sketch, asked)
    assert all(torch.corrcoef(torch.stack(pair))[0, 1] > 0.95 for pair in zip(found, expected, strict=True))


def test_vectors_that_are_no_plain_gradients_are_refused(tiny_llama, tmp_path):
    rows = corpus_rows(4)
    build_index(tiny_llama, rows, tmp_path / "index", normalise="layer", projection="shuffle_sum", progress=False)
    view = IndexView(open_index(tmp_path / "index"))
    with pytest.raises(SettingError, match=r"not plain gradients .*Leave sketched out"):
        EKFAC(sketched=True)(view, each([query(rows[0], view.model())]))


def test_a_target_without_a_gradient_is_refused_by_name(view, model):
    asked = query(view.listed[3], model)
    nothing = replace(asked, encoded=replace(asked.encoded, supervised=[False] * len(asked.encoded.ids)))
    with pytest.raises(SettingError, match="none of its 1 examples has a finite gradient"):
        EKFAC()(view, each([asked, nothing]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping 0.0 of ekfac: a number above 0"),
        ({"refine": -1}, "refine -1 of ekfac: at least 0"),
        ({"sample": 0}, "sample 0 of ekfac: at least 1"),
        ({"kind": "kfc"}, "there is no such kind. Known: ekfac, kfac"),
    ],
)
def test_values_that_cannot_be_are_refused(options, message):
    with pytest.raises(WhenceError, match=message):
        EKFAC(**options)
