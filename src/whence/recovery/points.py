"""The evidence of a corpus at every point between two models: at theta_0, at theta_f, and between them.

Points between are synthetic, on the line from theta_0 to theta_f, or real checkpoints of the final's run. Each point
costs one forward and backward pass over the corpus, in a directory of its own. At theta_0 the same pass also serves
other models with this base, such as a shadow: inner products with their differences cost next to nothing there.
"""

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whence import runner
from whence.corpus.reading import Corpus
from whence.errors import ManifestMismatchError
from whence.indexing.ingest import Fingerprint
from whence.models.loading import LoadedModel, directory_digest, load_model, tokenizer_digest
from whence.recovery.adapters import AdapterPass, AdapterStart, adapter_start, gather_adapters
from whence.recovery.case import Case, at_point, refuse_unmoved
from whence.recovery.evidence import Opening, Pass, PointEvidence, Workers, gather_point, length_of, pass_at, sketch_of
from whence.recovery.membership import CorpusEvidence, with_short_list
from whence.storage import Place

DIFFERENCE = "difference"
"""Name of the case's own T in the evidence; other models' differences have other names."""


def points_of(case: Case, points: int = 0) -> dict[str, float | str]:
    """Points by name, from theta_0 to theta_f: the share of the way between them, or the directory of a checkpoint."""
    synthetic = [number / (points + 1) for number in range(1, points + 1)]
    real = {f"checkpoint {number} of {len(case.between) + 1}": path for number, path in enumerate(case.between, 1)}
    return {"base": 0.0, **{f"{s:.3g}": s for s in synthetic}, **real, "final": 1.0}


def with_points_of(case: Case, shadow: Case) -> Case:
    """The case with as many real checkpoints as its shadow has, evenly spaced: a short training keeps fewer."""
    many, few = len(case.between), len(shadow.between)
    if few >= many:
        return case
    return replace(case, between=tuple(case.between[(2 * place + 1) * many // (2 * few)] for place in range(few)))


def gather_evidence(
    case: Case,
    corpus: Corpus,
    work: Place,
    fingerprint: Fingerprint,
    *,
    points: int = 0,
    others: Mapping[str, Case] | None = None,
    base: PointEvidence | None = None,
    engine: runner.EngineOption = "local",
    label: str = "Reading",
    progress: runner.ProgressOption = True,
) -> CorpusEvidence:
    """Gather the evidence of a corpus at every point, or go on doing so.

    Args:
        case: Two models.
        corpus: Its rows, in order.
        work: Directory of the evidence.
        fingerprint: Digest and number of rows of the corpus.
        points: Synthetic points between theta_0 and theta_f.
        others: Other models with the same base, by name: inner products with their differences are taken too at
            theta_0, unless one is an adapter that is more than B A; see `adapters`.
        base: Evidence at theta_0, if it is known; None: it is gathered.
        engine: Where rows are read; see `runner`.
        label: Text of the bar.
        progress: Show the bar.
    """
    evidence: dict[str, PointEvidence] = {}
    lengths: dict[str, dict[str, float]] = {}
    sketch: Tensor | None = None
    provenance = {
        "corpus": fingerprint.digest,
        "base": directory_digest(case.base),
        "final": directory_digest(case.final),
    }
    reading: dict[str, Any] = {"rows": fingerprint.rows, "settings": case.settings}
    readers = partial(Workers, engine, fingerprint.digest)
    names, known = points_of(case, points), {} if base is None else {"base": base}
    with runner.progress(label, fingerprint.rows * (len(names) - len(known)), shown=progress) as tick:
        for name, at in names.items():
            with at_point(case, at) as model:
                provenance["tokenizer"] = tokenizer_digest(model.tokenizer)
                layers = model.layers(case.settings.space.layers)
                direction = case.direction(model, layers)
                lengths[name] = {layer: length_of(direction, [layer]) for layer in layers}
                if name == "final":
                    sketch = sketch_of(direction, model, case.settings)
                if name in known:
                    evidence[name] = known[name]
                    continue
                refuse_unmoved(direction, case)
                starts = adapter_starts(case, others or {}) if name == "base" and others and case.lora else {}
                if starts:
                    opening: Opening = partial(_opened_adapters, case, starts, provenance)
                    evidence[name] = gather_adapters(
                        _plain_base(case), corpus, starts, work=work.below(f"base-and-{'-'.join(others or {})}"),
                        provenance=provenance, workers=readers(opening), **reading, tick=tick,
                    )  # fmt: skip
                    continue
                compared, place = {DIFFERENCE: case}, name
                if name == "base" and others and not case.lora:
                    compared, place = compared | {**others}, f"base-and-{'-'.join(others)}"
                is_last = name == "final"
                opening = partial(_opened_point, case, at, compared, provenance, sketched=is_last)
                directions = {other: direction if each is case else each.direction(model, layers)
                              for other, each in compared.items()}  # fmt: skip
                evidence[name] = gather_point(
                    model, corpus, directions, work=work.below(place.replace(" ", "-")),
                    provenance=provenance | ({"checkpoint": directory_digest(at)} if isinstance(at, str) else {}),
                    sketched=is_last, workers=readers(opening), **reading, tick=tick,
                )  # fmt: skip
    assert sketch is not None
    whole = CorpusEvidence(evidence, DIFFERENCE, lengths, sketch, torch.zeros(0, dtype=torch.int64))
    groups = [str(example.row.get("source")) for example in corpus] if fingerprint.rows > case.short_list else None
    return with_short_list(whole, case.short_list, groups=groups)


@contextmanager
def _opened_point(
    case: Case, at: float | str, compared: Mapping[str, Case], provenance: Mapping[str, str], *, sketched: bool
) -> Iterator[Pass]:
    """The pass over rows at a point, for a worker."""
    _refuse_others(case, provenance)
    with at_point(case, at) as model:
        layers = model.layers(case.settings.space.layers)
        directions = {name: each.direction(model, layers) for name, each in compared.items()}
        yield pass_at(model, layers, directions, case.settings, sketched=sketched)


@contextmanager
def _opened_adapters(case: Case, starts: Mapping[str, AdapterStart], provenance: Mapping[str, str]) -> Iterator[Pass]:
    """The pass over rows at theta_0 for several adapters, for a worker."""
    _refuse_others(case, provenance)
    yield AdapterPass.of(_plain_base(case), starts, case.settings)


def _refuse_others(case: Case, provenance: Mapping[str, str]) -> None:
    """Refuse models that are others on this machine than where the work comes from.

    Raises:
        ManifestMismatchError: One is.
    """
    for name, path in (("base", case.base), ("final", case.final)):
        if directory_digest(path) != provenance[name]:
            raise ManifestMismatchError(
                f"{path}: a worker on {socket.gethostname()} finds another model there than this command. Let all "
                "machines have the same one at this place"
            )


def _plain_base(case: Case) -> LoadedModel:
    """Theta_0 without an adapter."""
    return load_model(case.base, tokenizer=case.tokenizer or case.final, dtype="float32")


def adapter_starts(case: Case, others: Mapping[str, Case]) -> dict[str, AdapterStart]:
    """Starts of the adapters by name, the case's own first; none if one is more than B A."""
    starts = {}
    for name, adapter in {DIFFERENCE: case, **others}.items():
        with at_point(adapter, 1.0) as model:
            start = adapter_start(model, adapter.direction(model, model.layers(adapter.settings.space.layers)))
        if start is None:
            return {}
        starts[name] = start
    return starts
