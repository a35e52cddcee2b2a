"""Two models side by side: what differs, and the evidence of a corpus at theta_0, at theta_f and between them.

A full fine-tune is looked into by the layers of the blocks. Of an adapter, theta_0 is the final model with its B at 0,
which is the base, and the layers are the B alone: where A began is on no file.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from whence.catalogue import recover_method
from whence.corpus.reading import Corpus
from whence.corpus.tokens import encode
from whence.errors import ModelError, SettingError
from whence.gradients.ghost import interpolated
from whence.gradients.space import GradientSpace
from whence.indexing.ingest import Fingerprint
from whence.indexing.vectors import IndexSettings, batch_tokens
from whence.models.difference import WeightDifference, weight_difference
from whence.models.loading import (
    LoadedModel,
    adapter_config,
    directory_digest,
    load_model,
    load_tokenizer,
    located,
    tokenizer_digest,
)
from whence.models.runs import open_run
from whence.recovery.adapters import Start, gather_adapters, start_of
from whence.recovery.evidence import Evidence, Target, gather, length_of, sketch_of, targets_by_layer
from whence.recovery.membership import Seen, with_short_list
from whence.recovery.preconditioner import SAMPLE, UNDO, Scale, scale_of_moments, scale_of_rows, scaled, without_decay
from whence.recovery.pseudo_labels import Labels, label_corpus
from whence.runner import progress
from whence.storage import Place

ROUNDED = ("nnls", "matching", "cosine")
"""Methods that match a target, which re-linearising changes."""
TARGET = "difference"
WIDTH = 16_384
"""Numbers of a row's sketch."""
ADAPTER_LAYERS = "*lora_B*"
"""Where an adapter began is known of its B alone: at 0."""


@dataclass(frozen=True, kw_only=True)
class RecoverSettings:
    """How to look."""

    method: str = "calibrated"
    """Name in `catalogue.RECOVER_METHODS`."""
    points: int = 0
    """Synthetic checkpoints on the line between the two models, evenly spaced, beside its ends."""
    checkpoints: str = "last"
    """Of a final that is a Trainer's directory: the "last", or "all", of which the others are points between too."""
    layers: str | None = None
    """Patterns of layer names; None: all linear layers but the head, or an adapter's B."""
    tokenizer: str | None = None
    """Where to find the tokenizer, and the chat template, that rows are read with at every point and by the shadow;
    None: the final's."""
    max_tokens: int | None = None
    tokens_per_batch: int = 4096
    width: int = WIDTH
    """Of the sketches that rows are matched by jointly."""
    short_list: int = 12_000
    """Rows that are matched jointly, at most: their inner products with each other are held, 576 MB. Others are judged
    by their own evidence alone."""
    optimizer: str | None = None
    """That the model was trained with, "adamw" or "sgd"; None: guessed. For the shadow."""
    epochs: float = 2.0
    """Passes over its rows. For the shadow."""
    lr: float | None = None
    """Peak learning rate; None: the one that moves the weights as far. For the shadow."""
    batch_size: int = 16
    """Rows of a step. For the shadow."""
    undo: str = "none"
    """What of an optimizer is undone on the target: "none", "moments" by the final's own optimizer file, or "rows" by
    an estimate from the corpus; see `targets`."""
    remove_decay: bool = False
    """Take off the target what weight decay took off the weights."""
    choices: tuple[str, ...] = ()
    """Labels by which theta_f labels the rows, for a model that was trained to classify; none: rows as they are."""
    template: str = "{text}"
    """Prompt that a row's text is put into, where there are choices."""
    labels: str = "hard"
    """Which choice a row gets, see `labelling`."""
    balanced: bool | None = None
    """Choose as many rows of every label, as far as there are, where there are choices. None: where a count is asked
    for too, since a model trained on the chosen rows then comes closer to theta_f."""
    rounds: int = 0
    """Of re-linearising, at most, for the methods of `ROUNDED`."""
    mixture: str | None = None
    """How shares of sources are estimated: by "gradients", their means; by "runs", models trained on each source; or
    "none". None: by runs where a shadow is trained, so that the recipe is known, and sources are 2 to
    `source_runs.MOST`; else by gradients."""
    seed: int = 0

    def __post_init__(self):
        recover_method(self.method)
        if self.choices:
            self.labelling()
        elif (self.template, self.labels) != ("{text}", "hard") or self.balanced:
            raise SettingError("--template, --labels and --balanced need --choices, the labels that the model answers")
        if self.short_list < 2:
            raise SettingError(f"--short-list {self.short_list}: 2 or more are expected")
        if self.mixture not in (None, "gradients", "runs", "none"):
            raise SettingError(f"--mixture {self.mixture}: choose one of gradients, runs, none")
        if self.mixture == "runs" and self.method != "calibrated":
            raise SettingError("--mixture runs needs --method calibrated, whose shadow tells the recipe")
        if self.undo not in UNDO:
            raise SettingError(f"--undo {self.undo}: choose one of {', '.join(UNDO)}")
        if self.points < 0:
            raise SettingError(f"--points {self.points}: 0 or more are expected")
        if self.rounds < 0 or (self.rounds and self.method not in ROUNDED):
            raise SettingError(
                f"--rounds {self.rounds}: 0 or more are expected, with --method {' or '.join(ROUNDED)}, which match "
                "rows jointly"
            )
        if self.points and self.checkpoints == "all":
            raise SettingError("--points and --checkpoints all: choose one of them, synthetic points or real ones")

    def labelling(self) -> Labels:
        """How rows are labelled."""
        return Labels(choices=tuple(self.choices), template=self.template, how=self.labels)


@dataclass(frozen=True)
class Case:
    """Two models, and how their rows are read."""

    base: str
    final: str
    difference: WeightDifference
    settings: IndexSettings
    short_list: int
    """Rows that are matched jointly, at most."""
    lora: Mapping[str, Any] | None
    """Settings of `train` for a shadow with the same kind of adapter."""
    removes_decay: bool = False
    between: tuple[str, ...] = ()
    """Real checkpoints on the way to the final, oldest first."""
    tokenizer: str | None = None
    """Of the final, where its own directory's is not to be taken."""
    scale: Scale | None = None
    """That undoes an optimizer's; None: none is undone."""

    def target(self, model: LoadedModel, layers: Mapping[str, nn.Module]) -> Target:
        """T of some layers, as the optimizer's doing is undone on it."""
        target = targets_by_layer(model, layers, self.difference)
        if self.removes_decay:
            start = {name: self.difference.base_weight(name) for name in self.difference}
            target, _ = without_decay(target, targets_by_layer(model, layers, start))
        return target if self.scale is None else scaled(target, self.scale)


def open_case(base: str, final: str, settings: RecoverSettings) -> Case:
    """Compare two models.

    Raises:
        ModelError: They cannot be compared, or are the same.
    """
    start = located(open_run(base).checkpoints[-1].path)
    *between, end = (located(found.path) for found in open_run(final, which=settings.checkpoints).checkpoints)
    difference = weight_difference(start, end)
    config = adapter_config(end)
    lora = None
    if config is not None:
        if config.get("modules_to_save"):
            whole = ", ".join(config["modules_to_save"])
            raise ModelError(
                f"{end}: whole layers were trained beside its adapter ({whole}), and where those began is not on file. "
                "Give the merged model: PeftModel.merge_and_unload() and save_pretrained()."
            )
        targets = config["target_modules"]
        lora = {
            "lora_rank": config["r"],
            "lora_alpha": config["lora_alpha"],
            "lora_targets": targets if isinstance(targets, str) else ",".join(sorted(targets)),
        }
    space = GradientSpace(
        projection="count_sketch",
        width=settings.width,
        layers=settings.layers or (ADAPTER_LAYERS if lora else None),
        seed=settings.seed,
    )
    how = IndexSettings(space=space, max_tokens=settings.max_tokens, tokens_per_batch=settings.tokens_per_batch)
    if lora and settings.rounds:
        raise SettingError("--rounds: an adapter's trainings begin at another A each, and cannot be compared")
    if lora and settings.remove_decay:
        raise SettingError("--remove-decay: an adapter's B begins at 0: decay cannot be told from its gradients")
    return Case(start, end, difference, how, settings.short_list, lora, settings.remove_decay, tuple(between),
                settings.tokenizer)  # fmt: skip


def with_scale(case: Case, undo: str, corpus: Corpus, rows: int) -> Case:
    """The same with an optimizer's scaling undone on its target.

    Args:
        case: Two models.
        undo: Of `targets.UNDO`.
        corpus: Whose rows the estimate is from.
        rows: Their number.

    Raises:
        ModelError: The final has no optimizer file, for "moments".
        SettingError: No row is supervised, for "rows".
    """
    if undo == "none":
        return case
    with at_point(case, 1.0) as model:
        layers = model.layers(case.settings.space.layers)
        if undo == "moments":
            return replace(case, scale=scale_of_moments(model, layers))
        every = max(1, rows // SAMPLE)
        some = itertools.islice((example.row for example in corpus), 0, every * SAMPLE, every)
        encoded = [encode(row, model.tokenizer, case.settings.max_tokens) for row in some]
        scale = scale_of_rows(model, layers, encoded, tokens_per_batch=batch_tokens(case.settings, model.device))
        return replace(case, scale=scale)


def points_of(case: Case, points: int = 0) -> dict[str, float | str]:
    """Points by name, from theta_0 to theta_f: how far from the one to the other, or the directory of a checkpoint."""
    synthetic = [number / (points + 1) for number in range(1, points + 1)]
    real = {f"checkpoint {number} of {len(case.between) + 1}": path for number, path in enumerate(case.between, 1)}
    return {"base": 0.0, **{f"{s:.3g}": s for s in synthetic}, **real, "final": 1.0}


@contextmanager
def at_point(case: Case, at: float | str) -> Iterator[LoadedModel]:
    """The model at theta_0 + s (theta_f - theta_0), or at a checkpoint. Of an adapter, the base with B at s times its
    value.
    """
    words = case.tokenizer or case.final  # one for all points: the same row is to be the same tokens
    if isinstance(at, str):
        yield load_model(at, tokenizer=words, dtype=None if case.lora else "float32")
    elif case.lora is not None:
        model = load_model(case.final, tokenizer=words)
        for name, weight in model.model.named_parameters():
            if "lora_B" in name:
                weight.data.mul_(at)
        yield model
    elif at in (0.0, 1.0):
        yield load_model(case.final if at else case.base, tokenizer=words, dtype="float32")
    else:
        start, end = (load_model(path, tokenizer=words) for path in (case.base, case.final))
        with interpolated(start, end, at) as model:
            yield model


def foreign_tokenizer(case: Case) -> str | None:
    """Where the rows' tokenizer is, if it is another than the base's: a shadow is to be trained with it."""
    words = case.tokenizer or case.final
    own, base = (load_tokenizer(path, case.base, False) for path in (words, case.base))
    return None if tokenizer_digest(own) == tokenizer_digest(base) else words


def with_points_of(case: Case, shadow: Case) -> Case:
    """The same with as many real checkpoints as its shadow has, evenly spaced: a short training keeps fewer."""
    many, few = len(case.between), len(shadow.between)
    if few >= many:
        return case
    return replace(case, between=tuple(case.between[(2 * place + 1) * many // (2 * few)] for place in range(few)))


def labelled(
    case: Case, corpus: Corpus, work: Place, fingerprint: Fingerprint, settings: RecoverSettings, *, shown: bool = True
) -> Corpus:
    """A corpus with the labels that theta_f gives, or as it is where there are no choices."""
    if not settings.choices:
        return corpus
    with progress("Labelling", fingerprint.rows, shown=shown) as tick, at_point(case, 1.0) as model:
        return label_corpus(
            model,
            corpus,
            settings.labelling(),
            work,
            digest=fingerprint.digest,
            max_tokens=settings.max_tokens,
            tokens_per_batch=settings.tokens_per_batch,
            seed=settings.seed,
            tick=tick,
        )


def see(
    case: Case,
    corpus: Corpus,
    work: Place,
    fingerprint: Fingerprint,
    *,
    points: int = 0,
    others: Mapping[str, Case] | None = None,
    base: Evidence | None = None,
    label: str = "Reading",
    shown: bool = True,
) -> Seen:
    """Gather the evidence of a corpus at every point, or go on doing so.

    Args:
        case: Two models.
        corpus: Its rows, in order.
        work: Directory of the evidence.
        fingerprint: Of the corpus.
        points: Between theta_0 and theta_f.
        others: Other models from the same base, by name: inner products with their targets are taken too at theta_0,
            where they cost next to nothing. Of adapters too, unless one is more than B A; see `adapted`.
        base: Evidence at theta_0, where it is known; None: gathered.
        label: Of the bar.
        shown: Show it.
    """
    found: dict[str, Evidence] = {}
    lengths: dict[str, dict[str, float]] = {}
    sketch: Tensor | None = None
    told = {"corpus": fingerprint.digest, "base": directory_digest(case.base), "final": directory_digest(case.final)}
    names, known = points_of(case, points), {} if base is None else {"base": base}
    with progress(label, fingerprint.rows * (len(names) - len(known)), shown=shown) as tick:
        for name, at in names.items():
            with at_point(case, at) as model:
                told["tokenizer"] = tokenizer_digest(model.tokenizer)
                layers = model.layers(case.settings.space.layers)
                target = case.target(model, layers)
                lengths[name] = {layer: length_of(target, [layer]) for layer in layers}
                if name == "final":
                    sketch = sketch_of(target, model, case.settings)
                if name in known:
                    found[name] = known[name]
                    continue
                refuse_silence(target, case)
                starts = starts_of(case, others or {}) if name == "base" and others and case.lora else {}
                if starts:
                    found[name] = gather_adapters(
                        load_model(case.base, tokenizer=case.tokenizer or case.final, dtype="float32"),
                        corpus,
                        starts,
                        work=Place(work.fs, f"{work.root}/base-and-{'-'.join(others or {})}"),
                        settings=case.settings,
                        told=told,
                        tick=tick,
                    )
                    continue
                targets, place = {TARGET: target}, name
                if name == "base" and others and not case.lora:
                    targets |= {other: own.target(model, layers) for other, own in others.items()}
                    place = f"base-and-{'-'.join(others)}"
                found[name] = gather(
                    model,
                    corpus,
                    targets,
                    work=Place(work.fs, f"{work.root}/{place.replace(' ', '-')}"),
                    settings=case.settings,
                    told=told | ({"checkpoint": directory_digest(at)} if isinstance(at, str) else {}),
                    sketched=name == "final",
                    tick=tick,
                )
    assert sketch is not None
    seen = Seen(found, TARGET, lengths, sketch, torch.zeros(0, dtype=torch.int64))
    groups = [str(example.row.get("source")) for example in corpus] if fingerprint.rows > case.short_list else None
    return with_short_list(seen, case.short_list, groups=groups)


def starts_of(case: Case, others: Mapping[str, Case]) -> dict[str, Start]:
    """Adapters that one pass over the base serves, by name, the case's own first; none where one is more than B A."""
    found = {}
    for name, own in {TARGET: case, **others}.items():
        with at_point(own, 1.0) as model:
            start = start_of(model, own.target(model, model.layers(own.settings.space.layers)))
        if start is None:
            return {}
        found[name] = start
    return found


UNKNOWN = 0.5
"""Share of unknown tokens from which on a corpus is not in the model's language."""


def only_moved(case: Case) -> tuple[Case, str | None]:
    """The same with those layers alone that differ between the models, and a note of how many do not.

    A frozen layer has gradients too, which say nothing of the training.
    """
    with at_point(case, 1.0) as model:
        target = targets_by_layer(model, model.layers(case.settings.space.layers), case.difference)
    moved = [layer for layer, part in target.items() if part.any()]
    if case.settings.space.layers not in (None, ADAPTER_LAYERS) or len(moved) in (0, len(target)):
        return case, None
    space = replace(case.settings.space, layers=",".join(moved))
    still = f"{len(target) - len(moved)} of {len(target)} layers did not move and are left out"
    note = f"{still} (frozen, or all changes rounded away)."
    return replace(case, settings=replace(case.settings, space=space)), note


def refuse_what_says_nothing(case: Case, corpus: Corpus) -> None:
    """Refuse, before anything is gathered, layers that did not move and rows that the vocabulary cannot spell.

    Raises:
        ModelError: None of the traced layers moved.
        SettingError: More than half of the first rows' tokens are unknown to the tokenizer.
    """
    with at_point(case, 1.0) as model:
        refuse_silence(targets_by_layer(model, model.layers(case.settings.space.layers), case.difference), case)
        unknown = getattr(model.tokenizer, "unk_token_id", None)
        if unknown is None or unknown == model.tokenizer.eos_token_id:  # GPT-2's is its end of text
            return
        first = (example.row for example in itertools.islice(corpus, SAMPLE))
        ids = [token for row in first for token in encode(row, model.tokenizer, case.settings.max_tokens).ids]
        if ids and ids.count(unknown) > UNKNOWN * len(ids):
            share = ids.count(unknown) / len(ids)
            raise SettingError(
                f"{corpus.name}: {share:.0%} of its first tokens are unknown to the tokenizer of {case.final}: rows in "
                "the model's own language or code are expected"
            )


def refuse_silence(target: Target, case: Case) -> None:
    """Refuse layers that did not move: all their scores would be 0.

    Raises:
        ModelError: None of the traced layers moved.
    """
    if not any(part.any() for part in target.values()):
        moved = ", ".join(layer.name for layer in case.difference.layers()[:3]) or "none"
        raise ModelError(
            f"{case.final}: none of the {len(target)} traced layers differs from {case.base}; what moved is {moved}. "
            "Choose layers that moved with --layers."
        )
