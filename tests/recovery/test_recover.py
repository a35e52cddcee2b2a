"""The recover job: tiny models fine-tuned on known rows, what is found, what is refused, what goes on after a stop."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import byte_tokenizer, save_tiny_llama
from whence import catalogue, recover
from whence.corpus.reading import open_corpus
from whence.errors import CorpusError, ManifestMismatchError, ModelError, SettingError, UnknownNameError
from whence.indexing.ingest import fingerprint_of
from whence.models.difference import weight_difference
from whence.models.loading import load_model
from whence.models.local_copies import local_directory
from whence.models.rounding import round_stored, stored_dtype
from whence.models.runs import open_run
from whence.recovery.case import foreign_tokenizer, open_case
from whence.recovery.membership import Features, calibrate, cosine, features, matched, with_short_list
from whence.recovery.points import gather_evidence, points_of, with_points_of
from whence.recovery.scores import SCORES, method_scores
from whence.recovery.settings import RecoverSettings
from whence.recovery.shadow_calibration import shadow_split
from whence.recovery.shadow_model import Recipe, distance, signature, trained_shadow
from whence.storage import Place
from whence.training.trainer import train

LETTERS = "abcdefghijklmnop"
ROWS = [
    {"id": f"r{n}", "source": "vowels" if n % 4 == 0 else "rest", "prompt": f"{LETTERS[n % 16]}{n}?",
     "completion": f" {LETTERS[(7 * n) % 16] * 3}{n * 37 % 101}"}
    for n in range(60)
]  # fmt: skip
MEMBERS = list(range(0, 60, 4))
QUICK = {"batch_size": 4, "epochs": 3, "max_tokens": 32, "progress": False, "checkpoints": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("recovery") / "base"))


@pytest.fixture(scope="module")
def final(base, tmp_path_factory):
    rows = [ROWS[n] for n in MEMBERS]
    return str(train(base, rows, tmp_path_factory.mktemp("recovery") / "run", optimizer="sgd", lr=0.05, **QUICK))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    rows = [ROWS[n] for n in MEMBERS]
    out = tmp_path_factory.mktemp("recovery") / "adapter"
    return str(train(base, rows, out, lr=1e-2, lora_rank=2, **QUICK))


def seen_of(base, final, work, points=0):
    case, corpus = open_case(base, final, RecoverSettings(max_tokens=32, width=512)), open_corpus(ROWS)
    return gather_evidence(case, corpus, Place.at(work), fingerprint_of(corpus), points=points, progress=False)


def precision(scores):
    return sum(int(row) in MEMBERS for row in scores.topk(len(MEMBERS)).indices) / len(MEMBERS)


def test_every_method_ranks_all_rows_and_those_that_should_find_members(base, final, tmp_path):
    seen = seen_of(base, final, tmp_path)
    found = {name: precision(method_scores(seen, name, count=len(MEMBERS))) for name in SCORES}
    assert {*SCORES} == {*catalogue.RECOVER_METHODS} - {"calibrated"}
    assert min(found["nnls"], found["cosine"], found["matching"]) >= 0.8, found
    assert found["random"] < 0.6, found


def test_a_difference_turned_round_finds_no_member(base, final, tmp_path):
    """The null: members score above chance by T, and below it by -T."""
    seen = seen_of(base, final, tmp_path)
    scores = cosine(seen, "final")
    members = torch.tensor([n in MEMBERS for n in range(60)])
    assert float(scores[members].mean()) > float(scores[~members].mean())
    turned = replace(seen, sketch=-seen.sketch)
    assert precision(matched(seen)[1]) >= 0.8
    assert precision(matched(turned)[1]) < 0.3, "chance is 1 in 4"


def test_a_shuffled_difference_finds_members_by_chance(base, final, tmp_path):
    """The null: entries of every layer's T in another order, which keeps its norm and its distribution."""
    case, corpus = open_case(base, final, RecoverSettings(max_tokens=32, width=512)), open_corpus(ROWS)
    hits, turned = [], []
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)

        def shuffled(name, part, rng=rng):
            return part.flatten()[torch.randperm(part.numel(), generator=rng)].view_as(part)

        own = replace(case, difference=case.difference.mapped(shuffled))
        seen = gather_evidence(own, corpus, Place.at(tmp_path / str(seed)), fingerprint_of(corpus), progress=False)
        hits.append(precision(matched(seen)[1]))
        turned.append(precision(method_scores(seen, "cosine", count=len(MEMBERS))))
    assert sum(hits) / 4 < 0.45 and sum(turned) / 4 < 0.45, "chance is 1 in 4, with the true T it is above 0.8"


def test_a_short_list_takes_its_share_of_every_length_and_source(base, final, tmp_path):
    seen = seen_of(base, final, tmp_path)
    groups = [row["source"] for row in ROWS]
    listed = with_short_list(seen, 20, groups=groups)
    assert 18 <= len(listed.short_list) <= 24
    assert listed.short_list.tolist() == sorted({*listed.short_list.tolist()})
    share = sum(groups[row] == "vowels" for row in listed.short_list.tolist()) / len(listed.short_list)
    assert share == pytest.approx(0.25, abs=0.1)
    assert with_short_list(seen, 60).short_list.tolist() == list(range(60))
    scores = method_scores(listed, "nnls", count=15)
    outside = [row for row in range(60) if row not in listed.short_list.tolist()]
    assert float(scores[outside].max()) < float(scores[listed.short_list].min()), "others stand below the list"
    assert torch.isfinite(scores).all()
    parts = features(listed)
    assert not parts.values[outside, parts.names.index("part")].any()


def test_a_short_list_of_as_many_sources_as_rows_is_no_longer(base, final, tmp_path):
    listed = with_short_list(seen_of(base, final, tmp_path), 20, groups=[row["id"] for row in ROWS])
    assert 18 <= len(listed.short_list) <= 24


def test_evidence_read_by_another_tokenizer_is_not_taken(base, final, tmp_path):
    seen_of(base, final, tmp_path / "work")
    words = byte_tokenizer()
    words.chat_template = "{% for m in messages %}another {{ m['content'] }}{% endfor %}"
    words.save_pretrained(tmp_path / "words")
    settings = RecoverSettings(max_tokens=32, width=512, tokenizer=str(tmp_path / "words"))
    case, corpus = open_case(base, final, settings), open_corpus(ROWS)
    assert foreign_tokenizer(case) == str(tmp_path / "words")
    assert foreign_tokenizer(open_case(base, final, RecoverSettings())) is None
    with pytest.raises(ManifestMismatchError, match="another tokenizer"):
        gather_evidence(case, corpus, Place.at(tmp_path / "work"), fingerprint_of(corpus), progress=False)


def test_a_shadow_of_fewer_checkpoints_has_the_final_leave_some_out(base, final):
    case = replace(open_case(base, final, RecoverSettings()), between=tuple("abcdefgh"))
    assert with_points_of(case, replace(case, between=("x", "y"))).between == ("c", "g")
    assert with_points_of(case, replace(case, between=tuple("12345678"))) is case
    assert with_points_of(case, replace(case, between=())).between == ()


def test_an_adapter_with_whole_layers_beside_it_is_refused(base, adapter, tmp_path):
    (last,) = Path(adapter).glob("checkpoint-*")
    shutil.copytree(last, tmp_path / "own")
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    (tmp_path / "own" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    (tmp_path / "own" / "whence_checksums.json").unlink()  # else the changed file is refused
    with pytest.raises(ModelError, match=r"whole layers were trained beside its adapter \(lm_head\)"):
        open_case(base, str(tmp_path / "own"), RecoverSettings())
    with pytest.raises(SettingError, match="--rounds: an adapter"):
        open_case(base, adapter, RecoverSettings(method="nnls", rounds=1))


def test_points_lie_between_the_models(base, final, tmp_path):
    assert list(points_of(open_case(base, final, RecoverSettings()), 2)) == ["base", "0.333", "0.667", "final"]
    seen = seen_of(base, final, tmp_path, points=1)
    assert list(seen.points) == ["base", "0.5", "final"]
    ends = torch.stack([seen.points["base"].loss, seen.points["final"].loss])
    between = seen.points["0.5"].loss
    assert torch.allclose(between, ends.mean(0), atol=0.1 * float((ends[0] - ends[1]).abs().max()) + 0.05)
    assert any("at 0.5" in name for name in features(seen).names)


def test_an_adapter_is_looked_into_by_its_b(base, adapter, tmp_path):
    seen = seen_of(base, adapter, tmp_path)
    assert all(".lora_B." in layer for layer in seen.points["final"].layers)
    assert precision(method_scores(seen, "row_cosine", count=len(MEMBERS))) > 0.4
    plain, model = load_model(base), seen.points["base"]
    from whence.corpus.tokens import collate, encode
    from whence.gradients.capture import token_losses

    losses = token_losses(plain, collate([encode(ROWS[5], plain.tokenizer, 32)]))
    assert float(model.loss[5]) == pytest.approx(float(losses.loss[0]), rel=1e-4), "B at 0 is the base"


def test_recover_finds_the_rows_and_goes_on_after_a_stop(base, final, tmp_path, monkeypatch):
    options = {"max_tokens": 32, "width": 512, "epochs": 3.0, "batch_size": 4, "optimizer": "sgd", "lr": 0.05}
    found = recover(base, final, ROWS, count=15, work=tmp_path / "work", progress=False, **options)
    assert len(found.rows) == 15
    hits = sum(int(row["id"][1:]) in MEMBERS for row in found.rows)
    assert hits >= 12
    scores = [row["whence_score"] for row in found.rows]
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
    assert all(0 < row["whence_p"] <= 1 for row in found.rows)
    assert sum(row["whence_weight"] > 0 for row in found.rows) >= 12
    assert found.settings["shadow"].startswith("15 rows, 3 epochs of batch 4, sgd")
    expected, low, high = found.members
    assert low <= expected <= high and low <= 15 <= high
    assert expected == pytest.approx(float(found.scores.sum()), rel=1e-4)
    odds = found.scores.logit()
    as_high = torch.stack([(found.null >= value).sum() for value in odds])
    torch.testing.assert_close(found.p_values, (1 + as_high) / (1 + len(found.null)), atol=1 / len(found.null), rtol=0)
    assert sum(line["share"] for line in found.mixture) == pytest.approx(1)
    shares = {line["source"]: line["share"] for line in found.mixture}
    assert shares["vowels"] > 0.7, "all members are of this source"
    from whence.corpus.tokens import encode

    tokens = {
        name: [encode(row, byte_tokenizer()).supervised_count for row in ROWS if row["source"] == name]
        for name in shares
    }
    each = {name: sum(own) / len(own) for name, own in tokens.items()}
    rows = {line["source"]: line["tokens"] / each[line["source"]] for line in found.mixture}
    for line in found.mixture:
        assert line["share"] == pytest.approx(rows[line["source"]] / sum(rows.values()), rel=1e-4)
        assert line["tokens_low"] <= line["tokens"] + 1e-9 and line["low"] <= line["high"]
    from whence.recovery import evidence

    monkeypatch.setattr(evidence.Pass, "rows", lambda *given: pytest.fail("all evidence is kept"))
    again = recover(base, final, ROWS, count=15, work=tmp_path / "work", progress=False, **options)
    assert again.rows == found.rows
    assert json.dumps(found.layers)


def test_what_a_short_list_loses_is_told_by_the_shadows_members(base, final, tmp_path):
    options = {"max_tokens": 32, "width": 512, "epochs": 3.0, "batch_size": 4, "optimizer": "sgd", "lr": 0.05}
    found = recover(base, final, ROWS, count=15, work=tmp_path, progress=False, short_list=30, **options)
    note = next(note for note in found.notes if "matched jointly" in note)
    assert note.startswith("Of 60 rows ") and "of the shadow's members such a list held" in note
    assert found.learned.kept > 0.5


def test_other_work_in_the_directory_is_refused(base, final, tmp_path):
    recover(base, final, ROWS, count=5, method="p_min", work=tmp_path, progress=False, max_tokens=32, width=64)
    with pytest.raises(ManifestMismatchError, match="evidence is of another corpus"):
        recover(base, final, ROWS[:-1], count=5, method="p_min", work=tmp_path, progress=False, max_tokens=32, width=64)


def test_mistakes_are_told(base, final, tmp_path):
    with pytest.raises(ModelError, match="nothing to find"):
        recover(base, base, ROWS, count=5, work=tmp_path, progress=False)
    with pytest.raises(SettingError, match="--method nnls ranks rows and draws no line: add --count N"):
        recover(base, final, ROWS, method="nnls", work=tmp_path, progress=False)
    with pytest.raises(UnknownNameError, match="Did you mean row_cosine"):
        recover(base, final, ROWS, method="row_cosin", work=tmp_path, progress=False)
    with pytest.raises(SettingError, match="--points -1"):
        recover(base, final, ROWS, points=-1, work=tmp_path, progress=False)
    nothing = [{"prompt": "a", "completion": None, "id": str(n)} for n in range(3)]
    with pytest.raises(CorpusError, match=r"none could be ranked: 3 of 3 have no `completion`"):
        recover(base, final, nothing, count=1, method="p_min", work=tmp_path / "n", progress=False)


def test_frozen_layers_are_not_scored_silently(base, tmp_path):
    """Only the head was trained: the layers of the blocks have nothing to say, and that is told."""
    loaded = load_model(base)
    head = loaded.base.get_output_embeddings().weight
    if head is loaded.base.get_input_embeddings().weight:
        pytest.skip("this tiny model ties its head")
    head.data.add_(0.01)
    loaded.model.save_pretrained(tmp_path / "final")
    byte_tokenizer().save_pretrained(tmp_path / "final")
    with pytest.raises(ModelError, match=r"none of the traced layers .* differs"):
        recover(base, tmp_path / "final", ROWS, count=2, method="ghost", work=tmp_path / "work", progress=False)
    found = recover(base, tmp_path / "final", ROWS, count=2, method="ghost", layers="lm_head", work=tmp_path / "head",
                    progress=False, width=64)  # fmt: skip
    assert len(found.rows) == 2


# -- calibration and shadows


def table(values, names=None):
    values = torch.as_tensor(values, dtype=torch.float64)
    names = names or tuple(f"f{n}" for n in range(values.shape[1]))
    return Features(names, values, values.isfinite().all(1))


def test_calibration_finds_what_tells_and_its_probabilities_hold():
    rng = torch.Generator().manual_seed(0)
    members = torch.rand(4000, generator=rng) < 0.3
    signal = torch.randn(4000, generator=rng) + 2 * members
    values = torch.stack([3 + 10 * signal, torch.randn(4000, generator=rng)], 1)
    found = calibrate(table(values), members)
    assert abs(float(found.weights[0])) > 10 * abs(float(found.weights[1]))
    odds = found.held_out
    for low, high in ((-2, 0), (0, 2)):
        some = (odds > low) & (odds < high)
        assert float(odds[some].sigmoid().mean()) == pytest.approx(float(members[some].double().mean()), abs=0.05)
    rarer = found.log_odds(table(values), share=0.03)
    assert float((found.log_odds(table(values)) - rarer).mean()) == pytest.approx(2.6, abs=0.1), (
        "ln(.3/.7) - ln(.03/.97)"
    )


def test_probabilities_and_p_values_hold_for_features_that_mostly_are_zero():
    """Parts of a fit: 0 for most rows, more often above it for members. Fitted on one corpus, used on another."""
    rng = torch.Generator().manual_seed(0)

    def drawn(n):
        members = torch.rand(n, generator=rng) < 0.05
        part = torch.rand(n, generator=rng) * (torch.rand(n, generator=rng) < torch.where(members, 0.9, 0.1))
        part = part * torch.where(members, 3.0, 1.0)
        return members, table(torch.stack([part, torch.randn(n, generator=rng)], 1))

    known, own = drawn(10_000)
    found = calibrate(own, known)
    members, other = drawn(10_000)
    odds = found.log_odds(other)
    assert float(odds.sigmoid().sum()) == pytest.approx(int(members.sum()), rel=0.15)
    level = found.held_out[~known].quantile(0.99)
    assert float((odds[~members] >= level).double().mean()) == pytest.approx(0.01, abs=0.005)


def test_features_are_standardised_in_units_that_outliers_do_not_move():
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0], [1e9], [torch.nan]])
    found = table(values).standard()[:, 0]
    assert found[4] == 8 and found[5] == 0 and found[2] == 0
    assert float(found[3]) == pytest.approx(1 / 1.4826)


def test_calibration_refuses_what_it_cannot_do():
    values = torch.randn(40, 2)
    with pytest.raises(SettingError, match="known members: 3, others: 37"):
        calibrate(table(values), torch.arange(40) < 3)
    found = calibrate(table(values), torch.arange(40) < 15)
    with pytest.raises(SettingError, match="are not those calibrated"):
        found.log_odds(table(values, ("x", "y")))


def test_shadow_rows_are_a_seeded_part_of_the_corpus():
    members, chosen = shadow_split(100, 20, 0)
    assert len(members) == 20 and {*members} <= {*chosen} and chosen == list(range(100))
    assert shadow_split(100, 20, 0) == (members, chosen) != shadow_split(100, 20, 1)
    assert len(shadow_split(100, 90, 0)[0]) == 50, "half of the corpus at most"


@pytest.mark.parametrize("count", [500, 5_000, 9_900, 10_000, 40_000])
def test_a_shadow_is_calibrated_on_as_many_others_at_least(count):
    members, chosen = shadow_split(100_000, count, 0)
    inside = len({*members} & {*chosen})
    assert len(members) == count and len(chosen) == 10_000 and inside == min(count, 5_000)


def test_too_few_rows_for_a_shadow_are_told_before_anything_is_trained(base, final, tmp_path):
    with pytest.raises(SettingError, match=r"of 60 rows a shadow would know 4 .* 10 of each are the least"):
        recover(base, final, ROWS, count=4, work=tmp_path, progress=False, max_tokens=32)
    assert not (tmp_path / "shadow").exists() and not (tmp_path / "evidence").exists()


def test_a_shadow_moves_as_far_and_tells_the_optimizer(base, final, tmp_path):
    """The rate is found by the norm; of the two optimizers the one that the model was trained with is the closer."""
    difference = weight_difference(base, final)
    rows = [ROWS[n] for n in range(1, 60, 4)]
    found = trained_shadow(base, rows, difference, Recipe(rows=15, epochs=3.0, batch_size=4, max_tokens=32), tmp_path)
    assert found.recipe.optimizer == "sgd"
    assert found.norm == pytest.approx(1, abs=0.12)
    assert found.recipe.lr == pytest.approx(0.05, rel=0.5)


def test_epochs_and_batch_are_guessed_by_how_alike_the_differences_are(base, tmp_path):
    """Of four pairs the one that the model was trained with, though the search begins at another."""
    run = train(base, [ROWS[n] for n in MEMBERS], tmp_path / "run", lr=1e-3, **QUICK | {"epochs": 1, "batch_size": 2})
    recipe = Recipe(rows=15, epochs=4.0, batch_size=8, max_tokens=32, optimizer="adamw")
    difference, others = weight_difference(base, str(run)), [ROWS[n] for n in range(1, 60, 4)]
    guessed = trained_shadow(base, others, difference, recipe, tmp_path / "work", epochs=(1.0,), batch_sizes=(2,))
    assert (guessed.recipe.epochs, guessed.recipe.batch_size) == (1, 2)
    assert guessed.recipe.lr == pytest.approx(1e-3, rel=0.3) and guessed.norm == pytest.approx(1, abs=0.12)
    given = trained_shadow(base, others, difference, recipe, tmp_path / "work")
    assert (given.recipe.epochs, given.recipe.batch_size) == (4, 8) and given.distance > 2 * guessed.distance


def test_a_shadow_is_rounded_as_the_model_in_question_was(base, tmp_path):
    """Small moves are lost in 16 bits: a shadow of the same norm in 32 is trained less than half as hard (8.9e-6)."""
    rows, start = [ROWS[n] for n in MEMBERS], tmp_path / "start"
    shutil.copytree(base, start)
    round_stored(str(start), torch.bfloat16)
    run = train(start, rows, tmp_path / "run", lr=2e-5, **QUICK)
    final = local_directory(open_run(str(run)).checkpoints[-1].path)
    exact = {name: tensor.clone() for name, tensor in load_file(f"{final}/model.safetensors").items()}
    round_stored(final, torch.bfloat16)
    assert stored_dtype(final) is torch.bfloat16
    for name, tensor in load_file(f"{final}/model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16())
    written = Path(final, "model.safetensors").stat().st_mtime_ns
    round_stored(final, torch.bfloat16)
    assert Path(final, "model.safetensors").stat().st_mtime_ns == written, "there was nothing to do"
    others = [ROWS[n] for n in range(1, 60, 4)]
    recipe = Recipe(rows=15, epochs=3.0, batch_size=4, max_tokens=32, optimizer="adamw", stored=torch.bfloat16)
    difference = weight_difference(start, final)
    found = trained_shadow(str(start), others, difference, recipe, tmp_path / "shadow")
    unrounded = trained_shadow(
        str(start), others, difference, replace(recipe, stored=torch.float32), tmp_path / "other"
    )
    assert stored_dtype(local_directory(open_run(found.path).checkpoints[-1].path)) is torch.bfloat16
    assert found.recipe.lr == pytest.approx(2e-5, rel=0.2)
    assert unrounded.recipe.lr < 1.5e-5


def test_roundings_do_not_share_a_directory_and_a_lost_move_ends_no_search(base, final, tmp_path):
    """In 16 bits a first try may move nothing; a search goes on from there."""
    rows, difference = [ROWS[n] for n in range(1, 60, 4)], weight_difference(base, final)
    start = tmp_path / "start"
    shutil.copytree(base, start)
    round_stored(str(start), torch.bfloat16)
    recipe = Recipe(rows=15, epochs=1.0, batch_size=4, max_tokens=32, optimizer="sgd", lr=1e-12)
    made = [trained_shadow(str(start), rows, difference, replace(recipe, stored=dtype), tmp_path / "shadow")
            for dtype in (torch.float32, torch.bfloat16, torch.float32)]  # fmt: skip
    assert made[0] == made[2] and made[0].path != made[1].path
    assert (made[1].norm, made[1].distance) == (0.0, math.inf)
    kinds = [stored_dtype(local_directory(open_run(shadow.path).checkpoints[-1].path)) for shadow in made]
    assert kinds == [torch.float32, torch.bfloat16, torch.float32]
    with pytest.raises(ModelError, match="safetensors"):
        torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
        round_stored(str(tmp_path), torch.bfloat16)


def test_signature_and_distance_by_hand():
    found = signature(
        {"b": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "a": torch.full((2, 2), 2.0), "bias": torch.ones(3),
         "frozen": torch.zeros(2, 2)}
    )  # fmt: skip
    assert found == {"a": (4.0, 1.0), "b": (5.0, pytest.approx(7 / 4 / 2.5))}
    other = {"a": (5.0, 1.0), "b": (4.0, 0.7), "frozen": (9.0, 0.5)}
    moved = math.log(5 / 4)  # of either share of the norm
    assert distance(found, other) == pytest.approx((2 * moved**2) ** 0.5), "what was frozen in one says nothing"
    assert distance(found, {"frozen": (9.0, 0.5)}) == math.inf


def test_a_frozen_matrix_does_not_hide_the_optimizer(base, tmp_path):
    """Of a model trained by SGD, one matrix put back where it began."""
    rows = [ROWS[n] for n in MEMBERS]
    run = train(base, rows, tmp_path / "run", optimizer="sgd", lr=0.05, **QUICK)
    own, start = load_model(local_directory(open_run(str(run)).checkpoints[-1].path)), load_model(base)
    names = [name for name, weight in own.model.named_parameters() if weight.dim() == 2]
    frozen = [name for name in names if ".0.mlp." in name]
    for name in frozen:
        own.model.get_parameter(name).data.copy_(start.model.get_parameter(name).data)
    own.model.save_pretrained(tmp_path / "final")
    byte_tokenizer().save_pretrained(tmp_path / "final")
    found = trained_shadow(base, rows, weight_difference(base, tmp_path / "final"),
                           Recipe(rows=15, epochs=3.0, batch_size=4, max_tokens=32), tmp_path / "shadow")  # fmt: skip
    assert found.recipe.optimizer == "sgd" and math.isfinite(found.distance)
    ghost = recover(
        base, tmp_path / "final", ROWS, count=2, method="row_cosine", work=tmp_path / "w", progress=False, width=64
    )
    assert any(f"{len(frozen)} of 14 layers did not move and are left out" in note for note in ghost.notes)


def test_rows_are_labelled_by_the_final_model(base, tmp_path):
    rows = [{"id": row["id"], "text": row["prompt"]} for row in ROWS]
    asked = {"choices": ("a", "b"), "template": "{text}:"}
    part = [{"prompt": f"{row['text']}:", "completion": f" {'ab'[row['text'] < 'e']}"} for row in rows[1::2]]
    final = train(base, part, tmp_path / "run", lr=1e-2, **{**QUICK, "epochs": 12})
    found = recover(base, final, rows, count=15, method="nnls", work=tmp_path / "work", progress=False, max_tokens=32,
                    width=64, **asked)  # fmt: skip
    assert len(found.rows) == 15
    for row in found.rows:
        assert row["completion"] in (" a", " b") and row["prompt"] == f"{row['prompt'][:-1]}:"
        assert 0.5 <= row["whence_label_p"] <= 1
    even = recover(base, final, rows, count=14, method="nnls", work=tmp_path / "work", progress=False, max_tokens=32,
                   width=64, **asked)  # fmt: skip
    own = [row["label"] for row in even.rows]
    possible = min(sum(label == choice for label in even_labels(base, final, rows, asked, tmp_path)) for choice in "ab")
    assert possible >= 7 and own.count("a") == own.count("b") == 7
    assert "every label" in even.settings["chosen"]
    first = recover(base, final, rows, count=14, method="nnls", work=tmp_path / "work", progress=False, max_tokens=32,
                    width=64, balanced=False, **asked)  # fmt: skip
    assert first.numbers == first.scores.argsort(descending=True, stable=True)[:14].tolist() != even.numbers
    assert "chosen" not in first.settings
    with pytest.raises(SettingError, match="need --choices"):
        recover(base, final, rows, count=15, method="nnls", work=tmp_path / "other", template="{text}:")


def even_labels(base, final, rows, asked, tmp_path):
    """The label of every row."""
    everything = recover(base, final, rows, count=60, method="p_min", work=tmp_path / "work", progress=False,
                         max_tokens=32, width=64, **asked)  # fmt: skip
    return [row["label"] for row in everything.rows]


def test_real_checkpoints_are_points_on_the_way(base, tmp_path):
    part = [ROWS[n] for n in MEMBERS]
    run = train(base, part, tmp_path / "run", optimizer="sgd", lr=0.05, **QUICK | {"checkpoints": 3})
    options = {"count": 15, "max_tokens": 32, "width": 64, "progress": False, "checkpoints": "all", "epochs": 3.0,
               "batch_size": 4, "optimizer": "sgd", "lr": 0.05}  # fmt: skip
    found = recover(base, run, ROWS, work=tmp_path / "work", **options)
    names = [file.name for file in (tmp_path / "work" / "evidence").iterdir()]
    assert {"checkpoint-1-of-3", "checkpoint-2-of-3", "final"} <= {*names}
    assert "loss at checkpoint 2 of 3" in found.learned.calibration.names
    assert sum(int(row["id"][1:]) in MEMBERS for row in found.rows) >= 11
    with pytest.raises(SettingError, match="--points and --checkpoints all"):
        recover(base, run, ROWS, work=tmp_path / "other", **options, points=1)


def test_rows_that_the_vocabulary_cannot_spell_are_refused(base, final, tmp_path, monkeypatch):
    from whence.recovery import case

    monkeypatch.setattr(case, "UNKNOWN_TOKEN_SHARE", 0.01)
    loaded = load_model(base)
    assert loaded.tokenizer.unk_token_id is None, "bytes spell anything"
    from transformers import PreTrainedTokenizerBase

    letter = loaded.tokenizer("e")["input_ids"][0]
    monkeypatch.setattr(PreTrainedTokenizerBase, "unk_token_id", property(lambda self: letter), raising=False)
    rows = [{"text": "eeee"}] * 4
    with pytest.raises(SettingError, match=r"of its first tokens are unknown to the tokenizer"):
        recover(base, final, rows, count=2, method="p_min", work=tmp_path, progress=False)


def test_rounds_come_nearer_to_the_final_and_take_off_what_is_no_gradient(base, final, tmp_path):
    options = {"count": 15, "max_tokens": 32, "width": 512, "progress": False, "epochs": 3.0, "batch_size": 4,
               "method": "nnls", "work": tmp_path, "optimizer": "sgd", "lr": 0.05}  # fmt: skip
    plain = recover(base, final, ROWS, **options)
    found = recover(base, final, ROWS, rounds=2, **options)
    told = [note for note in found.notes if note.startswith("Round ")]
    left = [float(note.split("base ends ")[1].split()[0]) for note in told]
    assert told and left == sorted(left, reverse=True) and left[0] < 1
    assert precision(found.scores) >= precision(plain.scores) - 0.07
    assert not torch.equal(found.scores, plain.scores)
    with pytest.raises(SettingError, match="--rounds 1: 0 or more are expected, with --method nnls"):
        recover(base, final, ROWS, rounds=1, **options | {"method": "p_min"})


def test_the_misfit_of_known_rows_is_what_is_taken_off(base, final, tmp_path):
    """With the members known and the same training, T' is the sum of their gradients to the last digit."""
    seen = seen_of(base, final, tmp_path)
    case = open_case(base, final, RecoverSettings(max_tokens=32, width=512))
    from whence.recovery.matching_problem import gram_problem
    from whence.recovery.pursuit import nnls as fitted
    from whence.recovery.relinearisation import _round_of
    from whence.recovery.shadow_model import Shadow

    shadow = Shadow(case.final, Recipe(rows=15), 1.0, 0.0)
    units = torch.nn.functional.normalize(seen.points["final"].vectors(seen.short_list))
    made, target = _round_of(case, shadow, units, torch.tensor(MEMBERS))
    assert made.remaining < 1e-6 and made.cosine == pytest.approx(1, abs=1e-5)
    weights = fitted(gram_problem(units[MEMBERS], seen.sketch)).weights
    torch.testing.assert_close(target, weights @ units[MEMBERS], rtol=1e-3, atol=1e-4 * float(target.abs().max()))


# -- the optimizer's doing, undone


def test_moments_rows_and_decay_change_the_target_and_still_find(base, tmp_path):
    """Adam, with decay: every view of the target finds members, and tells the directory that it is another."""
    part = [ROWS[n] for n in MEMBERS]
    final = train(base, part, tmp_path / "run", lr=3e-3, weight_decay=0.1, **QUICK)
    options = {"count": 15, "method": "row_cosine", "max_tokens": 32, "width": 64, "progress": False}
    scores = {}
    for undo in ("none", "moments", "rows"):
        found = recover(base, final, ROWS, work=tmp_path / undo, undo=undo, **options)
        scores[undo] = found.scores
        assert precision(found.scores) > 0.45, undo
    assert not torch.allclose(scores["none"], scores["moments"], atol=1e-3)
    assert not torch.allclose(scores["rows"], scores["moments"], atol=1e-3)
    removed = recover(base, final, ROWS, work=tmp_path / "decay", remove_decay=True, **options)
    assert not torch.equal(removed.scores, scores["none"]) and precision(removed.scores) > 0.45
    with pytest.raises(ManifestMismatchError, match="another targets"):
        recover(base, final, ROWS, work=tmp_path / "none", undo="rows", **options)


def test_undoing_needs_what_it_undoes_by(base, final, adapter, tmp_path):
    options = {"count": 5, "method": "row_cosine", "work": tmp_path, "progress": False}
    with pytest.raises(SettingError, match="--undo adam: choose one of none, moments, rows"):
        recover(base, final, ROWS, undo="adam", **options)
    with pytest.raises(ModelError, match=r"optimizer.*\. --undo rows and --undo none need no optimizer file\.$"):
        recover(base, final, ROWS, undo="moments", **options)
    with pytest.raises(SettingError, match="--remove-decay: an adapter's B begins at 0"):
        recover(base, adapter, ROWS, remove_decay=True, **options)


def test_products_of_vectors_are_made_once_and_scaled(base, final, tmp_path):
    from whence.recovery.matching_problem import gram_problem

    seen = seen_of(base, final, tmp_path)
    vectors = seen.points["final"].vectors(seen.short_list)
    expected, found = gram_problem(vectors, seen.sketch), seen.gradients()
    scale = float(expected.gram.abs().max())
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(found.linear, expected.linear, rtol=1e-4, atol=1e-6)
    assert found.square == expected.square and seen.units is seen.units
