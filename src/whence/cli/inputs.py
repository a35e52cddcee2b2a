"""What a command reads, asked for before torch is imported: a wrong name is refused at once.

Whoever reads an input says the rest: here it is asked whether there is something of the right kind.
"""

from collections.abc import Iterable

from whence.errors import (
    MissingBankError,
    MissingCurvatureError,
    MissingIndexError,
    MissingLogError,
    MissingPoolError,
    SettingError,
)

MANIFEST, POOL, BANK, STEP_LOG = "manifest.json", "pool.json", "bank.json", "replay/replay.json"
CURVATURE = "curvature.json"
CONFIGURATIONS = ("config.json", "adapter_config.json")


def check_inputs(
    *,
    index: str | None = None,
    pool: str | None = None,
    run: str | None = None,
    bank: str | None = None,
    curvature: str | None = None,
    models: Iterable[str | None] = (),
    corpora: Iterable[str | None] = (),
) -> None:
    """Refuse names where there is nothing of the kind; those that are None are passed over.

    Raises:
        MissingIndexError: There is no index.
        MissingPoolError: There is no pool.
        MissingLogError: There is no run that can be replayed.
        MissingBankError: There is no bank.
        MissingCurvatureError: There is no curvature.
        ModelError: There is no model, adapter or Trainer's directory, here or on the Hub.
        CorpusError: There is no file, directory or data set.
        SettingError: A model is given as a corpus, or a corpus or an index as a model.
    """
    from whence.paths import refuse_impossible
    from whence.storage import Place

    rows, weights = [path for path in corpora if path], [path for path in models if path]
    for path in (*rows, *weights):
        if "://" not in path:
            refuse_impossible(path)
    if index is not None and not is_index(index):
        raise MissingIndexError.at(Place.at(index).root)
    if pool is not None and not Place.at(pool).exists(POOL):
        raise MissingPoolError.at(pool)
    if run is not None and not Place.at(run).exists(STEP_LOG):
        raise MissingLogError.at(run)
    if bank is not None and not is_bank(bank):
        raise MissingBankError.at(bank)
    if curvature is not None and not is_curvature(curvature):
        raise MissingCurvatureError.at(curvature)
    for path in rows:
        _check_corpus(path)
    for path in weights:
        _check_model(path)


def is_index(path: str) -> bool:
    """Whether there is an index at a path."""
    from whence.storage import Place

    return Place.at(path).exists(MANIFEST)


def is_bank(path: str) -> bool:
    """Whether there is a bank of retrainings at a path."""
    from whence.storage import Place

    return Place.at(path).exists(BANK)


def is_curvature(path: str) -> bool:
    """Whether there is curvature at a path."""
    from whence.storage import Place

    return Place.at(path).exists(CURVATURE)


def _check_corpus(path: str) -> None:
    from whence.corpus.addresses import require_corpus

    if _is_model(path):
        raise SettingError(f"{path}: a model, where a corpus is expected. MODEL comes first, then CORPUS.")
    require_corpus(path)


def _check_model(path: str) -> None:
    from whence.corpus.addresses import SUFFIXES
    from whence.models.local_copies import local_directory
    from whence.paths import exists, is_directory

    if path.lower().endswith(SUFFIXES) and exists(path) and not is_directory(path):
        raise SettingError(f"{path}: a file of rows, where a model is expected. MODEL comes first, then CORPUS.")
    if is_directory(path) and is_index(path) and not _is_model(path):
        raise SettingError(f"{path}: an index, where a model is expected: whence info {path} says which one made it.")
    local_directory(path, patterns=())


def _is_model(path: str) -> bool:
    from whence.paths import exists

    return any(exists(f"{path}/{name}") for name in CONFIGURATIONS)
