"""Other text in place of what a model was trained on: chosen by its weights, does it train the same ability?

`classes`   theta_f is base-6m fine-tuned to name the topic of AG News. Candidates are other text (p3, dolly, alpaca and
            the domains), labelled by theta_f; in `classes+` 1,000 of the rows it was trained on are among them.
            theta_0 is trained on 1,000 chosen rows with theta_f's own steps and rate, and graded on AG News' test rows.
`answers`   theta_f is base-6m fine-tuned on gsm8k; candidates are alpaca, dolly and p3 with their own answers; graded
            by the perplexity of all tokens of gsm8k's test answers.

There is no early stopping, and nothing is chosen by test rows. The share of the gap that is closed is
(method - random) / (expert - random), of accuracy or of minus the loss.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.tokens import encode
from whence.gradients.forward_passes import losses
from whence.indexing.ingest import fingerprint_of
from whence.models.loading import LoadedModel, load_model
from whence.recovery.case import Case, labelled, open_case
from whence.recovery.membership import CorpusEvidence, features
from whence.recovery.points import gather_evidence
from whence.recovery.pseudo_labels import Labels, choice_probabilities
from whence.recovery.scores import method_scores
from whence.recovery.settings import RecoverSettings
from whence.recovery.shadow_calibration import build_calibration_set, calibrate_on_shadow
from whence.storage import Place
from whence.training.trainer import train

TOPICS = ("World", "Sports", "Business", "Sci/Tech")
TEMPLATE = "{text}\nTopic:"
CHOSEN, EXPERT, GRADED = 1_000, 2_000, 1_000
LONGEST = {"classes": 64, "classes+": 64, "answers": 112}
"""Tokens of a row."""
OTHERS = ("instruct/p3", "instruct/dolly", "instruct/alpaca", "domains")
EACH = {"classes": 1_500, "classes+": 1_500, "answers": 1_000}
"""Rows of each of them."""
RECIPE = {"max_steps": 125, "batch_size": 16, "checkpoints": 1, "progress": False}
RATES = {"classes": 1e-3, "classes+": 1e-3, "answers": 5e-4}
SINGLE = ("p_min", "ghost", "row_cosine", "cosine", "nnls")
DETAILS = ("row_cosine", "nnls")
"""Methods that `classes` alone is asked for."""
BALANCED = {"classes": ("random", "row_cosine", "cosine", "calibrated"), "classes+": ("random", "calibrated"),
            "answers": ()}  # fmt: skip
"""Methods that also choose as many rows of every label."""


def run(options: argparse.Namespace, keep, kept: dict[str, object]) -> None:
    """All cells that have no result yet."""
    for seed in options.seeds:
        for task in options.tasks:
            prepared = None
            for name in ("theta_0", "expert", *methods_of(task)):
                cell = f"{task}, {name}, seed {seed}"
                if cell in kept:
                    continue
                prepared = prepared or Prepared(options, task, seed)
                found = prepared.graded(name)
                keep(cell, found)
                print(cell, json.dumps(found), flush=True)


def methods_of(task: str) -> list[str]:
    """All that rank, and their balanced variants."""
    names = ["random", *SINGLE, "calibrated", *(f"{name}, balanced" for name in BALANCED[task])]
    return [name for name in names if task == "classes" or name not in DETAILS]


class Prepared:
    """An expert, the candidates, and what is seen of them."""

    def __init__(self, options: argparse.Namespace, task: str, seed: int):
        self.options, self.task, self.seed = options, task, seed
        self.base, self.work = str(Path(options.model).resolve()), options.work / f"distribution-{task}-{seed}"
        self.recipe = RECIPE | {"lr": RATES[task], "seed": seed, "max_tokens": LONGEST[task]}
        known, candidates, self.test = (classes if task != "answers" else answers)(options, task, seed)
        self.expert = str(train(self.base, known, self.work / "expert", **self.recipe))
        asked = {"choices": TOPICS, "template": TEMPLATE} if task != "answers" else {}
        self.settings = RecoverSettings(max_tokens=LONGEST[task], optimizer="adamw", epochs=2, seed=seed, **asked)
        self.case: Case = open_case(self.base, self.expert, self.settings)
        corpus = open_corpus(candidates)
        fingerprint = fingerprint_of(corpus)
        self.corpus: Corpus = labelled(self.case, corpus, Place.at(self.work / "labels"), fingerprint, self.settings,
                                       progress=False)  # fmt: skip
        self.rows = [example.row for example in self.corpus]
        self._seen: CorpusEvidence | None = None
        self._calibrated: Tensor | None = None

    @property
    def seen(self) -> CorpusEvidence:
        """Evidence of the candidates."""
        if self._seen is None:
            place = Place.at(self.work / "evidence")
            self._seen = gather_evidence(self.case, self.corpus, place, fingerprint_of(self.corpus), progress=False)
        return self._seen

    @property
    def calibrated(self) -> Tensor:
        """Log odds of membership."""
        if self._calibrated is None:
            known = build_calibration_set(self.case, self.corpus, self.settings, self.work, count=CHOSEN,
                                          rows=len(self.rows))  # fmt: skip
            learned = calibrate_on_shadow(known, self.settings, Place.at(self.work), progress=False)
            self._calibrated = learned.calibration.log_odds(features(self.seen)).float()
        return self._calibrated

    def scores(self, name: str) -> Tensor:
        """Of every candidate."""
        if name == "random":
            return torch.rand(len(self.rows), generator=torch.Generator().manual_seed(self.seed))
        return self.calibrated if name == "calibrated" else method_scores(self.seen, name, count=CHOSEN, seed=self.seed)

    def graded(self, name: str) -> dict[str, object]:
        """Mark of a model trained on what a method chose."""
        if name in ("theta_0", "expert"):
            return {"mark": self.mark(self.base if name == "theta_0" else self.expert)}
        method, _, balanced = name.partition(", ")
        order = self.scores(method).argsort(descending=True, stable=True).tolist()
        labels = [row.get("label") for row in self.rows]
        chosen = quota(order, labels) if balanced else order[:CHOSEN]
        model = train(self.base, [self.rows[n] for n in chosen], self.work / name.replace(", ", "-"), **self.recipe)
        own = [str(self.rows[n]["source"]) for n in chosen]
        return {
            "mark": self.mark(str(model)),
            "sources": {source: own.count(source) / len(own) for source in sorted({*own})},
            "labels": {str(label): sum(labels[n] == label for n in chosen) for label in sorted({*map(str, labels)})},
        }

    def mark(self, path: str) -> float:
        """Accuracy, or the perplexity of all answer tokens."""
        with torch.no_grad():
            return self.test(load_model(last(path), dtype="float32"))


def last(path: str) -> str:
    """A run's last checkpoint, or the model itself."""
    from whence.models.loading import local_directory
    from whence.models.runs import open_run

    return local_directory(open_run(path).checkpoints[-1].path)


def quota(order: list[int], labels: list[str | None]) -> list[int]:
    """The best rows of every label, as many of each as there are, up to an even share; the rest as ranked."""
    kinds = sorted({*map(str, labels)})
    kept = [n for kind in kinds for n in [n for n in order if labels[n] == kind][: CHOSEN // len(kinds)]]
    return (kept + [n for n in order if n not in {*kept}])[:CHOSEN]


def read(options: argparse.Namespace, name: str) -> list[dict]:
    """Rows of a file, or of a directory's."""
    path = options.data / name
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path.with_suffix(".jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text().strip().split("\n")]
    return [row for row in rows if not str(row.get("template")).startswith("ag_news")]  # p3 has the expert's own task


Test = Callable[[LoadedModel], float]


def classes(options: argparse.Namespace, task: str, seed: int) -> tuple[list[dict], list[dict], Test]:
    """AG News: rows of the expert, candidates without labels, accuracy."""
    rng, labels = random.Random(f"{task[:7]} {seed}"), Labels(choices=TOPICS, template=TEMPLATE)
    own = rng.sample(read(options, "classify/agnews_train"), EXPERT)
    known = [
        {"prompt": labels.prompt({"text": row["text"]}), "completion": labels.completion(row["label"])} for row in own
    ]
    others = [row for name in OTHERS for row in rng.sample(read(options, name), EACH[task])]
    others += [{"id": row["id"], "source": row["source"], "text": row["text"]} for row in own[:1000]] * (
        task == "classes+"
    )
    rng.shuffle(others)
    graded = rng.sample(read(options, "classify/agnews_test"), GRADED)
    truth = torch.tensor([TOPICS.index(row["label"]) for row in graded])

    def accuracy(model: LoadedModel) -> float:
        texts = [{"text": row["text"]} for row in graded]
        found = choice_probabilities(model, texts, labels, max_tokens=LONGEST[task])
        return float((found.argmax(1) == truth).double().mean())

    return known, others, accuracy


def answers(options: argparse.Namespace, task: str, seed: int) -> tuple[list[dict], list[dict], Test]:
    """gsm8k: rows of the expert, candidates, perplexity."""
    rng = random.Random(f"{task} {seed}")
    known = rng.sample(read(options, "instruct/gsm8k_train"), EXPERT)
    others = [row for name in OTHERS[:3] for row in rng.sample(read(options, name), EACH[task])]
    rng.shuffle(others)
    graded = rng.sample(read(options, "instruct/gsm8k_test"), GRADED // 2)

    def perplexity(model: LoadedModel) -> float:
        encoded, total, count = [encode(row, model.tokenizer, 256) for row in graded], 0.0, 0
        for numbers, some in losses(model, encoded, 4096):
            for number, loss in zip(numbers, some.tolist(), strict=True):
                total += loss * encoded[number].supervised_count
                count += encoded[number].supervised_count
        return float(torch.tensor(total / count).exp())

    return known, others, perplexity
