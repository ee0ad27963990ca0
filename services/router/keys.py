"""API keys and the file that keeps them: digests, names, limits; never a key.

    key, record = new_key("ci", tenant="build")      # "tr-k3v9x2ab-…": shown once, to whoever made it
    with locked(path):
        write_keys(path, [*read_keys(path), record])
    book = KeyBook(read_keys(path))
    book.find(key)                                   # its record, or None

A key has 256 random bits, so that one SHA-256 is enough: slow hashes are for what people choose. Its middle part names
the record, and digests are compared in constant time. The file is JSON that people may edit: limits of 0 are none.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from tokenrelay.base.errors import ConfigError

KEYS_MAX = 10_000  # read on the event loop: 0.1 s
FILE_BYTES_MAX = 64 << 20
KEY_CHARS_MAX = 128
_SCHEME = "tr"
_ID_BYTES = 5  # 8 characters
_SECRET_BYTES = 32
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_ID = re.compile(r"[a-z2-7]{8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NOBODY = hashlib.sha256(b"").hexdigest()


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of one key."""

    id: str  # in the key itself, and no secret
    name: str  # for people: in logs and metrics
    sha256: str  # of the whole key, hexadecimal
    tenant: str = ""  # who shares its cache and its share of the workers; empty: the key alone
    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # prompt tokens that no cache had, and output
    concurrency: int = 0  # requests in work at once
    priority: int = 0  # the best (lowest) class that its requests may ask for
    tps_floor: int = 0  # the highest floor that its requests may ask for, tokens a second; 0: the router's bound
    admin: bool = False  # may look at everybody's requests: /debug, and paths that are no API
    created: str = ""

    @property
    def owner(self) -> str:
        """The tenant, unique: a tenant's name and a key's never meet."""
        return f"tenant:{self.tenant}" if self.tenant else f"key:{self.id}"


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    keys: list[KeyRecord] = msgspec.field(default_factory=list)


class KeyBook:
    """The records of one reading of the file."""

    def __init__(self, records: Iterable[KeyRecord]) -> None:
        self.records = {record.id: record for record in records}

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key; None: nobody's. What is compared takes as long for a wrong key as for an unknown one."""
        record = self.records.get(id_of(key))
        digest = digest_of(key)
        same = hmac.compare_digest(digest, record.sha256 if record is not None else _NOBODY)
        return record if same and record is not None else None


def id_of(key: str) -> str:
    """The part of a key that names its record; empty where it has none."""
    parts = key.split("-", 2)
    return parts[1] if len(parts) == 3 and parts[0] == _SCHEME else ""


def digest_of(key: str) -> str:
    """What the file has of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(name: str, **fields: object) -> tuple[str, KeyRecord]:
    """(the key, its record). Raises ConfigError that names the field. `fields`: of KeyRecord."""
    key_id = base64.b32encode(secrets.token_bytes(_ID_BYTES)).decode().lower()
    key = f"{_SCHEME}-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = msgspec.convert(
        {**fields, "id": key_id, "name": name, "sha256": digest_of(key), "created": now}, KeyRecord
    )
    check_record(record, "the key")
    return key, record


def check_record(record: KeyRecord, where: str) -> None:
    """Raises ConfigError that names the field and what was expected."""
    if not _ID.fullmatch(record.id):
        raise ConfigError(f"{where}: id is {record.id!r}, expected 8 letters a-z and digits 2-7")
    if not _DIGEST.fullmatch(record.sha256):
        raise ConfigError(f"{where}: sha256 is {record.sha256!r}, expected 64 hexadecimal digits, lower case")
    names = {"name": record.name} | ({"tenant": record.tenant} if record.tenant else {})
    for field, value in names.items():
        if not _NAME.fullmatch(value):
            raise ConfigError(f"{where}: {field} is {value!r}, expected 1 to 64 letters, digits, or . _ - @")
    for field in ("requests_per_minute", "tokens_per_minute", "concurrency", "tps_floor"):
        if getattr(record, field) < 0:
            raise ConfigError(f"{where}: {field} is {getattr(record, field)}, expected 0 (no limit) or more")


def read_keys(path: Path) -> list[KeyRecord]:
    """The records of a file. Raises ConfigError that names the file, the key and the field."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"the keys file {path} is larger than {FILE_BYTES_MAX >> 20} MiB")
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the keys file {path}: {error.strerror}") from error
    try:
        found = msgspec.json.decode(raw, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"the keys file {path}: {error}") from error
    if found.version != 1:
        raise ConfigError(f"the keys file {path}: version is {found.version}, expected 1")
    if len(found.keys) > KEYS_MAX:
        raise ConfigError(f"the keys file {path} has {len(found.keys)} keys, at most {KEYS_MAX}")
    seen: set[str] = set()
    for index, record in enumerate(found.keys):
        where = f"the keys file {path}: keys[{index}]"
        check_record(record, where)
        for word in (record.id, f"name {record.name}"):
            if word in seen:
                raise ConfigError(f"{where}: another key has {word!r}, too")
            seen.add(word)
    return found.keys


def write_keys(path: Path, records: Sequence[KeyRecord]) -> None:
    """Replace the file at once: who reads sees the old or the new one. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    data = msgspec.json.format(msgspec.json.encode(_File(keys=list(records))), indent=2) + b"\n"
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write the keys file {path}: {error.strerror}") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One who changes the file at a time. Raises ConfigError where its folder is not there or not writable."""
    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write beside the keys file {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
