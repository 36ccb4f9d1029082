"""Xet of the loopback Hub: hf_xet keeps its content-addressed storage in a folder; here files are found in it by their sha256."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from hubstore import Blob, RefusedError

RECORD = 48
"""Bytes of every record of a shard of metadata, and of what stands before the first."""
VERIFIED, EXTENDED = 1 << 31, 1 << 30
"""Flags of a file: a record of checksums for each segment follows, and one that holds the sha256."""
LAST = b"\xff" * 32


class XetFile(NamedTuple):
    """A file in the storage."""

    hash: str
    size: int


def files_of(storage: Path) -> dict[str, XetFile]:
    """Files by sha256, as the shards of metadata list them."""
    found: dict[str, XetFile] = {}
    for path in sorted(storage.rglob("xorbs/shards/*.mdb")):
        data = path.read_bytes()
        at = RECORD
        while data[at : at + 32] != LAST:
            name, flags = data[at : at + 32], int.from_bytes(data[at + 32 : at + 36], "little")
            count = int.from_bytes(data[at + 36 : at + 40], "little")
            segments = [data[at + RECORD * number : at + RECORD * (number + 1)] for number in range(1, count + 1)]
            size = sum(int.from_bytes(segment[36:40], "little") for segment in segments)
            at += RECORD * (1 + count + (count if flags & VERIFIED else 0))
            if flags & EXTENDED:
                found[_spelled(data[at : at + 32])] = XetFile(_spelled(name), size)
                at += RECORD
    return found


def blob_of(storage: Path, sha256: str) -> Blob:
    """A large file that was uploaded. Raises RefusedError when it was not."""
    import hf_xet

    file = files_of(storage).get(sha256)
    if file is None:
        raise RefusedError(400, "", f"{sha256} was not uploaded")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        with hf_xet.XetSession().new_file_download_group(
            endpoint=f"local://{storage}", token="xet", token_expiry_unix_secs=4102444800
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(file.hash, file.size), str(target))
        blob = Blob(target.read_bytes(), large=True, xet=file.hash)
    assert blob.sha256 == sha256
    return blob


def _spelled(value: bytes) -> str:
    """A hash as text: four numbers of eight bytes, each the other way round."""
    return "".join(value[at : at + 8][::-1].hex() for at in range(0, 32, 8))
