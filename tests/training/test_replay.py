"""Replay against finite differences of real trainings, and against closed forms."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_model
from whence.corpus.tokens import Encoded, collate
from whence.gradients.exact import sequences_of
from whence.models.loading import LoadedModel
from whence.training.replay import replay
from whence.training.step_derivatives import RowLosses
from whence.training.step_log import StepRecorder, open_log

VOCABULARY = 61


def encoded(count, seed, longest=9):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, longest, (1,), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        first = int(torch.randint(1, length - 1, (1,), generator=generator))
        rows.append(Encoded(ids, [place >= first for place in range(length)]))
    return rows


def root_mean_square_norm(norm, x):
    """A norm in the type of its input."""
    return norm.weight * (x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt())


class Training:
    """A hand-written training of some rows with weights of their own."""

    def __init__(self, architecture, *, optimizer="adamw", clip=None, passes=1, decay=0.0, steps=7, rate=3e-3, every=3,
                 eps=1e-8, beta1=0.9, dtype=torch.float64):  # fmt: skip
        loaded = tiny_model(architecture, seed=1)
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        net = loaded.model.to(dtype)
        for module in net.modules():
            if type(module).__name__ == "LlamaRMSNorm":  # transformers' own computes in float32
                module.forward = functools.partial(root_mean_square_norm, module)
        for name, weight in net.named_parameters():
            weight.requires_grad_("lora_" in name if loaded.has_adapter else True)
        self.model = LoadedModel(net, None, architecture, loaded.has_adapter)
        self.start = copy.deepcopy(net.state_dict())
        self.rows, self.queries = encoded(8, 3), encoded(3, 4)
        self.weights = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
        order = torch.Generator().manual_seed(5)
        self.plan = [torch.randperm(8, generator=order)[: 2 * passes].view(passes, -1).tolist() for _ in range(steps)]
        self.rates = [rate * (number + 1) / steps for number in range(steps)]
        self.optimizer, self.clip, self.decay, self.every = optimizer, clip, decay, every
        self.eps, self.beta1 = eps, beta1

    def loss(self, rows, w):
        """Sum of weighted losses of rows, by the model's own logits."""
        batch = collate(rows)
        logits = self.model.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        total = 0.0
        for number, row in enumerate(rows):
            for t in range(1, len(row.ids)):
                if row.supervised[t]:
                    total = total - w[number] * F.log_softmax(logits[number, t - 1], 0)[row.ids[t]]
        return total

    def train(self, w, recorder=None):
        """Train from the start; the queries' mean losses at the end."""
        self.model.model.load_state_dict(self.start)
        parts = [
            {"params": [weight for weight in self.weights.values() if weight.dim() > 1], "weight_decay": self.decay},
            {"params": [weight for weight in self.weights.values() if weight.dim() == 1], "weight_decay": 0.0},
        ]
        parts = [part for part in parts if part["params"]]
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parts, lr=0.0, betas=(self.beta1, 0.99), eps=self.eps)
        else:
            optimizer = torch.optim.SGD(parts, lr=0.0)
        if recorder is not None:
            recorder.load(None)
        for number, (passes, rate) in enumerate(zip(self.plan, self.rates, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens = sum(self.rows[row].supervised_count for rows in passes for row in rows)
            optimizer.zero_grad()
            for rows in passes:
                if recorder is not None:
                    recorder.add_pass(torch.tensor(rows))
                (self.loss([self.rows[row] for row in rows], [w[row] for row in rows]) / tokens).backward()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.clip)
            if recorder is not None:
                recorder.step(optimizer)
            optimizer.step()
            if recorder is not None:
                recorder.close(optimizer, number + 1, is_last=number + 1 == len(self.plan))
        if recorder is not None:
            recorder.write()
        with torch.no_grad():
            return torch.stack([self.loss([query], [1.0]) / query.supervised_count for query in self.queries])

    def replayed(self, directory, **options):
        """Its log, written by the training itself, replayed."""
        self.train([1.0] * 8, StepRecorder(self.weights, directory, self.every, self.clip))
        losses = RowLosses(self.model, self.weights, self.rows)
        return replay(
            losses, open_log(directory), [[sequences_of(query)] for query in self.queries], progress=False, **options
        )


def finite_differences(training, h=1e-6):
    """- d f / d w_i by central differences of real trainings [q n]."""
    out = []
    for row in range(8):
        ends = []
        for sign in (1, -1):
            w = [1.0] * 8
            w[row] += sign * h
            ends.append(training.train(w))
        out.append((ends[1] - ends[0]) / (2 * h))
    return torch.stack(out, 1)


CASES = {
    "adamw": {},
    "adamw, every state stored": {"every": 1},
    "adamw, clipped": {"clip": 0.5},
    "adamw, several passes": {"passes": 2},
    "adamw, several passes, clipped, decay": {"passes": 2, "clip": 0.5, "decay": 0.1},
    "adamw without a first moment": {"beta1": 0.0},
    "sgd": {"optimizer": "sgd", "rate": 0.1},
    "sgd, clipped, several passes, decay": {"optimizer": "sgd", "rate": 0.1, "passes": 2, "clip": 0.5, "decay": 0.1},
}


@pytest.mark.parametrize("differences", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "lora", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_finite_differences_of_real_trainings(architecture, case, differences, tmp_path):
    training = Training(architecture, **CASES[case])
    found = training.replayed(tmp_path, differences=differences)
    expected = finite_differences(training)
    assert (found.error is not None) == differences
    error = (found.scores - expected).norm() / expected.norm()
    assert expected.abs().max() > 1e-4
    assert error < 1e-3, (error, found.scores, expected)
    assert torch.tensor(found.losses, dtype=torch.float64).allclose(training.train([1.0] * 8), atol=1e-10)
