"""`whence curvature` as a library: equal to a pass over all rows at once, resumable, and refusals by name."""

import json
import shutil

import pytest
import torch
from small_views import each, query

from conftest import corpus_rows, save_tiny_llama
from whence.errors import (
    ChecksumError,
    ManifestMismatchError,
    MissingCurvatureError,
    SettingError,
    UnknownNameError,
)
from whence.indexing.build import index as build_index
from whence.indexing.opening import open_index
from whence.second_order import pipeline
from whence.second_order.eigen import ekfac, ekfac_sums, kfac
from whence.second_order.factors import kfac_factors
from whence.second_order.pipeline import curvature
from whence.second_order.store import open_curvature
from whence.selection.scorers.ekfac import EKFAC
from whence.selection.views import IndexView
from whence.storage import Place


@pytest.fixture(scope="module")
def indexed(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("curvature") / "index"
    build_index(tiny_llama, corpus_rows(12), path, projection="identity", codec="float32", progress=False)
    return path


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pipeline, "ROWS_AT_ONCE", 5)
    monkeypatch.setattr(pipeline, "EVERY", 0.0)
    monkeypatch.setattr(pipeline, "PATIENCE", 0.0)


class KilledError(Exception):
    """What stands for a kill."""


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".safetensors"}


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_in_pieces_it_is_what_one_pass_gives(kind, indexed, tmp_path, small_pieces):
    stored = curvature(indexed, tmp_path / "out", kind=kind, progress=False).curvature()
    opened = open_index(indexed)
    model, layers = opened.model(), opened.layers(opened.model())
    rows = list(IndexView(opened).encoded())
    expected = kfac(kfac_factors(model, layers, rows))
    if kind == "ekfac":
        expected = ekfac(expected, ekfac_sums(model, layers, expected, rows), len(rows))
    asked = torch.randn(2, 1, 1, generator=torch.Generator().manual_seed(0))
    for name, layer in expected.items():
        matrices = asked * torch.randn(layer.eigenvalues.shape, generator=torch.Generator().manual_seed(1))
        found, right = stored[name].power(matrices, -1.0), layer.power(matrices, -1.0)
        torch.testing.assert_close(found, right, rtol=1e-2, atol=1e-2 * float(right.abs().max()))


def test_an_object_store_holds_it(indexed, tmp_path, small_pieces):
    there, here = curvature(indexed, "memory://curvature/out", progress=False), curvature(indexed, tmp_path / "out")
    assert there.measured == here.measured
    for name, layer in open_curvature("memory://curvature/out").curvature().items():
        other = here.curvature()[name]
        assert layer.eigenvalues.equal(other.eigenvalues) and layer.inputs.equal(other.inputs)


def test_two_commands_do_not_write_one_directory(indexed, tmp_path):
    with Place.at(tmp_path / "out").locked(), pytest.raises(ManifestMismatchError, match="Another process"):
        curvature(indexed, tmp_path / "out", progress=False)


def test_weights_of_half_precision_have_the_same_curvature(indexed, tmp_path):
    """Sums are in float32: what differs is the rounding of the model's own passes."""
    whole = curvature(indexed, tmp_path / "whole", empirical=True, progress=False)
    half = curvature(indexed, tmp_path / "half", empirical=True, progress=False, dtype="bfloat16")
    for name, layer in whole.curvature().items():
        found = half.curvature()[name]
        assert found.eigenvalues.dtype == torch.float32
        assert float(found.eigenvalues.sum()) == pytest.approx(float(layer.eigenvalues.sum()), rel=0.05)


@pytest.mark.parametrize("after", range(1, 12))
def test_killed_at_any_writing_it_goes_on_to_the_same_bytes(after, indexed, tmp_path, small_pieces, monkeypatch):
    """A file and the document that names it are two writings; what a kill between them leaves is no part of it."""
    curvature(indexed, tmp_path / "whole", progress=False)
    written, write = 0, Place.write

    def killing(self, *arguments, **more):
        nonlocal written
        result, written = write(self, *arguments, **more), written + 1
        if written == after:
            raise KilledError
        return result

    monkeypatch.setattr(Place, "write", killing)
    with pytest.raises(KilledError):
        curvature(indexed, tmp_path / "out", progress=False)
    monkeypatch.setattr(Place, "write", write)
    if after < 11:
        with pytest.raises(MissingCurvatureError, match=r"stopped before it was complete. Go on: whence curvature"):
            open_curvature(tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    calls = []
    curvature(indexed, tmp_path / "out", progress=lambda done, total, about: calls.append((about, done)))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert set(contents(tmp_path / "out")) == {"bases.safetensors", "eigenvalues.safetensors"}
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    if after == 5:
        assert calls[0] == ("Measuring covariances", 10), "the first ten rows are not measured again"


def test_scores_by_stored_curvature_are_those_of_curvature_measured_for_the_call(indexed, tmp_path):
    curvature(indexed, tmp_path / "out", progress=False)
    view = IndexView(open_index(indexed))
    asked = each([query(row, view.model()) for row in corpus_rows(12)[3:5]])
    for options in ({}, {"kind": "kfac"}, {"refine": 2}):
        expected = EKFAC(**options)(view, asked)
        found = EKFAC(curvature=str(tmp_path / "out"), **options)(view, asked)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_some_rows_and_layers(indexed, tmp_path):
    store = curvature(indexed, tmp_path / "out", rows=5, layers="*mlp*", progress=False)
    assert (store.measured.rows, store.measured.of_rows) == (5, 12)
    assert all("mlp" in name for name in store.measured.layers)
    again = curvature(indexed, tmp_path / "again", rows=5, layers="*mlp*", seed=1, progress=False)
    assert contents(tmp_path / "out") != contents(tmp_path / "again"), "another seed draws other rows"
    assert again.is_complete
    view = IndexView(open_index(indexed))
    asked = each([query(corpus_rows(12)[3], view.model())])
    assert EKFAC(curvature=str(tmp_path / "out"))(view, asked).isfinite().all()


def test_another_model_is_refused(indexed, tmp_path):
    curvature(indexed, tmp_path / "out", progress=False)
    other = save_tiny_llama(tmp_path / "model", seed=1)
    build_index(other, corpus_rows(4), tmp_path / "other", projection="count_sketch", progress=False)
    view = IndexView(open_index(tmp_path / "other"))
    asked = each([query(corpus_rows(4)[0], view.model())])
    with pytest.raises(ManifestMismatchError, match=r"curvature of another model, .* Measure this one: whence curv"):
        EKFAC(curvature=str(tmp_path / "out"))(view, asked)


def test_what_cannot_be_measured_or_gone_on_with_is_refused(indexed, tmp_path):
    with pytest.raises(UnknownNameError, match=r"--kind fisher: there is no such kind. Known: ekfac, kfac"):
        curvature(indexed, tmp_path / "out", kind="fisher", progress=False)
    with pytest.raises(SettingError, match=r"--rows 0: at least 1"):
        curvature(indexed, tmp_path / "out", rows=0, progress=False)
    curvature(indexed, tmp_path / "out", kind="kfac", progress=False)
    with pytest.raises(ManifestMismatchError, match=r'another kind \(there "kfac", here "ekfac"\).*--restart'):
        curvature(indexed, tmp_path / "out", progress=False)
    view = IndexView(open_index(indexed))
    asked = each([query(corpus_rows(12)[3], view.model())])
    by_kind = [EKFAC(curvature=str(tmp_path / "out"), kind=kind)(view, asked) for kind in ("", "kfac")]
    assert torch.equal(*by_kind), "it is of the kind that was measured"
    with pytest.raises(SettingError, match="K-FAC alone was measured there"):
        open_curvature(tmp_path / "out").curvature("ekfac")
    curvature(indexed, tmp_path / "out", restart=True, progress=False)
    assert open_curvature(tmp_path / "out").measured.kind == "ekfac"
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(SettingError, match=r"not curvature's alone \(thesis.txt is there\). Nothing was changed"):
        curvature(indexed, tmp_path / "out", restart=True, progress=False)
    with pytest.raises(SettingError, match="input"):
        curvature(indexed, indexed, progress=False)
    with pytest.raises(MissingCurvatureError, match=r"no curvature here .* whence curvature INDEX -o"):
        open_curvature(tmp_path / "nothing")


def test_a_flipped_bit_is_found(indexed, tmp_path):
    curvature(indexed, tmp_path / "out", progress=False)
    file = tmp_path / "out" / "bases.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"bases.safetensors is not what was written .* --restart"):
        open_curvature(tmp_path / "out").curvature()
    document = tmp_path / "out" / "curvature.json"
    text = json.loads(document.read_text())
    shutil.copy(document, tmp_path / "kept.json")
    document.write_text(json.dumps(text | {"done": 3}))
    with pytest.raises(ChecksumError):
        open_curvature(tmp_path / "out")


def test_an_index_of_other_tokens_is_not_gone_on_with(indexed, tiny_llama, tmp_path):
    curvature(indexed, tmp_path / "out", progress=False)
    build_index(tiny_llama, corpus_rows(12), tmp_path / "other", projection="identity", codec="float32", max_tokens=9,
                progress=False)  # fmt: skip
    with pytest.raises(ManifestMismatchError, match=r'another reading \(there \{"max_tokens": \d+\}, here .*9\}\)'):
        curvature(tmp_path / "other", tmp_path / "out", progress=False)
