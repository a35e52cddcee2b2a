"""Weights as files: safetensors, or torch's own format read as tensors only, in one file or in several with an index.

A tensor is read when it is asked for, and nothing else is unpickled.
"""

import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whence.errors import ModelError
from whence.models.saved_files import check_file, check_model_files
from whence.models.unreadable_layouts import missing_weights
from whence.records import MisfitError, fitting

TORCH_FILES = {"adapter_model": "adapter_model.bin", "model": "pytorch_model[.-]*bin"}
"""Patterns of older weight files, by the stem of the safetensors file that is preferred to them."""
FORMATS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of dtypes in safetensors, in the order in which it stores tensors."""
Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtypes and shapes of tensors by name."""
BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
"""Names of constants that older files hold beside the parameters."""


@dataclass(frozen=True)
class Weights:
    """Tensors of a directory by their names in its files; each is read when asked for."""

    path: str
    files: Mapping[str, Path]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading the tensor."""
        with _opened(self.files[name]) as opened:
            return tuple(opened.get_slice(name).get_shape() if hasattr(opened, "get_slice") else opened[name].shape)

    def read(self, name: str) -> Float[Tensor, "..."]:
        """A tensor as stored.

        Raises:
            ModelError: The tensor is quantised, or its file is broken.
        """
        with _opened(self.files[name]) as opened:
            tensor = opened.get_tensor(name) if hasattr(opened, "get_tensor") else opened[name].detach()
        if tensor.dtype not in FORMATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{self.files[name]}: {name} is stored as {kind}, so it is quantised. Give the models in 16 or 32 bits."
            )
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading the tensor if it is in a safetensors file."""
        with _opened(self.files[name]) as opened:
            if hasattr(opened, "get_slice"):
                dtype = {code: dtype for dtype, code in FORMATS.items()}.get(opened.get_slice(name).get_dtype())
                if dtype is not None:
                    return dtype
        return self.read(name).dtype

    def described(self) -> Described:
        """Dtypes and shapes of all tensors."""
        return {name: (self.dtype(name), self.shape(name)) for name in self.files}


def in_pieces(
    described: Described, read: Callable[[str], Float[Tensor, "..."]], *, metadata: Mapping[str, str] | None = None
) -> tuple[Iterator[bytes | memoryview], int]:
    """A safetensors file in pieces, and its length in bytes: the same bytes as `safetensors.torch.save` gives.

    That function holds every tensor and then the whole file beside them; here one tensor is held at a time.

    Args:
        described: Dtypes and shapes of the tensors to store.
        read: Called once for each name when its turn comes; returns the tensor as described, on the CPU.
        metadata: Text entries for the header.
    """
    order = sorted(described, key=lambda name: (list(FORMATS).index(described[name][0]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = described[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": FORMATS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _pieces(text, order, described, read), 8 + len(text) + end


def _pieces(
    text: bytes, order: list[str], described: Described, read: Callable[[str], Tensor]
) -> Iterator[bytes | memoryview]:
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        tensor = read(name).contiguous()
        assert (tensor.dtype, tuple(tensor.shape)) == described[name], name
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file's handle, or the mapping that a torch file holds; only tensors are unpickled."""
    known = (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, LookupError)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                yield opened
        else:
            yield torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except known as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{file}: not a readable file of tensors ({reason}). Copy it again, or save safetensors."
        ) from None


def weights_of(directory: str, *stems: str) -> Weights:
    """The weights of a directory, from the file that transformers and peft would take.

    Args:
        directory: Directory of a saved model or adapter.
        stems: Names of files without their endings, in the order in which to look for them.

    Raises:
        ModelError: There is no such file, or its index names a file that is missing.
        ChecksumError: `whence train` wrote the directory, and a file of it is damaged.
    """
    check_model_files(directory)
    for kind in (f"{stem}.{ending}" for stem in stems for ending in ("safetensors", "bin")):
        file, index = Path(directory) / kind, Path(directory) / f"{kind}.index.json"
        if file.is_file():
            with _opened(file) as opened:
                return Weights(directory, {name: file for name in [*opened.keys()] if not BUFFERS.search(name)})
        if index.is_file():
            stored = _weight_map(index)
            missing = [shard for shard in dict.fromkeys(stored.values()) if not (index.parent / shard).is_file()]
            if missing:
                raise ModelError(f"{index}: it names {missing[0]}, which is not there. Copy the model again.")
            files = {name: index.parent / shard for name, shard in stored.items() if not BUFFERS.search(name)}
            return Weights(directory, files)
    raise ModelError(missing_weights(directory, adapter=stems[0].startswith("adapter")))


def weight_files(directory: str | Path) -> list[Path]:
    """Every file of a directory from which its weights may be read.

    A torch file counts only without a safetensors file of its name, which transformers and peft would prefer.
    """
    folder = Path(directory)
    torch_files = [
        file
        for stem, pattern in TORCH_FILES.items()
        if not (any(folder.glob(f"{stem}.safetensors")) or (folder / f"{stem}.safetensors.index.json").exists())
        for file in folder.glob(pattern)
    ]
    return [*sorted(folder.glob("*.safetensors")), *sorted(torch_files)]


class _WeightIndex(TypedDict):
    weight_map: dict[str, Annotated[str, re.compile(r"(?!/)(?!.*\.\.(/|$)).+")]]


def _weight_map(index: Path) -> dict[str, str]:
    """Names of the files below an index' directory that hold each tensor."""
    try:
        return fitting(_WeightIndex, read_json(index))["weight_map"]
    except MisfitError as error:
        raise ModelError(f"{index}: not an index of weight files ({error}). Copy the model again.") from None


def read_json(file: Path) -> dict[str, Any]:
    """A configuration, or an index of weight files."""
    check_file(file)
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not readable ({error}). Copy the model again.") from None
