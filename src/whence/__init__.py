"""Whence traces a language model back to its data.

The public names are imported when first used, so that `import whence` and `whence --help` do not wait for torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from whence.ablation import ablate as ablate
    from whence.answers import Trace as Trace
    from whence.bench import bench as bench
    from whence.corpus import Corpus as Corpus
    from whence.corpus import Example as Example
    from whence.corpus import open_corpus as open_corpus
    from whence.demo import demo as demo
    from whence.errors import WhenceError as WhenceError
    from whence.index import Index as Index
    from whence.index import IndexSettings as IndexSettings
    from whence.index import append as append
    from whence.index import index as index
    from whence.index import open_index as open_index
    from whence.index import verify as verify
    from whence.interfaces import GradientSpace as GradientSpace
    from whence.joining import join as join
    from whence.measures import evaluate_selection as evaluate_selection
    from whence.members import open_pool as open_pool
    from whence.mixing import mix_law as mix_law
    from whence.model import LoadedModel as LoadedModel
    from whence.model import load_model as load_model
    from whence.online import MixOptions as MixOptions
    from whence.online import OnlineMixer as OnlineMixer
    from whence.pool import train_pool as train_pool
    from whence.queries import Query as Query
    from whence.recovery import recover as recover
    from whence.selection import select as select
    from whence.store import info as info
    from whence.suggesting import suggest as suggest
    from whence.tracing import trace as trace
    from whence.train import train as train

_HOMES = {
    "ablate": "ablation",
    "join": "joining",
    "open_pool": "members",
    "train_pool": "pool",
    "suggest": "suggesting",
    "bench": "bench",
    "demo": "demo",
    "info": "store",
    "Corpus": "corpus",
    "Example": "corpus",
    "open_corpus": "corpus",
    "WhenceError": "errors",
    "Index": "index",
    "IndexSettings": "index",
    "append": "index",
    "index": "index",
    "open_index": "index",
    "verify": "index",
    "GradientSpace": "interfaces",
    "evaluate_selection": "measures",
    "mix_law": "mixing",
    "LoadedModel": "model",
    "load_model": "model",
    "MixOptions": "online",
    "OnlineMixer": "online",
    "Query": "queries",
    "recover": "recovery",
    "select": "selection",
    "Trace": "answers",
    "trace": "tracing",
    "train": "train",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'whence' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"whence.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


class _Package(ModuleType):
    """A verb and its module may have one name. The import system binds the module here: the verb goes before it.

    So `import whence.index as found` gives the function too: modules come by `from whence.index import ...`, name by
    name, or whole by `sys.modules["whence.index"]`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
