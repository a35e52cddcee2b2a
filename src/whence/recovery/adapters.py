"""Evidence at theta_0 of several adapters at once, in one pass over their base.

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
from whence.recovery.evidence import Evidence, Pass, Target, claim, length_of, streamed
from whence.runner import Tick
from whence.storage import Place

INSIDE = ".lora_B."
"""Between the name of an adapted layer and that of the adapter."""


@dataclass(frozen=True)
class Start:
    """An adapter where its B is 0, and what its B is compared with; by name of the layer that is its B."""

    inputs: Mapping[str, Float32[Tensor, "_ _"]]
    """s A, [r i]."""
    target: Mapping[str, Float32[Tensor, "_ _"]]
    """[o r]."""


def start_of(model: LoadedModel, target: Target) -> Start | None:
    """An adapter's A as loaded; None of one that is more than s B A, as with a magnitude (DoRA) or whole layers.

    Args:
        model: With the adapter.
        target: By name of the layers B.
    """
    if any("modules_to_save" in name for name, _ in model.base.named_modules()):
        return None
    inputs = {}
    for layer in target:
        owner, _, adapter = layer.partition(INSIDE)
        module = model.base.get_submodule(owner)
        if not adapter or getattr(module, "use_dora", {}).get(adapter) or len(module.active_adapters) != 1:
            return None
        inputs[layer] = module.lora_A[adapter].weight.detach().float() * module.scaling[adapter]
    return Start(inputs, target)


def gather_adapters(
    base: LoadedModel,
    corpus: Corpus,
    starts: Mapping[str, Start],
    *,
    work: Place,
    settings: IndexSettings,
    told: Mapping[str, Any],
    tick: Tick = lambda examples, tokens: None,
) -> Evidence:
    """Gather a corpus' evidence at theta_0 for several adapters, or go on doing so; see `evidence.gather`.

    Args:
        base: Theta_0, without an adapter.
        corpus: Its rows, in order.
        starts: Adapters by name, all of the same layers.
        work: Directory of the parts.
        settings: Reduction, longest row and batches.
        told: What else decides the evidence.
        tick: Told of rows and tokens done.

    Returns:
        Evidence without vectors: norms are the first adapter's, `norms_of` each one's own.

    Raises:
        ManifestMismatchError: The directory holds other evidence.
        SettingError: Adapters of different layers.
    """
    first = next(iter(starts.values()))
    for name, start in starts.items():
        if {*start.target} != {*first.target}:
            raise SettingError(f"the adapter {name} is of other layers than {next(iter(starts))}")
    kept = {
        **told,
        "space": settings.space.as_json(),
        "max_tokens": settings.max_tokens,
        "layers": list(first.target),
        "targets": {name: round(length_of(start.target, start.target), 6) for name, start in starts.items()},
        "inputs": {name: round(length_of(start.inputs, start.inputs), 6) for name, start in starts.items()},
    }
    claim(work, kept)
    _, joined = streamed(_AdapterPass.of(base, starts, settings), corpus, work, tick)
    norms = {name: joined[f"norm {name}"] for name in starts}
    return Evidence(
        place=work,
        parts=(),
        layers=tuple(first.target),
        width=0,
        loss=joined["loss"],
        norms=next(iter(norms.values())),
        tokens=joined["tokens"].long(),
        dots={name: joined[f"dot {name}"] for name in starts},
        norms_of=norms,
    )


@dataclass
class _AdapterPass(Pass):
    """A pass over the base that reads its layers as adapters would."""

    starts: Mapping[str, Start]

    @classmethod
    def of(cls, base: LoadedModel, starts: Mapping[str, Start], settings: IndexSettings) -> "_AdapterPass":
        """Over the layers that are adapted."""
        layers = {
            layer: base.base.get_submodule(layer.partition(INSIDE)[0]) for layer in next(iter(starts.values())).target
        }
        return cls(base, layers, {}, None, settings, starts)

    def __post_init__(self):
        super().__post_init__()
        device = self.model.device
        self.inputs = {name: {layer: part.to(device) for layer, part in start.inputs.items()}
                       for name, start in self.starts.items()}  # fmt: skip
        self.placed = {name: {layer: part.to(device) for layer, part in start.target.items()}
                       for name, start in self.starts.items()}  # fmt: skip

    def empty(self, n: int) -> dict[str, Tensor]:
        """By adapter."""
        kinds = [f"{kind} {name}" for kind in ("square", "dot") for name in self.starts]
        return {kind: torch.zeros(len(self.layers), n) for kind in kinds}

    def take(self, seen: Captured) -> None:
        """One layer's share of a batch, read for every adapter."""
        rows, number = self.now if seen.rows is None else self.now[seen.rows.cpu()], self.numbers[seen.layer]
        for name, inputs in self.inputs.items():
            formed = example_gradients(seen.a @ inputs[seen.layer].T, seen.g)
            dots = formed.flatten(1) @ self.placed[name][seen.layer].flatten()
            self.found[f"square {name}"][number].index_add_(0, rows, formed.square().sum((1, 2)).cpu())
            self.found[f"dot {name}"][number].index_add_(0, rows, dots.cpu())
