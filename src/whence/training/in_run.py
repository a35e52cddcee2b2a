"""In-Run Data Shapley: what each training example did to a validation loss, summed up while the model trains.

A step takes theta to theta - s, where s = sum over the batch of P w_z g_z: g_z the gradient of example z's mean loss,
w_z its share of the Trainer's loss (its supervised tokens over the batch's), P = eta c, the learning rate of this very
step times the factor by which its gradient was clipped. Let a part of the batch be worth the fall of the validation
loss L if it alone had been stepped. Expanded about theta that is a game whose Shapley values are known in closed form:

    first order      w_z <P grad L, g_z>
    second order     w_z <P (grad L - H s / 2), g_z>                  H the Hessian of L at theta

The score of an example is the sum over all steps that it had a part in. Larger is more helpful: training on the
example lowered the validation loss. (The paper's phi is the change of the loss, so minus this.) It is in nats, and the
scores of a step add up to about the fall of the loss, as far as the expansion holds: |s| / |theta| says how far.

Plain SGD takes exactly that step. AdamW does not: there P = eta c / (sqrt(v_hat) + eps), with the second moment that
the very step divides by. That is a heuristic, and outputs say so: v_hat depends on the batch too, and momentum takes an
example's gradient in over the steps that follow, which is counted here at its own step. Weight decay is no example's.

Nothing is computed twice: g_z comes from the training's own backward pass (`overheard`), which multiplies by D in about
the time of a forward pass. grad L and H s are passes over the validation rows (`slopes`). Weights, and the random
numbers of the training, are left as they were.

Source: Wang et al. 2025, Data Shapley in One Training Run, https://arxiv.org/abs/2406.11011.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from whence.corpus.tokens import Batch, Encoded, collate
from whence.errors import ModelError, SettingError
from whence.gradients.ghost import owners_of
from whence.gradients.hessian import Gradient, Slopes, evaluating, gradient, norm
from whence.gradients.training_pass import Overheard
from whence.models.loading import LoadedModel
from whence.numerics import generator
from whence.storage import Place

STATE = "in_run.npz"
"""In a checkpoint."""
SCORES, SETTINGS, STEPS = "in_run_scores.parquet", "in_run_scores.json", "in_run_steps.jsonl"
"""In the run's directory."""
HEURISTIC = (
    "AdamW's step is taken for learning rate * gradient / (sqrt(v_hat) + eps), by the moments of the very step: what "
    "an example adds to the momentum of later steps is counted at its own step"
)
COLUMNS = ("step", "learning_rate", "clip", "relative_step", "predicted_fall", "validation_loss")
"""Of the table of steps."""
AGREEMENT = 1e-3
"""Relative error of what the hooks see of a gradient's square, above which they miss some of it."""


@dataclass(frozen=True, kw_only=True)
class InRunPlan:
    """How contributions are to be measured."""

    order: int = 1
    """Of the expansion: 1 or 2."""
    every: int = 10
    """Validation rows are drawn anew after so many steps, and after every checkpoint; with order 1 their gradient is
    kept in between."""
    rows: int = 16
    """Validation rows of a draw, without replacement; all of them where there are fewer."""
    rows_of_pass: int = 16
    """Of them, in one pass."""
    seed: int = 0
    save_steps: int = 1
    """Steps between checkpoints."""


@dataclass
class InRun:
    """Contributions of the rows of one training, by row number.

    Raises:
        ModelError: A weight that is trained has no closed form for its gradient, is read past its module, or, for the
            second order, has no second derivative.
    """

    model: LoadedModel
    """In training, its trained weights thawed."""
    validation: Sequence[Encoded]
    """With supervised tokens."""
    count: int
    """Rows that are trained on."""
    plan: InRunPlan
    scores: np.ndarray = field(init=False)
    """[n] in float64: nats by which a row lowered the validation loss, to the plan's order."""
    seen: np.ndarray = field(init=False)
    """[n]: steps that a row had a part in."""
    steps: list[tuple[float | None, ...]] = field(default_factory=list)
    """Of `COLUMNS`; the last is null where a kept gradient was used."""

    def __post_init__(self):
        self.scores, self.seen = np.zeros(self.count), np.zeros(self.count, dtype=np.int64)
        self.weights = {name: w for name, w in self.model.model.named_parameters() if w.requires_grad}
        try:
            self.owners = owners_of(self.model, {name: weight.detach() for name, weight in self.weights.items()})
        except ModelError as error:
            reason = str(error).partition(":")[0]
            raise ModelError(f"--in-run: {reason}. Adapters (--lora-rank) leave it frozen.") from None
        self._passes: list[tuple[np.ndarray, Overheard]] = []
        self.slopes = Slopes(self.model, self.weights, self.plan.rows_of_pass)
        self._norm, self._drawn_at = 0.0, 0
        self._slope: Gradient | None = None
        self._rehearse()

    @contextmanager
    def watching(self, inputs: Mapping[str, Tensor], rows: Int64[Tensor, " b"]) -> Iterator[None]:
        """Keep what a training pass, run meanwhile, says of its rows.

        Args:
            inputs: Of the Trainer: `input_ids`, `attention_mask`, `labels` [b t].
            rows: Their numbers.
        """
        device = self.model.device
        supervised = inputs["labels"].to(device) != -100
        heard = Overheard(
            self.owners, Batch(inputs["input_ids"].to(device), inputs["attention_mask"].to(device).bool(), supervised)
        )
        with heard.listening():
            yield
        self._passes.append((rows.cpu().numpy(), heard))
        self._norm = self._gradient_norm()

    @torch.no_grad()
    def step(self, optimizer: Any, number: int) -> None:
        """Add what every example of a step did. To be called when the gradient is clipped, before it is taken.

        Args:
            optimizer: AdamW or plain SGD, of torch.
            number: Steps done before.
        """
        clip = self._gradient_norm() / self._norm if self._norm else 1.0
        rates = self._rates(optimizer)
        taken = {name: rates[name] * _filled(weight.grad, weight) for name, weight in self.weights.items()}
        slope, loss = self._validation_slope(number, taken)
        direction = {name: (clip * rates[name]) * slope[name] for name in slope}
        predicted = 0.0
        for rows, heard in self._passes:
            found = heard.dots(direction).double().cpu().numpy()
            np.add.at(self.scores, rows, found)
            np.add.at(self.seen, rows, 1)
            predicted += float(found.sum())
        self._passes.clear()
        length = norm(list(taken.values())) / norm([w.detach() for w in self.weights.values()])
        rate = float(optimizer.param_groups[0]["lr"])
        self.steps.append((number + 1, rate, clip, length, predicted, loss))

    def save(self, checkpoint: Path) -> None:
        """Keep the state with a checkpoint."""
        table = np.array([[np.nan if cell is None else cell for cell in row] for row in self.steps], dtype=np.float64)
        np.savez(checkpoint / STATE, scores=self.scores, seen=self.seen, steps=table.reshape(-1, len(COLUMNS)))

    def load(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, if there is one.

        Raises:
            SettingError: It has no state, or that of another number of rows.
        """
        if checkpoint is None:
            return
        try:
            with np.load(checkpoint / STATE, allow_pickle=False) as kept:
                scores, seen, table = kept["scores"], kept["seen"], kept["steps"]
        except (OSError, ValueError, KeyError) as error:
            raise SettingError(f"{checkpoint / STATE}: not a state of --in-run ({error}). Train anew.") from None
        if len(scores) != self.count:
            raise SettingError(f"{checkpoint / STATE}: of {len(scores)} rows, where {self.count} are trained on")
        self.scores, self.seen = scores, seen
        self.steps = [tuple(None if np.isnan(cell) else float(cell) for cell in row) for row in table]

    def write(
        self, directory: Path, ids: Sequence[str], sources: Sequence[str | None], more: Mapping[str, Any]
    ) -> None:
        """Write scores, best first, the settings that they were measured by, and the table of steps.

        Args:
            directory: Of the run.
            ids: Of the rows.
            sources: Of the rows, as far as they have one.
            more: To stand with the settings; `heuristic` among them.

        Raises:
            StorageError: A file cannot be written.
        """
        order = np.argsort(-self.scores, kind="stable")
        columns = {"id": [ids[n] for n in order], "whence_score": self.scores[order], "steps": self.seen[order]}
        if any(source is not None for source in sources):
            columns["source"] = [sources[n] for n in order]
        lines = [dict(zip(COLUMNS, (int(row[0] or 0), *row[1:]), strict=True)) for row in self.steps]
        place = Place.at(directory)
        for name, data in (
            (SCORES, _parquet(columns)),
            (SETTINGS, (json.dumps({**more, **self.summary()}, indent=2) + "\n").encode()),
            (STEPS, "".join(json.dumps(line) + "\n" for line in lines).encode()),
        ):
            place.write(name, [data], total=len(data))

    def summary(self) -> dict[str, Any]:
        """How it was measured, and how far the expansion can be trusted."""
        lengths = [row[3] for row in self.steps if row[3] is not None] or [0.0]
        falls, loss, impossible = [row[4] or 0.0 for row in self.steps], np.inf, 0
        for fall, row in zip(falls, self.steps, strict=True):
            loss = loss if row[5] is None else row[5]
            impossible += not fall <= loss
        return {
            "order": self.plan.order,
            "every": self.plan.every,
            "rows_of_a_draw": min(self.plan.rows, len(self.validation)),
            "validation_rows": len(self.validation),
            "seed": self.plan.seed,
            "sign": "larger is more helpful: nats by which training on the row lowered the validation loss",
            "trained_rows": self.count,
            "steps": len(self.steps),
            "relative_step": {"median": float(np.median(lengths)), "largest": float(np.max(lengths))},
            "impossible_steps": impossible,
            "predicted_fall": float(sum(falls)),
        }

    # -- the expansion

    def _rates(self, optimizer: Any) -> dict[str, float | Tensor]:
        """P / c by parameter: what its clipped gradient is multiplied by to make a step."""
        groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
        out: dict[str, float | Tensor] = {}
        for name, weight in self.weights.items():
            group = groups[id(weight)]
            out[name] = float(group["lr"])
            if "betas" in group and weight.grad is not None:
                out[name] = group["lr"] / _denominator(weight.grad.float(), optimizer.state.get(weight, {}), group)
        return out

    def _validation_slope(self, number: int, taken: Gradient) -> tuple[Gradient, float | None]:
        """Gradient of the validation loss, less half the Hessian's product with the step for the second order."""
        if number % self.plan.save_steps % self.plan.every == 0:  # also after a checkpoint, which keeps no gradient
            self._drawn_at, self._slope = number, None
        if self._slope is not None:
            return self._slope, None
        slope, product, loss = self.slopes.measured(
            self._drawn(self._drawn_at), taken if self.plan.order == 2 else None
        )
        if product is None:
            self._slope = slope
            return slope, loss
        return {name: slope[name] - product[name] / 2 for name in slope}, loss

    def _drawn(self, number: int) -> list[Encoded]:
        """The validation rows that are drawn at a step: the same for the same seed and step."""
        rng = generator(self.plan.seed, "in-run", str(number))
        order = torch.randperm(len(self.validation), generator=rng)
        return [self.validation[n] for n in sorted(order[: self.plan.rows].tolist())]

    def _gradient_norm(self) -> float:
        return norm([weight.grad for weight in self.weights.values() if weight.grad is not None])

    def _rehearse(self) -> None:
        """See on two validation rows whether the hooks miss nothing: dots with the gradient add up to its square."""
        rows = self.validation[:2]
        heard = Overheard(self.owners, collate(rows).to(self.model.device))
        with evaluating(self.model.model), heard.listening():
            loss = F.cross_entropy(*self._all_logits(heard.batch), ignore_index=-100)
            slope = dict(zip(self.weights, gradient(loss, list(self.weights.values())), strict=True))
        square = sum(float(part.double().square().sum()) for part in slope.values())
        seen = float(heard.dots(slope).double().sum())
        if not abs(seen - square) <= AGREEMENT * square:
            raise ModelError(
                f"{self.model.path}: --in-run sees {seen / (square or 1):.1%} of a gradient's square, so some weight "
                "is used in a way that it cannot follow. Adapters (--lora-rank) may leave that weight frozen."
            )
        if self.plan.order == 2:
            self.slopes.check_second_order(rows, slope)

    def _all_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of all positions but the last, as training computes them, and what they should have been."""
        logits = self.model.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        labels = batch.ids.masked_fill(~batch.supervised, -100)[:, 1:]
        return logits[:, :-1].float().flatten(0, 1), labels.flatten().to(logits.device)


def _denominator(slope: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """sqrt(v_hat) + eps, as AdamW is about to divide by it: its moments with this gradient taken in."""
    beta = float(group["betas"][1])
    before = state["exp_avg_sq"].float() * beta if state else 0.0
    done = int(state["step"]) if state else 0
    corrected = (before + (1 - beta) * slope.square()) / (1 - beta ** (done + 1))
    return corrected.sqrt_().add_(float(group["eps"]))


def _filled(slope: Tensor | None, weight: Tensor) -> Tensor:
    """A gradient in fp32; zeros where there is none."""
    return torch.zeros_like(weight, dtype=torch.float32) if slope is None else slope.float()


def _parquet(columns: Mapping[str, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), sink, compression="zstd")
    return sink.getvalue()
