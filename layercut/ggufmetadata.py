"""Metadata of a GGUF file: whether its lengths are honest, before the library reads it. No value is kept."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from layercut.errors import CheckpointError

MAX_VALUES = 2_000_000
"""Values of metadata that are taken for honest: a vocabulary of 500,000 words with its merges. The reader makes an object of each."""

STRING, ARRAY, DEEPEST = 8, 9, 4
SCALARS = MappingProxyType({0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8})
"""Bytes of a value, by the number of its type."""


class Metadata:
    """The metadata of a GGUF file, of which only the lengths are read.

    The reader trusts them, and takes what lies behind the end of a file for empty values: it would go on for ever.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.values = 0

    def check(self) -> None:
        """Raise CheckpointError when it goes on behind the end of the file, or is longer than honest ones are."""
        self.file.seek(4)
        version = self.file.read(4)
        self.order = ">" if version[:2] == b"\0\0" else "<"
        self._skip(8)
        for _ in range(self._number("Q")):
            self._skip(self._number("Q"))
            self._value(self._number("I"), 0)

    def _value(self, kind: int, depth: int) -> None:
        if kind == STRING:
            self._count(1)
            self._skip(self._number("Q"))
        elif kind == ARRAY:
            self._array(depth + 1)
        elif kind in SCALARS:
            self._count(1)
            self._skip(SCALARS[kind])
        else:
            raise self._damaged(f"it holds a value of the unknown type {kind}")

    def _array(self, depth: int) -> None:
        kind, length = self._number("I"), self._number("Q")
        self._count(length)
        if depth > DEEPEST:
            raise self._damaged("arrays are nested too deeply")
        if kind in SCALARS:
            self._skip(SCALARS[kind] * length)
            return
        for _ in range(length):
            self._value(kind, depth)

    def _number(self, form: str) -> int:
        data = self.file.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise self._damaged("metadata goes on behind its end")
        return int(struct.unpack(self.order + form, data)[0])

    def _skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self._damaged("metadata goes on behind its end")
        self.file.seek(count, os.SEEK_CUR)

    def _count(self, values: int) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            message = f"metadata of more than {MAX_VALUES} values"
            raise CheckpointError(message, where=self.path, hint="use the safetensors version of the model")

    def _damaged(self, message: str) -> CheckpointError:
        return CheckpointError(f"damaged GGUF file: {message}", where=self.path, hint="download it again")
