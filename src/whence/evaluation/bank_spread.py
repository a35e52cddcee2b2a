"""How much the losses of a bank's members differ, beside what the training itself did to them.

A bank measures methods by these differences alone: where they are as small as what rounding makes of a training, no
method can be told from chance. Means are over the queries that have a loss in every member.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from whence.evaluation.bank_store import Bank, Kind


@dataclass(frozen=True)
class Spread:
    """Losses of the members of one kind, in nats a token."""

    kind: Kind
    members: int
    kept: float
    """Rows that a member was trained on, mean over members."""
    loss: float
    """Mean over members and queries."""
    of_mean: float
    """Standard deviation over members of the mean loss of the queries; NaN for a single member."""
    of_query: float
    """Mean over queries of the standard deviation over members of the query's loss; NaN for a single member."""


def spreads(bank: Bank) -> list[Spread]:
    """Spread of each kind of member that a bank has, but for the two that every bank has."""
    present = with_loss(bank)
    out = []
    kinds: list[Kind] = [kind for kind in get_args(Kind) if bank.of_kind(kind)]
    for kind in kinds:
        losses = bank.losses(kind)[:, present]
        out.append(
            Spread(
                kind=kind,
                members=len(losses),
                kept=float(bank.included(kind).sum(1).double().mean()),
                loss=float(losses.mean()),
                of_mean=_deviation(losses.mean(1)),
                of_query=float(torch.tensor([_deviation(column) for column in losses.T]).mean()),
            )
        )
    return out


def fall_of_loss(bank: Bank) -> tuple[float, float]:
    """Mean loss of the queries before the training on all rows and after it."""
    present = with_loss(bank)
    return float(bank.parent_losses[present].mean()), float(bank.full_losses[present].mean())


def with_loss(bank: Bank) -> Bool[Tensor, " q"]:
    """Whether a query has a loss in every member."""
    return torch.cat([bank.parent_losses[None], bank.full_losses[None], bank.losses()]).isfinite().all(0)


def measured(bank: Bank) -> Bool[Tensor, " q"]:
    """Whether a query has a loss in some member; else it may have no token to score."""
    return torch.cat([bank.parent_losses[None], bank.full_losses[None], bank.losses()]).isfinite().any(0)


def without_loss(bank: Bank) -> list[str]:
    """Ids of the queries without a loss in some member: none of their tokens is supervised, or a training diverged."""
    present = with_loss(bank).tolist()
    return [id for id, is_there in zip(bank.query_ids, present, strict=True) if not is_there]


def _deviation(values: torch.Tensor) -> float:
    return float(values.std()) if len(values) > 1 else float("nan")
