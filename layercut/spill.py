"""Spill: tensors that are kept for later, in memory as far as there is room and else in a file that disappears by itself."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from layercut.errors import OutputError


class Slot(NamedTuple):
    """Where a tensor stands in the file."""

    begin: int
    room: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Spill:
    """Tensors by key. The first ones take up to `room` bytes of memory; the others stand in a file in `folder`.

    The file has no name where the system allows that, so that not even a kill leaves it behind. It is read and written, not
    mapped: pages of a mapping would count as memory of the process. `expected` is how many bytes will be kept at once: when
    they do not fit on the disk, that is said before the first is written.
    """

    def __init__(self, room: int, folder: Path, expected: int = 0) -> None:
        self._room, self._folder, self._expected = room, folder, expected
        self._kept: dict[Hashable, Tensor] = {}
        self._slots: dict[Hashable, Slot] = {}
        self._file: IO[bytes] | None = None
        self._end = 0
        self.in_memory = 0
        """Bytes that are in memory now."""

    @property
    def in_file(self) -> int:
        """Bytes that the file took in all."""
        return self._end

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kept.clear()
        self._slots.clear()
        if self._file is not None:
            self._file.close()

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor, in the place of the one that had this key."""
        tensor = tensor.detach().to("cpu")
        size = tensor.numel() * tensor.element_size()
        self._forget(key)
        slot = self._slots.get(key)
        if slot is None and self.in_memory + size <= self._room:
            # A view would keep all that it looks at alive.
            self._kept[key] = tensor if tensor.untyped_storage().nbytes() <= size else tensor.clone()
            self.in_memory += size
            return
        begin = slot.begin if slot is not None and slot.room >= size else self._end
        self._slots[key] = Slot(
            begin, max(size, slot.room if slot is not None and begin == slot.begin else 0), tensor.dtype, tuple(tensor.shape)
        )
        self._end = max(self._end, begin + size)
        self._write(begin, tensor, size)

    def get(self, key: Hashable, device: torch.device | None = None) -> Tensor:
        """The tensor of a key; KeyError when there is none. What is kept in memory is not copied."""
        found = self._kept[key] if key in self._kept else self._read(self._slots[key])
        return found if device is None else found.to(device)

    def pop(self, key: Hashable, device: torch.device | None = None) -> Tensor:
        """The tensor of a key, which is not kept any longer."""
        found = self.get(key, device)
        self._forget(key)
        self._slots.pop(key, None)
        return found

    def _forget(self, key: Hashable) -> None:
        before = self._kept.pop(key, None)
        if before is not None:
            self.in_memory -= before.numel() * before.element_size()

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            needed = self._expected - self.in_memory
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self._folder).free
                if needed > free:
                    message = f"states take {needed} bytes on disk, where {free} are free"
                    hint = "use fewer samples or tokens, or set LAYERCUT_CACHE to a folder on a larger disk"
                    raise OutputError(message, where=self._folder, hint=hint)
                self._file = tempfile.TemporaryFile(dir=self._folder, prefix="layercut-spill-", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise self._failed(error) from None
        return self._file

    def _write(self, begin: int, tensor: Tensor, size: int) -> None:
        file = self._opened()
        data = raw_bytes(tensor.contiguous())
        try:
            file.seek(begin)
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            raise self._failed(error) from None

    def _read(self, slot: Slot) -> Tensor:
        file = self._opened()
        tensor = torch.empty(slot.shape, dtype=slot.dtype)
        room = raw_bytes(tensor)
        try:
            file.seek(slot.begin)
            while room:
                count = file.readinto(room)  # type: ignore[attr-defined]
                if not count:
                    raise OSError(0, "it ends too early")
                room = room[count:]
        except OSError as error:
            raise self._failed(error) from None
        return tensor

    def _failed(self, error: OSError) -> OutputError:
        hint = "set LAYERCUT_CACHE to a folder on a disk with room"
        return OutputError(
            f"states cannot be kept on disk: {error.strerror or os.strerror(error.errno or 0)}", where=self._folder, hint=hint
        )


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to read or to write."""
    data: Any = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(data)
