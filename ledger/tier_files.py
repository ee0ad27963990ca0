"""Blocks as files: written whole or not at all, checked whole when read. Called from threads; knows no budget.

A file is a header and a payload:

    magic 8 | block_hash 16 | checksum 16 | layout length 2 | payload length 8 (little-endian) | layout | payload

It is written under another name and renamed (rename(2) is atomic), so a crash leaves a temporary file that the next
start removes; what the disk lost or changed all the same shows in the length or in the checksum (BLAKE2b, RFC 7693).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path

from tokenrelay.base.logging import get_logger

log = get_logger("tier")

MAGIC = b"TRBLOCK1"
CHECKSUM_BYTES = 16
_HEADER = struct.Struct("<8s16s16sHQ")
_TEMPORARY = ".part"
Key = tuple[str, bytes]  # (layout, block_hash)


def checksum(payload: bytes) -> bytes:
    """BLAKE2b-128 of a payload."""
    return hashlib.blake2b(payload, digest_size=CHECKSUM_BYTES).digest()


class Corrupt(Exception):
    """The file is not what was written."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file of an earlier life."""

    key: Key
    bytes: int  # of the file
    modified_s: float


class BlockFiles:
    """One folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: Key) -> Path:
        """Where a block is; spread over 256 folders a layout."""
        layout, block_hash = key
        name = block_hash.hex()
        return self._folder / hashlib.blake2b(layout.encode(), digest_size=8).hexdigest() / name[:2] / name

    @staticmethod
    def size(key: Key, payload_bytes: int) -> int:
        """Of the file."""
        return _HEADER.size + len(key[0].encode()) + payload_bytes

    def write(self, key: Key, payload: bytes, digest: bytes) -> None:
        """Raises OSError; nothing is left behind then."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        layout = key[0].encode()
        temporary = path.with_name(f"{path.name}-{secrets.token_hex(4)}{_TEMPORARY}")
        try:
            with temporary.open("wb") as file:
                file.write(_HEADER.pack(MAGIC, key[1], digest, len(layout), len(payload)) + layout)
                file.write(payload)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def read(self, key: Key) -> tuple[bytes, bytes] | None:
        """(payload, checksum), None when there is no such file. Raises Corrupt, OSError."""
        try:
            content = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        layout, block_hash, digest, payload_bytes = _parse(content)
        payload = content[_HEADER.size + len(layout.encode()) :]
        if (layout, block_hash) != key or len(payload) != payload_bytes:
            raise Corrupt(f"{len(payload)} bytes of payload, {payload_bytes} were written")
        if checksum(payload) != digest:
            raise Corrupt("the checksum is another one")
        return payload, digest

    def remove(self, key: Key) -> None:
        """Nothing happens when it is not there. Raises OSError."""
        self.path(key).unlink(missing_ok=True)

    def scan(self) -> list[Found]:
        """What is there, oldest first. Removes what a crash left behind and what was cut short. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        found = []
        for parent, _, names in os.walk(self._folder):
            for name in names:
                path = Path(parent, name)
                entry = None if name.endswith(_TEMPORARY) else self._look(path)
                if entry is None:
                    with contextlib.suppress(OSError):
                        path.unlink()
                else:
                    found.append(entry)
        return sorted(found, key=lambda entry: entry.modified_s)

    def _look(self, path: Path) -> Found | None:
        """By the header and the length; the payload is checked when it is read."""
        try:
            with path.open("rb") as file:
                head = file.read(_HEADER.size + 4096)
                status = os.fstat(file.fileno())
            layout, block_hash, _, payload_bytes = _parse(head)
        except (OSError, Corrupt) as error:
            log.warning("not a block", path=str(path), error=str(error))
            return None
        key = (layout, block_hash)
        if status.st_size != self.size(key, payload_bytes) or path != self.path(key):
            log.warning("cut short, or in the wrong place", path=str(path), bytes=status.st_size)
            return None
        return Found(key, status.st_size, status.st_mtime)


def _parse(content: bytes) -> tuple[str, bytes, bytes, int]:
    """(layout, block_hash, checksum, payload bytes). Raises Corrupt."""
    if len(content) < _HEADER.size:
        raise Corrupt(f"{len(content)} bytes are no header")
    magic, block_hash, digest, layout_bytes, payload_bytes = _HEADER.unpack_from(content)
    layout = content[_HEADER.size : _HEADER.size + layout_bytes]
    if magic != MAGIC or len(layout) != layout_bytes:
        raise Corrupt("no header")
    try:
        return layout.decode(), block_hash, digest, payload_bytes
    except UnicodeDecodeError as error:
        raise Corrupt("the layout is no text") from error
