"""One shard: the stored vectors of a part's rows under one checkpoint, as a safetensors file.

    vectors [n, stored]  in the codec        norm [n] f32   of the vector before it was encoded
    scale   [n] f32      of the codec        loss [n] f32   nats, reduced as the gradient space says
    status  [n] u8       index in STATUSES   tokens [n] i32 supervised tokens

The header is written here rather than by safetensors' library, so that the vectors start at a multiple of 64
bytes (matrix kernels read them where they lie in the file) and the same rows give the same bytes. Any
safetensors reader opens it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float32, Int32, Shaped, UInt8
from torch import Tensor

from whence.checksums import Recorded
from whence.errors import ChecksumError
from whence.indexing.codecs import Codec
from whence.indexing.readahead import advise
from whence.storage import Place

STATUSES = ("ok", "no_supervised_token", "non_finite")
_ALIGNMENT = 64
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
}
_COLUMNS = {"scale": torch.float32, "norm": torch.float32, "loss": torch.float32, "tokens": torch.int32}
COLUMN_BYTES = sum(dtype.itemsize for dtype in (*_COLUMNS.values(), torch.uint8))
"""Bytes of a row beside its vector; the last is the status."""
ENCODED_NUMBERS = 2**20
"""Numbers that are encoded at a time: what a codec needs meanwhile is several times as large as they are."""


@dataclass(frozen=True, kw_only=True)
class ShardArrays:
    """The result of an indexing job, before encoding."""

    vectors: Float32[Tensor, "n k"]
    """Rows whose status is not ok may hold anything; zeros are stored for them."""

    norm: Float32[Tensor, " n"]
    loss: Float32[Tensor, " n"]
    """Nats."""

    status: UInt8[Tensor, " n"]
    tokens: Int32[Tensor, " n"]
    counts: Mapping[str, int] = field(default_factory=dict)
    """Further counts for the manifest, such as truncated rows."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard as read. `vectors` is memory-mapped where the index is local."""

    vectors: Shaped[Tensor, "n stored"]
    scale: Float32[Tensor, " n"]
    """As read, that of unbiased inner products (`Codec.unbiased`), which may be another than the file has."""
    norm: Float32[Tensor, " n"]
    loss: Float32[Tensor, " n"]
    status: UInt8[Tensor, " n"]
    tokens: Int32[Tensor, " n"]

    def decoded(self, codec: Codec, k: int) -> Float32[Tensor, "n k"]:
        """All vectors, in memory."""
        return codec.decode(self.vectors, self.scale, k)


def encoded(arrays: ShardArrays, codec: Codec) -> Shard:
    """The shard of these arrays, on the CPU."""
    ok = arrays.status == 0
    n, k = arrays.vectors.shape
    stored, scale = torch.empty(n, codec.columns(k), dtype=codec.dtype), torch.empty(n)
    step = max(1, ENCODED_NUMBERS // max(1, k))
    for first in range(0, n, step):
        some = slice(first, first + step)
        vectors = torch.where(ok[some, None], arrays.vectors[some], 0.0)
        assert vectors.isfinite().all(), "a row that is not finite has status ok"
        stored[some], scale[some] = codec.encode(vectors)
    return Shard(
        vectors=stored,
        scale=scale,
        norm=torch.where(ok, arrays.norm, 0.0).cpu(),
        loss=arrays.loss.cpu(),
        status=arrays.status.cpu(),
        tokens=arrays.tokens.cpu(),
    )


def shard_pieces(shard: Shard) -> tuple[list[memoryview | bytes], int]:
    """The file of a shard in pieces, and how many bytes they are."""
    header, body, offset = {}, [], 0
    for name in ("vectors", *_COLUMNS, "status"):
        tensor = getattr(shard, name).contiguous()
        size = tensor.numel() * tensor.itemsize
        dtype = _NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        body.extend(_bytes(tensor))
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return [len(text).to_bytes(8, "little") + text, *body], 8 + len(text) + offset


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    if tensor.numel():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def read_shard(place: Place, name: str, codec: Codec, k: int, rows: int, recorded: Recorded) -> Shard:
    """Open a shard, and check that its bytes, and what its header says, are those that were written.

    The bytes are read once for it in a process: the pages that a scan is about to read.

    Raises:
        ChecksumError: The file is missing, has other bytes, or is not this shard.
    """
    remedy = f"See what else is wrong with: whence verify {place.root}, and mend it with: whence verify {place.root} "
    remedy += "--repair"
    try:
        data = place.mapped(name, recorded)
        advise(data)
        place.check(name, recorded, remedy, data=data.numpy())
        length = int.from_bytes(bytes(data[:8].tolist()), "little")
        header = json.loads(bytes(data[8 : 8 + length].numpy()))
        body = data[8 + length :]
        expected = {
            "vectors": (codec.dtype, [rows, codec.columns(k)]),
            **{field: (dtype, [rows]) for field, dtype in _COLUMNS.items()},
            "status": (torch.uint8, [rows]),
        }
        tensors = {field: _tensor(body, header[field], *expected[field]) for field in expected}
        return Shard(**tensors | {"scale": codec.unbiased(tensors["scale"], tensors["norm"], k)})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ChecksumError(f"{place.path(name)} is not the shard that was written ({error}). {remedy}") from error


def _tensor(body: Tensor, entry: dict, dtype: torch.dtype, shape: list[int]) -> Tensor:
    first, last = entry["data_offsets"]
    if entry["dtype"] != _NAMES[dtype] or entry["shape"] != shape:
        raise ValueError(f"found {entry['dtype']} {entry['shape']}, expected {_NAMES[dtype]} {shape}")
    piece = body[first:last]
    if len(piece) != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError(f"the file ends after {len(body)} of {last} bytes")
    if piece.data_ptr() % dtype.itemsize:
        piece = piece.clone()  # short rows can leave what follows them unaligned
    return piece.view(dtype).view(shape)
