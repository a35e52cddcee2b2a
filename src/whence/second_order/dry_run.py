"""What a measurement of curvature would take, from both of its passes over a sample of the rows. Nothing is written.

Time follows from the sampled rows' share of the tokens, that of the eigenbases from one decomposition and the cube of a
layer's sides. Sizes of matrices follow from the layers' shapes: where they do not fit, nothing is piloted, and the plan
names the layers to leave out.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from whence.counts import number_of
from whence.indexing.memory import forget_peak, peak_resident, resident
from whence.indexing.memory_bound import ROOM
from whence.indexing.opening import Index
from whence.indexing.pilot import spread
from whence.indexing.planning import DISK, MEMORY, Phase, Plan, free_disk, free_memory
from whence.models.load_options import IndexLoading
from whence.models.loading import layer_shape
from whence.second_order.eigen import LayerCurvature, ekfac_sums
from whence.second_order.factors import kfac_factors
from whence.second_order.pipeline import ROWS_AT_ONCE, Subject
from whence.second_order.store import DOCUMENT, Description, check_same, kind_of, read_description
from whence.storage import Place

SAMPLE = 64
"""Rows of the pilot, at most."""
DECOMPOSED = 512
"""Largest side of the matrix that is decomposed to measure how long that takes."""


def plan_curvature(
    index: str | Path | Index,
    out: str | Path = "CURVATURE",
    *,
    kind: str = "ekfac",
    rows: int | None = None,
    layers: str | None = None,
    empirical: bool = False,
    seed: int = 0,
    restart: bool = False,
    **loading: Unpack[IndexLoading],
) -> Plan:
    """What `pipeline.curvature` would take with these arguments; what is done in `out` is not counted.

    Raises:
        MissingIndexError: See there, as all others.
    """
    start = time.perf_counter()
    subject = Subject.of(index, rows=rows, layers=layers, seed=seed, **loading)
    measured = subject.measured(kind_of(kind), empirical=empirical, seed=seed)
    place = Place.at(out)
    begun = None if restart or not place.exists(DOCUMENT) else read_description(place)
    if begun is not None:
        check_same(begun.measured, measured, place.root)
    sizes = Sizes.of(subject.layers)
    began = time.perf_counter() - start
    left, notes = _left(begun, len(subject.numbers))
    on_gpu = subject.model.device.type == "cuda"
    free = _free(subject.model.device) if on_gpu else free_memory()
    held = resident() if not on_gpu else torch.cuda.memory_reserved(subject.model.device)
    seconds, peak = (0.0, 0.0), held + sizes.most(has_eigenvalues=kind == "ekfac")
    if free is None or peak + ROOM < free:
        seconds, passes = _piloted(subject, empirical=empirical, seed=seed, has_eigenvalues=kind == "ekfac")
        peak = max(peak, passes + sizes.most(has_eigenvalues=kind == "ekfac") - sizes.of_pilot(kind == "ekfac"))
    else:
        notes = (*notes, "Time was not measured: the matrices alone are more than there is room for.")
    phases = [
        Phase("checking and loading", began),
        Phase("first pass", seconds[0] * left[0], number_of(round(left[0] * len(subject.numbers)), "row")),
        Phase("decompositions", sizes.cubes * _seconds_of_decomposing(subject.model.device) * (left[0] > 0)),
    ]
    disk = {"eigenbases": 4 * (sizes.squares + sizes.weights)}
    if left[1]:  # beside the eigenbases, or an older writing beside a newer one
        disk["unfinished sums, meanwhile"] = 4 * max(sizes.squares - sizes.weights * (kind == "ekfac"), sizes.weights)
    if kind == "ekfac":
        phases.append(
            Phase("second pass", seconds[1] * left[1], number_of(round(left[1] * len(subject.numbers)), "row"))
        )
        disk["eigenvalues"] = 4 * sizes.weights
    memory = peak + ROOM
    return Plan(
        verb="curvature",
        about=f"{'EK-FAC' if kind == 'ekfac' else 'K-FAC'} of {number_of(len(subject.numbers), 'row')} and "
        f"{number_of(len(subject.layers), 'layer')}",
        phases=tuple(phases),
        disk=disk,
        memory=memory,
        free_disk=free_disk(out),
        free_memory=free,
        on_gpu=on_gpu,
        remedies={DISK: ("-o", "ANOTHER_DISK/CURVATURE"), MEMORY: _fewer_layers(subject.layers, memory, free)},
        notes=notes,
    )


@dataclass(frozen=True)
class Sizes:
    """Numbers of matrices' entries, over all layers."""

    squares: int
    """i^2 + o^2: of factors, and of eigenbases."""
    weights: int
    """o i: of eigenvalues."""
    cubes: int
    """i^3 + o^3: what decomposing costs."""

    def most(self, *, has_eigenvalues: bool) -> int:
        """Bytes of matrices that are held at once, at most: sums beside those of a piece, or bases beside sums."""
        stages = [2 * self.squares, 2 * self.squares + self.weights]
        if has_eigenvalues:
            stages.append(self.squares + 3 * self.weights)
        return 4 * max(stages)

    def of_pilot(self, has_eigenvalues: bool) -> int:
        """Bytes of those that the pilot holds."""
        return 4 * (self.squares + (2 * self.weights if has_eigenvalues else 0))

    @staticmethod
    def of(layers: Mapping[str, nn.Module]) -> "Sizes":
        """Of some layers."""
        shapes = [layer_shape(layer) for layer in layers.values()]
        return Sizes(
            sum(o * o + i * i for o, i in shapes), sum(o * i for o, i in shapes), sum(o**3 + i**3 for o, i in shapes)
        )


def _left(begun: Description | None, rows: int) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Shares of both passes that are still to do, and a sentence where some is done."""
    if begun is None:
        return (1.0, 1.0), ()
    rest = 1 - begun.done / rows
    left = {"factors": (rest, 1.0), "eigenvalues": (0.0, rest), "complete": (0.0, 0.0)}[begun.stage]
    return left, (f"A measurement was begun there ({begun.stage}, {begun.done:,} of {rows:,} rows): this is the rest.",)


def _piloted(subject: Subject, *, empirical: bool, seed: int, has_eigenvalues: bool) -> tuple[tuple[float, float], int]:
    """Seconds of both passes over all rows, and the peak of the memory in bytes."""
    numbers = subject.numbers
    places = spread([1] * len(numbers), SAMPLE)
    sample = subject.encoded(sorted(numbers[place] for place in places))
    share = _share_of_tokens(subject, places)
    on_gpu, model = subject.model.device.type == "cuda", subject.model
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    else:
        forget_peak()
    how = {"seed": seed, "is_empirical": empirical, "tokens_per_batch": subject.index.tokens_per_batch}
    kfac_factors(model, subject.layers, sample[:8], **how)  # what a first pass prepares
    start = _now(model.device)
    factors = kfac_factors(model, subject.layers, sample, **how)
    first, second = _now(model.device) - start, 0.0
    if has_eigenvalues:
        bases = {}
        for name, layer in factors.items():
            (o, i), device = layer_shape(subject.layers[name]), layer.inputs.device
            bases[name] = LayerCurvature(layer.inputs, layer.slopes, torch.zeros(o, i, device=device))
        start = _now(model.device)
        ekfac_sums(model, subject.layers, bases, sample, **how)
        second = _now(model.device) - start
    peak = torch.cuda.max_memory_reserved(model.device) if on_gpu else peak_resident()
    return (first / share, second / share), peak


def _share_of_tokens(subject: Subject, places: Sequence[int]) -> float:
    """The sampled rows' share of the text of all that are measured."""
    store, lengths = subject.index.store, []
    for first in range(0, len(subject.numbers), ROWS_AT_ONCE):
        rows = store.read_rows(subject.numbers[first : first + ROWS_AT_ONCE])
        lengths += [len(row["row"]) for row in rows]
    return sum(lengths[place] for place in places) / sum(lengths)


def _now(device: torch.device) -> float:
    """The time, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free(device: torch.device) -> int:
    """Bytes of a GPU that this process may take, those that it has included."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _seconds_of_decomposing(device: torch.device) -> float:
    """Of one entry of a matrix' cube."""
    matrix = torch.rand(DECOMPOSED, DECOMPOSED, dtype=torch.float64, device=device)
    torch.linalg.eigh(matrix[:8, :8])  # the solver begins
    start = _now(device)
    torch.linalg.eigh(matrix + matrix.T)
    return (_now(device) - start) / DECOMPOSED**3


def _fewer_layers(layers: Mapping[str, nn.Module], memory: int, free: int | None) -> tuple[str, ...]:
    """The flag that leaves the largest layers out, as many as lack memory; by the last part of their names."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for name, layer in layers.items():
        own = name.partition(".lora_")
        end = own[0].rpartition(".")[2] + (f"*{own[1]}{own[2]}" if own[1] else "")
        groups.setdefault(end, []).append(layer_shape(layer))
    sizes = {end: 8 * sum(o * o + i * i for o, i in shapes) for end, shapes in groups.items()}
    without = []
    for end in sorted(sizes, key=lambda end: -sizes[end])[:-1]:
        if memory <= (free or 0):
            break
        without.append(f"!*{end}")
        memory -= sizes[end]
    return ("--layers", ",".join(without)) if without else ("--rows", "1000")
