"""Evidence at theta_0 for several adapters at once, in one pass over their base.

An adapter adds s B A to a layer's weight W, and begins at B = 0, where the model is its base whatever A is. With a a
layer's inputs and g the loss gradient at its outputs, the gradient of B there is

    s sum over tokens t of g_t (A a_t)^T                                                                        [o r]

so that a pass that hands over a and g of the base's own layers serves any number of adapters, each with its own A.

Source: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.corpus.reading import Corpus
from whence.errors import SettingError
from whence.gradients.capture import Captured, example_gradients
from whence.indexing.vectors import IndexSettings
from whence.models.loading import LoadedModel
from whence.recovery.evidence import LayerDirection, Pass, PointEvidence, Workers, claim, length_of, streamed
from whence.runner import Tick
from whence.storage import Place

ADAPTER_INFIX = ".lora_B."
"""Stands between the name of an adapted layer and the adapter's in the name of a layer B."""


@dataclass(frozen=True)
class AdapterStart:
    """An adapter where its B is 0, and the direction that the gradient of B is compared with, by name of a layer B."""

    inputs: Mapping[str, Float32[Tensor, "_ _"]]
    """s A, [r i]."""
    direction: Mapping[str, Float32[Tensor, "_ _"]]
    """T of B, [o r]."""


def adapter_start(model: LoadedModel, direction: LayerDirection) -> AdapterStart | None:
    """Start of the adapter that is loaded; None if it is more than s B A: it has magnitudes (DoRA) or whole layers.

    Args:
        model: The model with the adapter.
        direction: T by name of the layers B.
    """
    if any("modules_to_save" in name for name, _ in model.base.named_modules()):
        return None
    inputs = {}
    for layer in direction:
        owner, _, adapter = layer.partition(ADAPTER_INFIX)
        module = model.base.get_submodule(owner)
        if not adapter or getattr(module, "use_dora", {}).get(adapter) or len(module.active_adapters) != 1:
            return None
        inputs[layer] = module.lora_A[adapter].weight.detach().float().cpu() * module.scaling[adapter]
    return AdapterStart(inputs, direction)


def gather_adapters(
    base: LoadedModel,
    corpus: Corpus,
    starts: Mapping[str, AdapterStart],
    *,
    rows: int,
    work: Place,
    settings: IndexSettings,
    provenance: Mapping[str, Any],
    workers: Workers | None = None,
    tick: Tick = lambda examples, tokens: None,
) -> PointEvidence:
    """Gather a corpus' evidence at theta_0 for several adapters, or go on doing so; see `evidence.gather_point`.

    Args:
        base: The model at theta_0, without an adapter.
        corpus: Its rows, in order.
        starts: Adapters by name, all of the same layers.
        rows: How many rows there are.
        work: Directory of the parts.
        settings: Reduction, longest row and batches.
        provenance: What else decides the evidence.
        workers: Processes that gather parts, and how they open the point; None: this process does.
        tick: Called with the rows and tokens that are done.

    Returns:
        Evidence without vectors; `norms` are the first adapter's, `norms_by_direction` each adapter's own.

    Raises:
        ManifestMismatchError: The directory holds other evidence.
        SettingError: Adapters have different layers.
    """
    first = next(iter(starts.values()))
    for name, start in starts.items():
        if {*start.direction} != {*first.direction}:
            raise SettingError(f"the adapter {name} is of other layers than {next(iter(starts))}")
    manifest = {
        **provenance,
        "space": settings.space.as_json(),
        "max_tokens": settings.max_tokens,
        "layers": list(first.direction),
        "targets": {name: round(length_of(start.direction, start.direction), 6) for name, start in starts.items()},
        "inputs": {name: round(length_of(start.inputs, start.inputs), 6) for name, start in starts.items()},
    }
    claim(work, manifest)
    point_pass = AdapterPass.of(base, starts, settings)
    _, columns = streamed(point_pass, corpus, work, rows=rows, workers=workers, tick=tick)
    norms = {name: columns[f"norm {name}"] for name in starts}
    return PointEvidence(
        place=work,
        parts=(),
        layers=tuple(first.direction),
        width=0,
        loss=columns["loss"],
        norms=next(iter(norms.values())),
        tokens=columns["tokens"].long(),
        dots={name: columns[f"dot {name}"] for name in starts},
        norms_by_direction=norms,
    )


@dataclass
class AdapterPass(Pass):
    """A pass over the base that forms the gradients of every adapter's B."""

    starts: Mapping[str, AdapterStart]

    @classmethod
    def of(cls, base: LoadedModel, starts: Mapping[str, AdapterStart], settings: IndexSettings) -> "AdapterPass":
        """A pass over the layers that are adapted."""
        layers = {
            layer: base.base.get_submodule(layer.partition(ADAPTER_INFIX)[0])
            for layer in next(iter(starts.values())).direction
        }
        return cls(base, layers, {}, None, settings, starts)

    def __post_init__(self):
        super().__post_init__()
        device = self.model.device
        self.inputs = {name: {layer: a.to(device) for layer, a in start.inputs.items()}
                       for name, start in self.starts.items()}  # fmt: skip
        self.placed = {name: {layer: matrix.to(device) for layer, matrix in start.direction.items()}
                       for name, start in self.starts.items()}  # fmt: skip

    def empty(self, n: int) -> dict[str, Tensor]:
        """Arrays of `n` rows by adapter."""
        kinds = [f"{kind} {name}" for kind in ("square", "dot") for name in self.starts]
        return {kind: torch.zeros(len(self.layers), n) for kind in kinds}

    def take(self, captured: Captured) -> None:
        """Add one layer of a batch, for every adapter."""
        rows, number = (
            self.batch_rows if captured.rows is None else self.batch_rows[captured.rows.cpu()],
            self.numbers[captured.layer],
        )
        for name, inputs in self.inputs.items():
            formed = example_gradients(captured.a @ inputs[captured.layer].T, captured.g)
            dots = formed.flatten(1) @ self.placed[name][captured.layer].flatten()
            self.arrays[f"square {name}"][number].index_add_(0, rows, formed.square().sum((1, 2)).cpu())
            self.arrays[f"dot {name}"][number].index_add_(0, rows, dots.cpu())
