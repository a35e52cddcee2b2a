"""frozen-v on a plain index: exact where the second moment does not move, else as close as its page says."""

import pytest
import torch
from scipy.stats import spearmanr

from conftest import corpus_rows, plain_trainer_run
from whence.corpus.tokens import encode
from whence.errors import ModelError, SettingError
from whence.indexing.build import index
from whence.indexing.vectors import example_vectors
from whence.selection.frozen_adam import FrozenView
from whence.selection.pipeline import select

PLAIN = {"projection": "identity", "codec": "float32", "progress": False}
ROWS = [*corpus_rows(60), {"id": "nothing", "prompt": "a", "completion": None}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """LoRA on a Llama: checkpoints 2 and 4."""
    out = tmp_path_factory.mktemp("frozen") / "run"
    plain_trainer_run(out, "lora")
    return out


def queries_for(built, count=8):
    return [encode(row, built.model().tokenizer) for row in corpus_rows(count, first=90)]


def frozen_scores(built, queries, *, adam_mode="torch", cosine=True):
    """Of every query alone."""
    view = FrozenView(built, adam_mode=adam_mode)
    vectors = view.query_vectors(queries)
    return view.scores(vectors / view.norms(vectors)[:, :, None] if cosine else vectors, cosine=cosine)


def true_scores(adam, queries, cosine):
    """By the view adam's own rows and plain queries."""
    out = 0
    for number, weight in enumerate(adam.weights):
        model = adam.model(number)
        q = example_vectors(model, adam.layers(model), adam.projection(model), queries, settings=adam.settings).vectors
        shards = [adam.store.shard(number, part) for part in range(len(adam.store.manifest.parts))]
        rows = torch.cat([shard.decoded(adam.store.codec, adam.store.manifest.width) for shard in shards])
        if cosine:
            q, rows = torch.nn.functional.normalize(q), torch.nn.functional.normalize(rows)
        out = out + weight * q @ rows.T
    return out


def test_it_is_exact_where_the_second_moment_does_not_move(run, tmp_path):
    """With b2 = 1 n2 is m2, so f is linear in g; and where m2 is the same everywhere, D stretches all alike."""
    for step in (2, 4):
        file = run / f"checkpoint-{step}" / "optimizer.pt"
        content = torch.load(file, weights_only=True)
        for group in content["param_groups"]:
            group["betas"] = (0.9, 1.0)
        for entry in content["state"].values():
            entry["exp_avg_sq"].fill_(4.0)
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        for item in file.parent.iterdir():
            if item != file:
                (tmp_path / "run" / file.parent.name / item.name).symlink_to(item)
        torch.save(content, tmp_path / "run" / file.parent.name / file.name)
    options = PLAIN | {"checkpoints": "all"}
    plain = index(tmp_path / "run", ROWS, tmp_path / "plain", **options)
    adam = index(tmp_path / "run", ROWS, tmp_path / "adam", view="adam", adam_mode="less", **options)
    queries = queries_for(plain)
    for cosine in (False, True):
        found = frozen_scores(plain, queries, adam_mode="less", cosine=cosine)
        expected = true_scores(adam, queries, cosine)
        torch.testing.assert_close(found[:, :-1], expected[:, :-1], rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert (found[:, -1] == -torch.inf).all()


@pytest.mark.parametrize(("mode", "cosine", "least"), [("less", True, 0.8), ("torch", True, 0.8), ("less", False, 0.7)])
def test_it_ranks_as_adam_does(run, tmp_path, mode, cosine, least):
    """Rank correlation over 60 examples, mean of 8 queries, after four steps of a tiny model: 0.89, 0.86 and 0.82.

    `benchmarks/gradients/adam.py` measures it on a larger one.
    """
    plain = index(run, ROWS, tmp_path / "plain", **PLAIN)
    adam = index(run, ROWS, tmp_path / "adam", view="adam", adam_mode=mode, **PLAIN)
    queries = queries_for(plain)
    found = frozen_scores(plain, queries, adam_mode=mode, cosine=cosine)[:, :-1]
    expected = true_scores(adam, queries, cosine)[:, :-1]
    agreement = [spearmanr(one, other).statistic for one, other in zip(found, expected, strict=True)]
    assert sum(agreement) / 8 > least


def test_it_works_on_sketches_and_refuses_other_rows(run, tmp_path, tiny_llama):
    queries = None
    for name, width in (("two_sided", 16), ("count_sketch", 8192)):
        built = index(run, ROWS, tmp_path / name, projection=name, width=width, codec="bfloat16", progress=False)
        queries = queries_for(built)
        found = frozen_scores(built, queries)
        assert torch.isfinite(found[:, :-1]).all()
    exact = frozen_scores(index(run, ROWS, tmp_path / "exact", **PLAIN), queries)
    agreement = [spearmanr(a[:-1], b[:-1]).statistic for a, b in zip(found, exact, strict=True)]
    assert min(agreement) > 0.9
    for options in ({"view": "adam", "projection": "count_sketch"}, {"normalise": "layer"}):
        built = index(run, ROWS, tmp_path / "-".join(options), progress=False, **options)
        with pytest.raises(SettingError, match="frozen-v is a query's"):
            frozen_scores(built, queries)
    with pytest.raises(ModelError, match=r"no optimizer\.pt"):
        frozen_scores(index(tiny_llama, ROWS, tmp_path / "bare", progress=False), queries)


@pytest.mark.parametrize("method", ["less", "influence", "reach"])
def test_methods_choose_by_it(run, tmp_path, method):
    """By the index alone `less` would give other scores; the mean of several examples is the mean of their vectors."""
    plain = index(run, ROWS, tmp_path / "plain", checkpoints="all", **PLAIN)
    tasks = corpus_rows(3, first=90)
    found = select(plain, tasks, method=method, view="frozen-v", adam_mode="less", count=5, by="task")
    assert found.settings["view"] == "frozen-v, mode less"
    assert len(found.rows) == 5
    scores = found.candidates.scores[0]
    assert not torch.allclose(
        scores[:-1], select(plain, tasks, method=method, count=5, by="task").candidates.scores[0][:-1]
    )
    assert scores[-1] == -torch.inf
    if method == "influence":
        expected = frozen_scores(plain, queries_for(plain, 3), adam_mode="less", cosine=False).mean(0)
        torch.testing.assert_close(scores[:-1], expected[:-1], rtol=1e-4, atol=1e-5 * float(expected[:-1].abs().max()))


def test_methods_that_read_features_are_refused(run, tmp_path):
    plain = index(run, ROWS, tmp_path / "plain", **PLAIN)
    with pytest.raises(SettingError, match="--view frozen-v makes inner products"):
        select(plain, corpus_rows(3), method="datainf", view="frozen-v", count=5)
    with pytest.raises(SettingError, match="--view adam: frozen-v is expected"):
        select(plain, corpus_rows(3), method="less", view="adam", count=5)
    with pytest.raises(SettingError, match="is of an index"):
        select(ROWS, corpus_rows(3), method="bm25", view="frozen-v", count=5)
