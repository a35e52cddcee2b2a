"""Two models side by side: what differs between them, and a model at any point from theta_0 to theta_f.

A full fine-tune is compared by the linear layers of its blocks. An adapter is compared by its B alone: with B at 0 the
final model is the base, whereas no file says where A began.

A case is refused where its weights say nothing: no traced layer moved, or the vocabulary cannot spell the corpus.
Layers that did not move are left out.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from whence import runner
from whence.brief import brief
from whence.corpus.reading import Corpus
from whence.corpus.tokens import encode
from whence.corpus.unsupervised import refuse_unsupervised
from whence.counts import number_of
from whence.errors import ModelError, SettingError
from whence.gradients.ghost import interpolated
from whence.gradients.space import GradientSpace
from whence.indexing.ingest import Fingerprint
from whence.indexing.vectors import IndexSettings, batch_tokens
from whence.models.difference import WeightDifference, weight_difference
from whence.models.loading import (
    LoadedModel,
    adapter_config,
    load_model,
    load_tokenizer,
    local_directory,
    tokenizer_digest,
)
from whence.models.runs import open_run
from whence.models.training_state import run_notes
from whence.recovery.evidence import LayerDirection, direction_by_layer
from whence.recovery.preconditioner import SAMPLE_ROWS, Scale, scale_of_moments, scale_of_rows, scaled, without_decay
from whence.recovery.pseudo_labels import label_corpus
from whence.recovery.settings import RecoverSettings
from whence.storage import Place

ADAPTER_LAYERS = "*lora_B*"
"""Layers of an adapter that are traced: its B began at 0, its A somewhere unknown."""
UNKNOWN_TOKEN_SHARE = 0.5
"""Share of unknown tokens above which a corpus is not in the model's language."""


@dataclass(frozen=True)
class Case:
    """Two models, and how their rows are read."""

    __repr__ = brief

    base: str
    final: str
    difference: WeightDifference
    settings: IndexSettings
    short_list: int
    """Rows that are matched jointly, at most."""
    lora: Mapping[str, Any] | None
    """Settings of `train` for a shadow with the same kind of adapter."""
    removes_decay: bool = False
    """Take off T what weight decay took off the weights."""
    between: tuple[str, ...] = ()
    """Real checkpoints on the way to the final, oldest first."""
    tokenizer: str | None = None
    """Directory of the tokenizer that rows are read with; None: the final's."""
    scale: Scale | None = None
    """Factor by layer that undoes an optimizer's scaling; None: nothing is undone."""
    notes: tuple[str, ...] = ()
    """Limits of the two models that a reader has to know, one sentence each."""

    def direction(self, model: LoadedModel, layers: Mapping[str, nn.Module]) -> LayerDirection:
        """T over some layers, with the optimizer's scaling undone and decay removed as the settings say."""
        direction = direction_by_layer(model, layers, self.difference)
        if self.removes_decay:
            start = {name: self.difference.base_weight(name) for name in self.difference}
            direction, _ = without_decay(direction, direction_by_layer(model, layers, start))
        return direction if self.scale is None else scaled(direction, self.scale)


def open_case(base: str, final: str, settings: RecoverSettings) -> Case:
    """Compare two models.

    Raises:
        ModelError: They cannot be compared, or are the same.
    """
    start = local_directory(open_run(base).checkpoints[-1].path)
    *between, end = (
        local_directory(checkpoint.path) for checkpoint in open_run(final, which=settings.checkpoints).checkpoints
    )
    difference = weight_difference(start, end)
    config = adapter_config(end)
    lora = None
    if config is not None:
        if config.get("modules_to_save"):
            names = ", ".join(config["modules_to_save"])
            raise ModelError(
                f"{end}: whole layers were trained beside its adapter ({names}), and where those began is not on file. "
                "Give the merged model: PeftModel.merge_and_unload() and save_pretrained()."
            )
        modules = config["target_modules"] or ()
        lora = {
            "lora_rank": config["r"],
            "lora_alpha": config["lora_alpha"],
            "lora_targets": modules if isinstance(modules, str) else ",".join(sorted(modules)),
        }
    space = GradientSpace(
        projection="count_sketch",
        width=settings.width,
        layers=settings.layers or (ADAPTER_LAYERS if lora else None),
        seed=settings.seed,
    )
    index_settings = IndexSettings(
        space=space, max_tokens=settings.max_tokens, tokens_per_batch=settings.tokens_per_batch
    )
    if lora and settings.rounds:
        raise SettingError("--rounds: an adapter's trainings begin at another A each, and cannot be compared")
    if lora and settings.remove_decay:
        raise SettingError("--remove-decay: an adapter's B begins at 0: decay cannot be told from its gradients")
    notes = tuple(note for path in (base, final) for note in run_notes(path))
    return Case(start, end, difference, index_settings, settings.short_list, lora, settings.remove_decay,
                tuple(between), settings.tokenizer, notes=notes)  # fmt: skip


@contextmanager
def at_point(case: Case, at: float | str) -> Iterator[LoadedModel]:
    """The model at theta_0 + s (theta_f - theta_0), or at a checkpoint; an adapter is the base with B times s."""
    tokenizer = case.tokenizer or case.final  # one for all points: the same row is to be the same tokens
    if isinstance(at, str):
        yield load_model(at, tokenizer=tokenizer, dtype=None if case.lora else "float32")
    elif case.lora is not None:
        model = load_model(case.final, tokenizer=tokenizer)
        for name, weight in model.model.named_parameters():
            if "lora_B" in name:
                weight.data.mul_(at)
        yield model
    elif at in (0.0, 1.0):
        yield load_model(case.final if at else case.base, tokenizer=tokenizer, dtype="float32")
    else:
        start, end = (load_model(path, tokenizer=tokenizer) for path in (case.base, case.final))
        with interpolated(start, end, at) as model:
            yield model


def with_scale(case: Case, undo: str, corpus: Corpus, rows: int) -> Case:
    """The case with an optimizer's scaling undone on its T.

    Args:
        case: Two models.
        undo: One of `settings.UNDO`.
        corpus: The corpus whose rows the estimate is from.
        rows: Number of its rows.

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
        every = max(1, rows // SAMPLE_ROWS)
        sample = itertools.islice((example.row for example in corpus), 0, every * SAMPLE_ROWS, every)
        encoded = [encode(row, model.tokenizer, case.settings.max_tokens) for row in sample]
        scale = scale_of_rows(model, layers, encoded, tokens_per_batch=batch_tokens(case.settings, model.device))
        return replace(case, scale=scale)


def foreign_tokenizer(case: Case) -> str | None:
    """Directory of the rows' tokenizer if it differs from the base's, for a shadow to be trained with; else None."""
    path = case.tokenizer or case.final
    of_rows, of_base = (load_tokenizer(place, case.base, False) for place in (path, case.base))
    return None if tokenizer_digest(of_rows) == tokenizer_digest(of_base) else path


def labelled(
    case: Case,
    corpus: Corpus,
    work: Place,
    fingerprint: Fingerprint,
    settings: RecoverSettings,
    *,
    progress: runner.ProgressOption = True,
) -> Corpus:
    """The corpus with the labels that theta_f gives it, or as it is where there are no choices."""
    if not settings.choices:
        return corpus
    with runner.progress("Labelling", fingerprint.rows, shown=progress) as tick, at_point(case, 1.0) as model:
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


def only_moved(case: Case) -> tuple[Case, str | None]:
    """The case with only those layers that differ between the models, and a note of how many do not.

    A frozen layer has gradients too, which say nothing of the training.
    """
    with at_point(case, 1.0) as model:
        direction = direction_by_layer(model, model.layers(case.settings.space.layers), case.difference)
    moved = [layer for layer, matrix in direction.items() if matrix.any()]
    if case.settings.space.layers not in (None, ADAPTER_LAYERS) or len(moved) in (0, len(direction)):
        return case, None
    space = replace(case.settings.space, layers=",".join(moved))
    unmoved = f"{len(direction) - len(moved)} of {number_of(len(direction), 'layer')} did not move and are left out"
    note = f"{unmoved} (frozen, or all changes rounded away)."
    return replace(case, settings=replace(case.settings, space=space)), note


def refuse_uninformative(case: Case, corpus: Corpus) -> None:
    """Refuse, before anything is gathered, layers that did not move and rows that the vocabulary cannot spell.

    Raises:
        ModelError: None of the traced layers moved.
        CorpusError: No row has a supervised token.
        SettingError: More than half of the first rows' tokens are unknown to the tokenizer.
    """
    with at_point(case, 1.0) as model:
        refuse_unmoved(direction_by_layer(model, model.layers(case.settings.space.layers), case.difference), case)
        refuse_unsupervised(corpus, model.tokenizer, case.settings.max_tokens)
        unknown = getattr(model.tokenizer, "unk_token_id", None)
        if unknown is None or unknown == model.tokenizer.eos_token_id:  # GPT-2's is its end of text
            return
        first = (example.row for example in itertools.islice(corpus, SAMPLE_ROWS))
        ids = [token for row in first for token in encode(row, model.tokenizer, case.settings.max_tokens).ids]
        if ids and ids.count(unknown) > UNKNOWN_TOKEN_SHARE * len(ids):
            share = ids.count(unknown) / len(ids)
            raise SettingError(
                f"{corpus.name}: {share:.0%} of its first tokens are unknown to the tokenizer of {case.final}: rows in "
                "the model's own language or code are expected"
            )


def refuse_unmoved(direction: LayerDirection, case: Case) -> None:
    """Refuse layers that did not move: all their scores would be 0.

    Raises:
        ModelError: None of the traced layers moved.
    """
    if not any(matrix.any() for matrix in direction.values()):
        moved = ", ".join(layer.name for layer in case.difference.layers()[:3]) or "none"
        raise ModelError(
            f"{case.final}: none of the traced layers ({len(direction)}) differs from {case.base}; what moved is "
            f"{moved}. Choose layers that moved with --layers."
        )
