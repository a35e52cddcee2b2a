"""Where a model's files are here: its own directory, or the copy of a Hub repository.

The command line asks before it imports torch, so that this module does not.
"""

from collections.abc import Sequence
from pathlib import Path

from whence.errors import ModelError
from whence.paths import exists, is_directory, require_readable

MODEL_FILES = ("*.safetensors", "adapter_model.bin", "*.json", "*.model", "*.txt", "*.jinja", "*.py")
"""Files of a model, by which a repository is copied; weights first."""
OLDER_WEIGHTS = "pytorch_model*.bin"
"""Files of weights that are copied where there are no others."""


def local_directory(path: str | Path, *, patterns: Sequence[str] = MODEL_FILES) -> str:
    """Local directory of a model: the path itself, or the cached copy of a Hub repository.

    Args:
        path: A directory, or a name on the Hub.
        patterns: Files to copy; none asks whether there is such a repository.

    Raises:
        ModelError: There is neither.
        StorageError: The directory may not be read.
    """
    if is_directory(path):
        require_readable(path, MODEL_FILES)
        return str(path)
    if str(path).startswith((".", "/", "~")) or exists(path):
        raise ModelError(f"{path}: not a model directory. Give a directory with config.json, or a name on the Hub.")
    import huggingface_hub

    try:
        directory = huggingface_hub.snapshot_download(str(path), allow_patterns=list(patterns))
        if patterns and not any(Path(directory).glob(name) for name in patterns[:2]):
            return huggingface_hub.snapshot_download(str(path), allow_patterns=[*patterns, OLDER_WEIGHTS])
        return directory
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path}: no such directory, and the Hugging Face Hub has no model of that name that can be "
            f"read from here ({reason})."
        ) from None
