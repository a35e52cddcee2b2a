"""What a manifest says of an index' settings, checked before it is used: the store keeps settings without reading them.

Entries that are not listed here are let through: they are for other readers.
"""

from typing import Annotated, Any, NotRequired, TypedDict

from whence import catalogue
from whence.corpus import preferences
from whence.errors import SettingError, UnknownNameError
from whence.gradients.space import GradientSpace
from whence.indexing.codecs import codec
from whence.indexing.manifest import MANIFEST, REMEDY, Manifest
from whence.records import Between, MisfitError, fitting, unlike_written
from whence.storage import Place

Length = Annotated[int, range(2, 2**31)]
"""Tokens of a row or of a pass."""


class StoredSpace(TypedDict):
    """The entries of a manifest's gradient space, by the names in `GradientSpace`."""

    layers: str | None
    reduction: str
    normalise: NotRequired[str]
    view: str
    adam_mode: NotRequired[str]
    projection: str
    width: int | None
    seed: int
    shuffle_rounds: NotRequired[int | None]


class StoredSettings(TypedDict):
    """The entries of a manifest's settings that are read again."""

    space: StoredSpace
    blocks: NotRequired[list[Annotated[int, range(1, 2**31)]]]
    layer_names: list[str]
    layout: str
    tokenizer: str
    tokenizer_path: str | None
    max_tokens: Length
    tokens_per_batch: Length
    dtype: str | None
    trust_remote_code: bool
    gradient_checkpointing: bool
    preferences: NotRequired[str]


class StoredCheckpoint(TypedDict):
    """The entry of a checkpoint in a manifest."""

    path: str
    digest: str
    weight: Annotated[float, Between(0.0, 1.001)]
    base: NotRequired[str]
    moments: NotRequired[str]


def check_settings(place: Place, manifest: Manifest) -> None:
    """Check the settings, the checkpoints and the codec in a manifest.

    Raises:
        ChecksumError: One is missing, of another type, or has a value that no index has.
    """
    try:
        settings: dict[str, Any] = fitting(StoredSettings, manifest.settings, "settings")
        fitting(list[StoredCheckpoint], list(manifest.checkpoints), "checkpoints")
        catalogue.projection(fitting(GradientSpace, settings["space"], "settings.space").sketch)
        codec(manifest.codec)
        preferences.checked(settings.get("preferences"))
    except (MisfitError, SettingError, UnknownNameError) as error:
        raise unlike_written(place.path(MANIFEST), error, REMEDY) from None
