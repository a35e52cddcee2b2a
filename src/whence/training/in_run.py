"""In-Run Data Shapley: how far each training example lowered a validation loss, summed up while the model trains.

A step takes theta to theta - s, where s = sum over the batch of P w_z g_z: g_z the gradient of example z's mean loss,
w_z its share of the Trainer's loss (its supervised tokens over the batch's), P = eta c, the learning rate of this very
step times the factor by which its gradient was clipped. Let the worth of a subset of the batch be the fall of the
validation loss L if it alone had made the step. Expanded about theta, this game has Shapley values in closed form:

    first order      w_z <P grad L, g_z>
    second order     w_z <P (grad L - H s / 2), g_z>                  H the Hessian of L at theta

The score of an example is the sum over all steps that it took part in. Larger is more helpful: training on the
example lowered the validation loss. (The paper's phi is the change of the loss, so minus this.) Scores are in nats, and
those of a step add up to about the fall of the loss, as far as the expansion holds: |s| / |theta| says how far.

Plain SGD takes exactly that step. AdamW does not: there P = eta c / (sqrt(v_hat) + eps), with the second moment that
this step divides by. That is a heuristic, and outputs say so: v_hat depends on the batch too, and momentum spreads an
example's gradient over later steps, while it is counted here at its own step. Weight decay belongs to no example.

Nothing is computed twice: g_z comes from the training's own backward pass (`gradients.recorded_pass`), and its product
with a direction takes about as long as a forward pass. grad L and H s are passes over the validation rows
(`gradients.hessian`). The weights and the training's random numbers are left as they were.

Source: Wang et al. 2025, Data Shapley in One Training Run, https://arxiv.org/abs/2406.11011.
"""

import io
import json
import zipfile
import zlib
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
from whence.counts import number_of
from whence.errors import ModelError, SettingError
from whence.gradients.ghost import owners_of
from whence.gradients.hessian import Gradient, LossDerivatives, evaluating, gradient, norm
from whence.gradients.recorded_pass import RecordedPass
from whence.models.loading import LoadedModel
from whence.numerics import generator
from whence.storage import Place

STATE = "in_run.npz"
"""File in each checkpoint."""
SCORES, SETTINGS, STEPS = "in_run_scores.parquet", "in_run_scores.json", "in_run_steps.jsonl"
"""Files in the run's directory."""
HEURISTIC = (
    "AdamW's step is taken for learning rate * gradient / (sqrt(v_hat) + eps), by the moments of the very step: what "
    "an example adds to the momentum of later steps is counted at its own step"
)
COLUMNS = ("step", "learning_rate", "clip", "relative_step", "predicted_fall", "validation_loss")
"""Columns of the table of steps."""
AGREEMENT = 1e-3
"""Largest relative difference between a gradient's square and what the hooks see of it; beyond it they miss some."""


@dataclass(frozen=True, kw_only=True)
class InRunPlan:
    """How contributions are measured."""

    order: int = 1
    """Order of the expansion: 1 or 2."""
    every: int = 10
    """Steps between draws of validation rows, which also follow every checkpoint. With order 1 the gradient of a draw
    serves until the next."""
    rows: int = 16
    """Validation rows of a draw, without replacement; all of them where there are fewer."""
    rows_of_pass: int = 16
    """Validation rows in one pass."""
    seed: int = 0
    save_steps: int = 1
    """Steps between checkpoints."""


@dataclass
class InRun:
    """Contributions of the rows of one training, by row number.

    Raises:
        ModelError: A trained weight has no closed form for its gradient, is read other than by its module, or, for the
            second order, has no second derivative.
    """

    model: LoadedModel
    """The model in training, whose trained weights require gradients."""
    validation: Sequence[Encoded]
    """Rows that each have a supervised token."""
    count: int
    """Number of rows that are trained on."""
    plan: InRunPlan
    scores: np.ndarray = field(init=False)
    """[n] in float64: nats by which a row lowered the validation loss, to the plan's order."""
    step_counts: np.ndarray = field(init=False)
    """[n]: number of steps that a row took part in."""
    steps: list[tuple[float | None, ...]] = field(default_factory=list)
    """Rows of `COLUMNS`; the last entry is None where the gradient of an earlier step served."""

    def __post_init__(self):
        self.scores, self.step_counts = np.zeros(self.count), np.zeros(self.count, dtype=np.int64)
        self.weights = {name: w for name, w in self.model.model.named_parameters() if w.requires_grad}
        try:
            self.owners = owners_of(self.model, {name: weight.detach() for name, weight in self.weights.items()})
        except ModelError as error:
            reason = str(error).partition(":")[0]
            raise ModelError(f"--in-run: {reason}. Adapters (--lora-rank) leave it frozen.") from None
        self._passes: list[tuple[np.ndarray, RecordedPass]] = []
        self.slopes = LossDerivatives(self.model, self.weights, self.plan.rows_of_pass)
        self._norm, self._drawn_at = 0.0, 0
        self._slope: Gradient | None = None
        self._check_hooks()

    @contextmanager
    def watching(self, inputs: Mapping[str, Tensor], rows: Int64[Tensor, " b"]) -> Iterator[None]:
        """Record the training pass that runs inside this context.

        Args:
            inputs: The Trainer's batch: `input_ids`, `attention_mask`, `labels` [b t].
            rows: Row numbers of the batch.
        """
        device = self.model.device
        supervised = inputs["labels"].to(device) != -100
        recorded = RecordedPass(
            self.owners, Batch(inputs["input_ids"].to(device), inputs["attention_mask"].to(device).bool(), supervised)
        )
        with recorded.recording():
            yield
        self._passes.append((rows.cpu().numpy(), recorded))
        self._norm = self._gradient_norm()

    @torch.no_grad()
    def step(self, optimizer: Any, number: int) -> None:
        """Add the contribution of every example of a step. Call it when the gradient is clipped, before the step.

        Args:
            optimizer: torch's AdamW or plain SGD.
            number: Number of steps done before.
        """
        clip = self._gradient_norm() / self._norm if self._norm else 1.0
        rates = self._rates(optimizer)
        update = {name: rates[name] * _float_or_zeros(weight.grad, weight) for name, weight in self.weights.items()}
        slope, loss = self._validation_slope(number, update)
        direction = {name: (clip * rates[name]) * slope[name] for name in slope}
        predicted = 0.0
        for rows, recorded in self._passes:
            contributions = recorded.dots(direction).double().cpu().numpy()
            np.add.at(self.scores, rows, contributions)
            np.add.at(self.step_counts, rows, 1)
            predicted += float(contributions.sum())
        self._passes.clear()
        length = norm(list(update.values())) / norm([w.detach() for w in self.weights.values()])
        rate = float(optimizer.param_groups[0]["lr"])
        self.steps.append((number + 1, rate, clip, length, predicted, loss))

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint."""
        table = np.array([[np.nan if cell is None else cell for cell in row] for row in self.steps], dtype=np.float64)
        np.savez(checkpoint / STATE, scores=self.scores, seen=self.step_counts, steps=table.reshape(-1, len(COLUMNS)))

    def load(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, if there is one.

        Raises:
            SettingError: The checkpoint has no state, or one for another number of rows.
        """
        if checkpoint is None:
            return
        try:
            with np.load(checkpoint / STATE, allow_pickle=False) as state:
                scores, step_counts, table = state["scores"], state["seen"], state["steps"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise SettingError(f"{checkpoint / STATE}: not a state of --in-run ({error}). Train anew.") from None
        if len(scores) != self.count:
            raise SettingError(
                f"{checkpoint / STATE}: of {number_of(len(scores), 'row')}, where {self.count} are trained on"
            )
        self.scores, self.step_counts = scores, step_counts
        self.steps = [tuple(None if np.isnan(cell) else float(cell) for cell in row) for row in table]

    def write(
        self, directory: Path, ids: Sequence[str], sources: Sequence[str | None], record: Mapping[str, Any]
    ) -> None:
        """Write the scores, best first, the settings of the measurement, and the table of steps.

        Args:
            directory: Directory of the run.
            ids: Ids of the rows.
            sources: Sources of the rows; None for a row without one.
            record: Entries to write before the settings, such as `heuristic`.

        Raises:
            StorageError: A file cannot be written.
        """
        order = np.argsort(-self.scores, kind="stable")
        columns = {"id": [ids[n] for n in order], "whence_score": self.scores[order], "steps": self.step_counts[order]}
        if any(source is not None for source in sources):
            columns["source"] = [sources[n] for n in order]
        lines = [dict(zip(COLUMNS, (int(row[0] or 0), *row[1:]), strict=True)) for row in self.steps]
        place = Place.at(directory)
        for name, data in (
            (SCORES, _parquet_bytes(columns)),
            (SETTINGS, (json.dumps({**record, **self.summary()}, indent=2) + "\n").encode()),
            (STEPS, "".join(json.dumps(line) + "\n" for line in lines).encode()),
        ):
            place.write(name, [data], total=len(data))

    def summary(self) -> dict[str, Any]:
        """How scores were measured, and how far the expansion can be trusted."""
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
        """P / c by parameter: the factor that turns its clipped gradient into a step."""
        groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
        out: dict[str, float | Tensor] = {}
        for name, weight in self.weights.items():
            group = groups[id(weight)]
            out[name] = float(group["lr"])
            if "betas" in group and weight.grad is not None:
                out[name] = group["lr"] / _denominator(weight.grad.float(), optimizer.state.get(weight, {}), group)
        return out

    def _validation_slope(self, number: int, update: Gradient) -> tuple[Gradient, float | None]:
        """Gradient of the validation loss, less half the Hessian's product with the step for the second order."""
        if number % self.plan.save_steps % self.plan.every == 0:  # also after a checkpoint, which holds no gradient
            self._drawn_at, self._slope = number, None
        if self._slope is not None:
            return self._slope, None
        slope, product, loss = self.slopes.derivatives(
            self._validation_draw(self._drawn_at), update if self.plan.order == 2 else None
        )
        if product is None:
            self._slope = slope
            return slope, loss
        return {name: slope[name] - product[name] / 2 for name in slope}, loss

    def _validation_draw(self, number: int) -> list[Encoded]:
        """The validation rows drawn at a step: the same for the same seed and step."""
        rng = generator(self.plan.seed, "in-run", str(number))
        order = torch.randperm(len(self.validation), generator=rng)
        return [self.validation[n] for n in sorted(order[: self.plan.rows].tolist())]

    def _gradient_norm(self) -> float:
        return norm([weight.grad for weight in self.weights.values() if weight.grad is not None])

    def _check_hooks(self) -> None:
        """Check on two validation rows that the hooks miss nothing: dots with the gradient add up to its square."""
        rows = self.validation[:2]
        recorded = RecordedPass(self.owners, collate(rows).to(self.model.device))
        with evaluating(self.model.model), recorded.recording():
            loss = F.cross_entropy(*self._all_logits(recorded.batch), ignore_index=-100)
            slope = dict(zip(self.weights, gradient(loss, list(self.weights.values())), strict=True))
        square = sum(float(block.double().square().sum()) for block in slope.values())
        hooked = float(recorded.dots(slope).double().sum())
        if not abs(hooked - square) <= AGREEMENT * square:
            raise ModelError(
                f"{self.model.path}: --in-run sees {hooked / (square or 1):.1%} of a gradient's square, so some weight "
                "is used in a way that it cannot follow. Adapters (--lora-rank) may leave that weight frozen."
            )
        if self.plan.order == 2:
            self.slopes.check_second_order(rows, slope)

    def _all_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of all positions but the last, as training computes them, and the labels."""
        logits = self.model.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        labels = batch.ids.masked_fill(~batch.supervised, -100)[:, 1:]
        return logits[:, :-1].float().flatten(0, 1), labels.flatten().to(logits.device)


def _denominator(slope: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """sqrt(v_hat) + eps, the divisor of AdamW's coming step: its second moment with this gradient included."""
    beta = float(group["betas"][1])
    before = state["exp_avg_sq"].float() * beta if state else 0.0
    steps_done = int(state["step"]) if state else 0
    corrected = (before + (1 - beta) * slope.square()) / (1 - beta ** (steps_done + 1))
    return corrected.sqrt_().add_(float(group["eps"]))


def _float_or_zeros(slope: Tensor | None, weight: Tensor) -> Tensor:
    """A gradient in fp32; zeros where there is none."""
    return torch.zeros_like(weight, dtype=torch.float32) if slope is None else slope.float()


def _parquet_bytes(columns: Mapping[str, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), sink, compression="zstd")
    return sink.getvalue()
