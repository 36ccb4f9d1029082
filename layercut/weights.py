"""Weights: tensors of a checkpoint for torch, read from their byte ranges when they are asked for, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import Any

import torch

from layercut.checkpoint import Checkpoint
from layercut.errors import CheckpointError
from layercut.spill import raw_bytes

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
    }
)
"""The dtypes of safetensors whose values mean something by themselves; the others are scaled, and need a quantiser."""


class Weights:
    """Reads the weights of one checkpoint, without mapping files into memory: what was read and dropped takes no room."""

    def __init__(self, checkpoint: Checkpoint, *, pinned: bool = False) -> None:
        """`pinned` puts them into memory that a CUDA device copies from while it computes."""
        self.checkpoint = checkpoint
        self.read = dict.fromkeys(checkpoint.files, 0)
        """Bytes of weights that were read, by file."""
        self._pinned = pinned
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[str, Future[torch.Tensor]] = {}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._coming.clear()

    def lazy(self, names: Iterable[str]) -> dict[str, Lazy]:
        """Tensors that are read when they are indexed, as slices of a safetensors file are."""
        return {name: Lazy(self, name) for name in names}

    def fetch(self, names: Iterable[str]) -> None:
        """Read these in the background: the next `load` of each takes what was read. Within the context of this object."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="layercut-weights")
        for name in names:
            self._coming[name] = self._pool.submit(self._read, name)

    def load(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in its own dtype. Raises CheckpointError when it cannot be read."""
        coming = self._coming.pop(name, None)
        return self._read(name) if coming is None else coming.result()

    def _read(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.tensors[name]
        path = self.checkpoint.folder / tensor.file
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}, which only a quantiser can read", where=path)
        data = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        room = raw_bytes(data)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(tensor.begin)
                done = 0
                while done < tensor.nbytes:
                    count = file.readinto(room[done:])
                    if not count:
                        raise CheckpointError(f"ends inside tensor {name}", where=path, hint="it changed while it was read")
                    done += count
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror or error}", where=path) from None
        with self._lock:
            self.read[tensor.file] += tensor.nbytes
        return data.view(dtype).reshape(tensor.shape)


class Lazy:
    """One tensor that is read when it is indexed with `...`."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights, self._name = weights, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._weights.load(self._name)[index]
