"""Evidence of adapters from their base's own pass: the same as from each adapter with its B at 0."""

import pytest
import torch

from conftest import save_tiny_llama
from whence.corpus.reading import open_corpus
from whence.errors import SettingError
from whence.indexing.ingest import fingerprint_of
from whence.models.loading import load_model
from whence.recovery.adapters import adapter_start, gather_adapters
from whence.recovery.case import at_point, open_case
from whence.recovery.points import gather_evidence
from whence.recovery.settings import RecoverSettings
from whence.storage import Place
from whence.training.trainer import train

ROWS = [{"id": f"r{n}", "prompt": f"{n}?", "completion": " ab" * (1 + n % 5)} for n in range(24)]
QUICK = {"batch_size": 4, "epochs": 2, "lr": 1e-2, "max_tokens": 32, "progress": False, "checkpoints": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("adapted") / "base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Of the same layers, from other A, at another scale."""
    places = [tmp_path_factory.mktemp("adapted") / name for name in ("one", "two")]
    return [str(train(base, ROWS[at : at + 12], place, lora_rank=rank, lora_alpha=alpha, seed=at, **QUICK))
            for at, rank, alpha, place in ((0, 2, 4, places[0]), (12, 3, 9, places[1]))]  # fmt: skip


def case_of(base, adapter, layers=None):
    return open_case(base, adapter, RecoverSettings(max_tokens=32, width=256, layers=layers))


def test_one_pass_over_the_base_gives_what_each_adapter_gives_alone(base, adapters, tmp_path):
    corpus = open_corpus(ROWS)
    first, second = (case_of(base, adapter) for adapter in adapters)
    fingerprint = fingerprint_of(corpus)
    alone = {name: gather_evidence(case, corpus, Place.at(tmp_path / name), fingerprint, progress=False).points["base"]
             for name, case in (("first", first), ("second", second))}  # fmt: skip
    both = gather_evidence(first, corpus, Place.at(tmp_path / "both"), fingerprint, others={"second": second},
                           progress=False).points["base"]  # fmt: skip
    assert not (tmp_path / "both" / "base").exists(), "it was not gathered alone"
    every = torch.arange(len(ROWS))
    for name, own in (("first", both), ("second", both.subset(every, {"difference": "second"}))):
        other = alone[name]
        assert own.layers == other.layers and torch.equal(own.tokens, other.tokens)
        torch.testing.assert_close(own.loss, other.loss, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(own.norms, other.norms, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(own.dots["difference"], other.dots["difference"], rtol=1e-3, atol=1e-7)
    assert not torch.allclose(alone["first"].norms, alone["second"].norms, rtol=0.1), "another A, another gradient"
    assert both.usable.all()


def test_what_is_more_than_a_product_is_not_read_from_the_base(base, adapters, tmp_path):
    case = case_of(base, adapters[0])
    with at_point(case, 1.0) as model:
        target = case.direction(model, model.layers(case.settings.space.layers))
        assert adapter_start(model, target) is not None
        owner = model.base.get_submodule(next(iter(target)).partition(".lora_B.")[0])
        owner.use_dora = {"default": True}
        assert adapter_start(model, target) is None


def test_adapters_of_other_layers_are_refused(base, adapters, tmp_path):
    starts = {}
    for name, adapter, layers in (("one", adapters[0], None), ("two", adapters[1], "*q_proj.lora_B*")):
        case = case_of(base, adapter, layers)
        with at_point(case, 1.0) as model:
            starts[name] = adapter_start(model, case.direction(model, model.layers(case.settings.space.layers)))
    with pytest.raises(SettingError, match="the adapter two is of other layers than one"):
        gather_adapters(
            load_model(base),
            open_corpus(ROWS),
            starts,
            rows=len(ROWS),
            work=Place.at(tmp_path),
            settings=case.settings,
            provenance={},
        )
