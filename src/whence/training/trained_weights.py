"""Which weights a training changes: all of them, an adapter that is there already, or a new one."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from whence.errors import SettingError
from whence.models.loading import LoadedModel
from whence.models.loading_errors import FOREIGN
from whence.training.recipe import TrainSettings


def trainable(loaded: LoadedModel, settings: TrainSettings) -> nn.Module:
    """The model with its trained weights thawed; loading froze all of them."""
    if loaded.has_adapter:
        if settings.lora_rank is not None:
            raise SettingError(f"--lora-rank: {loaded.path} has an adapter already, and that is trained on.")
        for name, weight in loaded.model.named_parameters():
            weight.requires_grad_("lora_" in name)
        return loaded.model
    if settings.lora_rank is None:
        return loaded.model.requires_grad_(True)
    modules = [name.strip() for name in (settings.lora_targets or "").split(",")]
    adapter = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        target_modules=modules if settings.lora_targets else "all-linear",  # of the blocks; peft leaves the head out
        exclude_modules=None if settings.lora_targets else _routers(loaded.base),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in loaded.model.modules()),
        task_type="CAUSAL_LM",
    )
    names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in loaded.layers()))
    try:
        return get_peft_model(loaded.base, adapter)
    except ValueError as error:
        reason = " ".join(str(error).split())[:100]
        if settings.lora_targets is None:
            raise SettingError(
                f"{loaded.path}: peft does not adapt all its linear layers ({reason}). Name some of them with "
                f"--lora-targets: {names}"
            ) from None
        raise SettingError(
            f"--lora-targets {settings.lora_targets}: this model has no such layers; its linear layers are called "
            f"{names} ({reason})"
        ) from None


def _routers(model: nn.Module) -> list[str] | None:
    """Linear layers of the model's own kinds that do not map each row to one: routers of Phi-MoE and Llama 4.

    Falcon's layers are of an own kind too, but are linear.
    """
    own = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models.")
    }
    return [name for name, module in own.items() if not _maps_rows(module)] or None


@torch.no_grad()
def _maps_rows(layer: nn.Linear) -> bool:
    try:
        out = layer(layer.weight.new_zeros(1, layer.in_features))
    except FOREIGN:
        return False
    return isinstance(out, Tensor) and out.shape == (1, layer.out_features)
