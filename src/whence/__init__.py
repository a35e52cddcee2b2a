"""Whence traces a language model back to its data.

The public names are imported when first used, so that `import whence` and `whence --help` do not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from whence.ablation.dry_run import plan_pool as plan_pool
    from whence.ablation.member_training import train_pool as train_pool
    from whence.ablation.pipeline import ablate as ablate
    from whence.ablation.pool import open_pool as open_pool
    from whence.ablation.suggestion import suggest as suggest
    from whence.cli.demonstration import demo as demo
    from whence.corpus.reading import Corpus as Corpus
    from whence.corpus.reading import Example as Example
    from whence.corpus.reading import open_corpus as open_corpus
    from whence.errors import WhenceError as WhenceError
    from whence.evaluation.bank_pipeline import bank as bank
    from whence.evaluation.bank_plan import plan_bank as plan_bank
    from whence.evaluation.bank_scores import evaluate_lds as evaluate_lds
    from whence.evaluation.bank_store import Bank as Bank
    from whence.evaluation.bank_store import open_bank as open_bank
    from whence.evaluation.joining import join as join
    from whence.evaluation.removal import evaluate_addition as evaluate_addition
    from whence.evaluation.removal import evaluate_removal as evaluate_removal
    from whence.evaluation.retrieval import evaluate_retrieval as evaluate_retrieval
    from whence.evaluation.selection import evaluate_selection as evaluate_selection
    from whence.evaluation.tail_patch import evaluate_tail_patch as evaluate_tail_patch
    from whence.gradients.space import GradientSpace as GradientSpace
    from whence.indexing.build import append as append
    from whence.indexing.build import index as index
    from whence.indexing.build import verify as verify
    from whence.indexing.opening import Index as Index
    from whence.indexing.opening import open_index as open_index
    from whence.indexing.planning import Plan as Plan
    from whence.indexing.planning import plan as plan
    from whence.indexing.speed import bench as bench
    from whence.indexing.store import info as info
    from whence.indexing.vectors import IndexSettings as IndexSettings
    from whence.mixing.pipeline import mix_law as mix_law
    from whence.models.loading import LoadedModel as LoadedModel
    from whence.models.loading import load_model as load_model
    from whence.recovery.dry_run import plan_recovery as plan_recovery
    from whence.recovery.pipeline import recover as recover
    from whence.reports.saved_results import open_result as open_result
    from whence.second_order.dry_run import plan_curvature as plan_curvature
    from whence.second_order.pipeline import curvature as curvature
    from whence.second_order.store import open_curvature as open_curvature
    from whence.selection.pipeline import select as select
    from whence.tracing.pipeline import trace as trace
    from whence.tracing.queries import Query as Query
    from whence.tracing.results import Trace as Trace
    from whence.training.dry_run import plan_training as plan_training
    from whence.training.online_mixing import MixOptions as MixOptions
    from whence.training.online_mixing import OnlineMixer as OnlineMixer
    from whence.training.trainer import train as train

_HOMES = {
    "ablate": "ablation.pipeline",
    "append": "indexing.build",
    "bank": "evaluation.bank_pipeline",
    "Bank": "evaluation.bank_store",
    "bench": "indexing.speed",
    "Corpus": "corpus.reading",
    "curvature": "second_order.pipeline",
    "demo": "cli.demonstration",
    "evaluate_addition": "evaluation.removal",
    "evaluate_lds": "evaluation.bank_scores",
    "evaluate_removal": "evaluation.removal",
    "evaluate_retrieval": "evaluation.retrieval",
    "evaluate_selection": "evaluation.selection",
    "evaluate_tail_patch": "evaluation.tail_patch",
    "Example": "corpus.reading",
    "GradientSpace": "gradients.space",
    "Index": "indexing.opening",
    "index": "indexing.build",
    "IndexSettings": "indexing.vectors",
    "info": "indexing.store",
    "join": "evaluation.joining",
    "load_model": "models.loading",
    "LoadedModel": "models.loading",
    "mix_law": "mixing.pipeline",
    "MixOptions": "training.online_mixing",
    "OnlineMixer": "training.online_mixing",
    "open_bank": "evaluation.bank_store",
    "open_corpus": "corpus.reading",
    "open_curvature": "second_order.store",
    "open_index": "indexing.opening",
    "open_pool": "ablation.pool",
    "open_result": "reports.saved_results",
    "plan": "indexing.planning",
    "plan_bank": "evaluation.bank_plan",
    "plan_curvature": "second_order.dry_run",
    "plan_pool": "ablation.dry_run",
    "plan_recovery": "recovery.dry_run",
    "plan_training": "training.dry_run",
    "Plan": "indexing.planning",
    "Query": "tracing.queries",
    "recover": "recovery.pipeline",
    "select": "selection.pipeline",
    "suggest": "ablation.suggestion",
    "trace": "tracing.pipeline",
    "Trace": "tracing.results",
    "train": "training.trainer",
    "train_pool": "ablation.member_training",
    "verify": "indexing.build",
    "WhenceError": "errors",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'whence' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"whence.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
