"""Saved weights rounded to fewer bits, as another model's were.

A model's files show its weights rounded: a move of half a step or less is lost, and a larger one becomes whole steps. A
model that stands in for another must be rounded in the same way.
"""

import math
from collections import Counter
from pathlib import Path

import torch

from whence.errors import ModelError
from whence.models.saved_files import LIST, forget_files, list_files
from whence.models.weights import Described, Weights, in_pieces, weights_of
from whence.storage import Place

STEMS = ("adapter_model", "model", "pytorch_model")
"""Names, without endings, of the files that hold an adapter's or a model's weights."""


def stored_dtype(directory: str) -> torch.dtype:
    """The dtype in which most entries of a saved model's or adapter's weights are stored."""
    entries = Counter[torch.dtype]()
    for dtype, shape in weights_of(directory, *STEMS).described().values():
        entries[dtype] += math.prod(shape)
    return entries.most_common(1)[0][0]


def round_stored(directory: str, dtype: torch.dtype) -> None:
    """Store tensors of more bits in `dtype`, one file at a time; a file is replaced when its successor is whole.

    Args:
        directory: Directory of a model or an adapter in safetensors files.
        dtype: A dtype of 16 bits; fp32 changes nothing.

    Raises:
        ModelError: The weights are in another format.
    """
    weights = weights_of(directory, *STEMS)
    is_listed = (Path(directory) / LIST).exists()
    for file in sorted({*weights.files.values()}):
        if file.suffix != ".safetensors":
            raise ModelError(f"{file}: weights are rounded in safetensors files. Save the model as safetensors.")
        of_file = Weights(directory, {name: file for name, where in weights.files.items() if where == file})
        before = of_file.described()
        after: Described = {
            name: (dtype if dtype.itemsize < kind.itemsize else kind, shape) for name, (kind, shape) in before.items()
        }
        if after != before:
            forget_files(directory)  # a kill between the weights and their list leaves a directory without a list
            pieces, total = in_pieces(
                after,
                lambda name, of_file=of_file, after=after: of_file.read(name).to(after[name][0]),
                metadata={"format": "pt"},
            )
            Place.at(file.parent).write(file.name, pieces, total=total)
    if is_listed:
        list_files(directory)
