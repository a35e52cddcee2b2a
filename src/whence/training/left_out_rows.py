"""Rows that a training leaves out while all others keep their places: what influence predicts, retrainings test.

    gradient of a step = sum over its included rows of their tokens' gradients / supervised tokens of all its rows

So the weight of a row in the training goes from 1 to 0, and nothing else changes: as many steps, the same rates, order
and denominators. A step of which every row is left out is made with a gradient of zero (AdamW's moments decay, and
still move the weights).

A left-out row is taken out of its batch, which saves its pass. Where the model drops units at random in training, it
stays in the batch without labels: the masks of the other rows are drawn as they were. Two batches with and without the
row differ by rounding alone.
"""

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

IGNORED = -100
"""Label of a token without a loss."""


def without_rows(batch: dict[str, Tensor], left_out: Set[int], *, keeps_places: bool) -> dict[str, Tensor]:
    """A batch of the Trainer without what its left-out rows add to the loss.

    Args:
        batch: Its entries have a line each row; `rows` are the rows' numbers.
        left_out: Numbers of rows.
        keeps_places: Leave the rows in the batch, without labels.

    >>> batch = {"rows": torch.tensor([4, 7]), "labels": torch.tensor([[1, 2], [3, 4]])}
    >>> without_rows(batch, {4}, keeps_places=False)["labels"].tolist()
    [[3, 4]]
    >>> without_rows(batch, {4}, keeps_places=True)["labels"].tolist()
    [[-100, -100], [3, 4]]
    >>> without_rows(batch, {4, 7}, keeps_places=False)["labels"].tolist()
    [[-100, -100]]
    """
    device = batch["labels"].device  # accelerate moves batches to the model's before this
    leaves = torch.isin(batch["rows"].to(device), torch.tensor(sorted(left_out), dtype=torch.int64, device=device))
    if not leaves.any():
        return batch
    batch = batch | {"labels": batch["labels"].masked_fill(leaves[:, None], IGNORED)}
    if keeps_places:
        return batch
    # One row stays where all leave: its gradient is 0, not missing, and the optimizer skips what has none.
    stays = ~leaves if not leaves.all() else torch.arange(len(leaves), device=device) == 0
    return {name: values[stays.to(values.device)] for name, values in batch.items()}


def draws_masks(model: nn.Module) -> bool:
    """Whether a model drops units at random in training: by a layer, or by a rate in its configuration."""
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    return any(_has_rate(config.to_dict()) for config in configs)


def _has_rate(settings: dict[Any, Any]) -> bool:
    rates = (value for name, value in settings.items() if "drop" in str(name))
    nested = (value for value in settings.values() if isinstance(value, dict))
    return any(isinstance(value, float) and value > 0 for value in rates) or any(map(_has_rate, nested))
