"""Computes tensors of a plan: weighted averages, casts, factors, zeros and maps, a piece at a time. Only what has parts needs torch.

Every operation rounds the same way on every machine, so pieces and threads do not show in the bytes. All are elementwise but maps, for
which a whole tensor is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from math import isfinite, nan, prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from layercut.copying import Range, SourceFiles
from layercut.errors import OutputError
from layercut.fits import span_of
from layercut.gathering import gathered_pieces
from layercut.header import ITEM_BITS, quoted
from layercut.plan import Band, Grown, Part, TensorMade
from layercut.ways import BUFFER, write_at

if TYPE_CHECKING:
    import torch

DTYPES: Mapping[str, str] = MappingProxyType({"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"})
"""Dtypes that are computed with: name in torch by name in safetensors."""

LONGEST = 1 << 16
"""Elements of a vector that can be moved along another one."""
# Elements that are computed at once: every part of a tensor takes this much memory, a few times.
PIECE = 1 << 20


def write_made(
    made: TensorMade, folders: Mapping[str, Path], opened: SourceFiles, target: int, offset: int, advance: Callable[[int], object]
) -> None:
    """Compute one tensor and write its bytes at `offset` of the descriptor `target`.

    `folders` holds the folder of every source by alias, and the file of every map by its sha256. `advance` is called with the number of
    bytes after every piece. The plan must have been checked. Raises OutputError when finite weights overflow, CheckpointError when a
    source cannot be read, and OSError when the target cannot be written.
    """
    for data in made_pieces(made, folders, opened):
        write_at(target, data, offset)
        offset += len(data)
        advance(len(data))


def made_pieces(made: TensorMade, folders: Mapping[str, Path], opened: SourceFiles) -> Iterator[bytes | bytearray]:
    """The bytes of one computed tensor, a piece at a time. Raises as `write_made` does, but for the target."""
    if made.maps:
        yield from _mapped(made, folders, opened)
        return
    if made.gather is not None:
        for piece in gathered_pieces(made.gather, prod(made.shape) * ITEM_BITS[made.gather.dtype] // 8, folders, opened):
            yield _of_piece(made, piece)
        return
    if not made.parts:  # zeros that are written as such: a hole would take its room later, when nobody checks for it
        zeros = bytes(min(BUFFER, made.nbytes))
        for done in range(0, made.nbytes, BUFFER):
            yield zeros[: made.nbytes - done]
        return
    if isinstance(made.amend, Grown):
        whole = [opened.read(Range(folders[part.model] / part.file, part.begin, part.end)) for part in made.parts]
        yield _compute(made, whole)
        return
    elements = prod(made.shape)
    for first in range(0, elements, PIECE):
        last = min(first + PIECE, elements)
        pieces: list[bytearray] = []
        for part in made.parts:
            width = ITEM_BITS[part.dtype] // 8
            pieces.append(opened.read(Range(folders[part.model] / part.file, part.begin + first * width, part.begin + last * width)))
        yield _compute(made, pieces, first)


def _mapped(made: TensorMade, folders: Mapping[str, Path], opened: SourceFiles) -> Iterator[bytearray]:
    """The bytes of a tensor that is multiplied by maps: it is held as a whole, and one map at a time."""
    import torch

    from layercut.folding import folded

    inner = made.compute or made.parts[0].dtype
    whole = bytearray().join(made_pieces(made.model_copy(update={"maps": (), "dtype": inner}), folders, opened))
    value = before = torch.frombuffer(whole, dtype=_torch(inner)).reshape(made.shape)
    for number, one in enumerate(made.maps):
        fold = torch.frombuffer(opened.read(span_of(folders[one.sha256], one.size)), dtype=torch.float32).reshape(one.size, one.size)
        last = number == len(made.maps) - 1
        value = folded(value, fold, one.columns, _torch(made.dtype if last else inner))
    spoiled = ~value.isfinite()
    if spoiled.any():
        if before.isfinite().all():
            raise OutputError(f"overflows {made.dtype}", where=f"tensor {quoted(made.name)}", hint="use a dtype of larger range")
        value.masked_fill_(spoiled, nan)
    flat = value.flatten()
    for first in range(0, flat.numel(), PIECE):
        piece = flat[first : first + PIECE]
        data = bytearray(piece.numel() * ITEM_BITS[made.dtype] // 8)
        torch.frombuffer(data, dtype=piece.dtype).copy_(piece)
        yield data


def _of_piece(made: TensorMade, piece: bytearray) -> bytearray:
    """A gathered piece, computed with where the tensor is not a plain copy."""
    assert made.gather is not None
    plain = made.gather.dtype == made.dtype and made.compute is None and not made.factors
    if plain:
        return piece
    whole = Part(model="", file="", begin=0, end=len(piece), dtype=made.gather.dtype, weight=1)
    return _compute(made.model_copy(update={"parts": (whole,)}), [piece])


def _compute(made: TensorMade, pieces: Sequence[bytearray], first: int = 0) -> bytearray:
    """The bytes of one piece of the tensor, from element `first` on, from the same piece of its parts."""
    import torch

    parts = [torch.frombuffer(piece, dtype=_torch(part.dtype)) for part, piece in zip(made.parts, pieces, strict=True)]
    value = _value(made, parts, first)
    if isinstance(made.amend, Grown):
        parts = [part[made.amend.at :][: value.numel()] for part in parts]
    data = bytearray(value.numel() * ITEM_BITS[made.dtype] // 8)
    result = torch.frombuffer(data, dtype=_torch(made.dtype))
    result.copy_(value)
    spoiled = ~result.isfinite()
    if spoiled.any():
        for part in parts:
            spoiled &= part.isfinite()
        if spoiled.any():
            early = bool((spoiled & ~value.isfinite()).any())
            dtype = (made.compute or made.parts[0].dtype) if early else made.dtype
            hint = "use a dtype of larger range, or smaller factors"
            raise OutputError(f"overflows {dtype}", where=f"tensor {quoted(made.name)}", hint=hint)
        # Sources held NaN. Vector and scalar instructions spell it differently, which would show in the bytes.
        result.masked_fill_(result.isnan(), nan)
    return data


def _value(made: TensorMade, parts: Sequence[torch.Tensor], first: int) -> torch.Tensor:
    """The computation that `TensorMade` states, but for its last cast."""
    import torch

    if isinstance(made.amend, Grown):
        grown = _grown(made, made.amend, *(part.double().tolist() for part in parts))
        return torch.tensor(grown, dtype=torch.float64).to(_torch(made.compute or made.parts[0].dtype))
    value, weight = parts[0], made.parts[0].weight
    if len(parts) > 1 or weight != 1:
        wide = torch.float64 if any(part.dtype == "F64" for part in made.parts) else torch.float32
        value = value.to(wide) * weight
        # Product and sum are rounded one by one: add(alpha=) may fuse them on some machines.
        for part, tensor in zip(made.parts[1:], parts[1:], strict=True):
            value += tensor.to(wide) * part.weight
    value = value.to(_torch(made.compute or made.parts[0].dtype))
    for factor in made.factors:
        value = value * factor
    if isinstance(made.amend, Band):
        columns = torch.arange(made.amend.at + first, made.amend.at + first + value.numel()) % made.amend.row
        value = torch.where(columns < made.amend.stop, value * made.amend.by, value)
    return value


def _grown(made: TensorMade, how: Grown, query: Sequence[float], key: Sequence[float]) -> list[float]:
    """The elements of `query + key * (log(exp(a) + by) - a) / key . key` with a = query . key that `made` holds.

    Of all that give exp(query . key) + by this is the one nearest to `query`. Decimal arithmetic rounds the same way on every machine.
    """
    with localcontext(Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])):
        q, k = ([Decimal(number) for number in numbers] for numbers in (query, key))
        a, square = (sum((one * other for one, other in zip(left, k, strict=True)), Decimal(0)) for left in (q, k))
        step = (1 + Decimal(how.by) * (-a).exp()).ln() / square
        wanted = [float(one + other * step) for one, other in zip(q, k, strict=True)][how.at : how.at + prod(made.shape)]
    if not all(map(isfinite, wanted)):
        why = "is zero" if not any(key) else "or it holds NaN, infinity or numbers too large"
        message = f"cannot make up for the new place of its layer: the tensor that it is multiplied with {why}"
        raise OutputError(message, where=f"tensor {quoted(made.name)}")
    return wanted


def _torch(dtype: str) -> torch.dtype:
    import torch

    found = getattr(torch, DTYPES[dtype])
    assert isinstance(found, torch.dtype)
    return found
