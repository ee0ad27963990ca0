"""Who may come in, as whom, and how much of it: API keys, their tenants and their limits.

    gate = Gate(Path("keys.json"), keyless=("/health",))
    create_app(state)                    # mounts gate.middleware when state.gate is there
    caller = caller_of(request)          # in a handler: whose request it is; None: no keys are asked for

Keys come as `Authorization: Bearer …` or `x-api-key`. The file is looked at again when a request comes, once a second
at most, so that a key that was made or revoked counts without a restart; one that cannot be read changes nothing. A
tenant's cache salt is made from its name, whatever salt a request names beside it: tenants share no prefix, neither
at the workers nor in this router's tokenizer. State is one small object a key of the file, and no more.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from aiohttp import web

from tokenrelay.base.errors import ConfigError, Forbidden, InvalidRequest, RateLimited, TokenRelayError, Unauthenticated
from tokenrelay.base.logging import get_logger
from tokenrelay.services.router import limits
from tokenrelay.services.router.keys import KEY_CHARS_MAX, KeyBook, KeyRecord, read_keys
from tokenrelay.services.router.rates import Bucket
from tokenrelay.services.router.validate import Wanted, check_range

log = get_logger("router")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LOOK_S = 1.0
LOOK_AGAIN_S = 0.02  # after a key that nobody has
COMPLAIN_S = 10.0  # between two lines about keys that nobody has
CONCURRENCY_RETRY_S = 1.0
CALLER = "caller"
SESSION_HEADER = "X-Session-Id"
PRIORITY_HEADER = "X-Priority"
TPS_FLOOR_HEADER = "X-TPS-Floor"
EXPECTED_HEADER = "X-Expected-Output-Tokens"
# What a key is for. Everything else that has no place in `keyless` shows more than one tenant's: for admins.
API_PATHS = ("/v1/", "/tokenize", "/detokenize", "/openapi.json")


class Costs(Protocol):
    """A run (generation.py), as far as its cost is concerned."""

    error: TokenRelayError | None

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Of its prompts, of those in a cache, and of the output until now."""


class Caller:
    """One key while it is in the file: limits, what is used of them, and what it cost. Event loop only."""

    def __init__(self, record: KeyRecord, now_s: float) -> None:
        self.record = record
        self.requests = Bucket(record.requests_per_minute, now_s)
        self.tokens = Bucket(record.tokens_per_minute, now_s)
        self.open = 0
        self._charged: set[Costs] = set()
        self.counts: Counter[str] = Counter()  # requests, prompt, cached and output tokens
        self.refused: Counter[str] = Counter()  # by limit
        self._set_tenant()

    def change(self, record: KeyRecord, now_s: float) -> None:
        """The file says something else about it."""
        self.record = record
        self.requests.change(record.requests_per_minute, now_s)
        self.tokens.change(record.tokens_per_minute, now_s)
        self._set_tenant()

    def _set_tenant(self) -> None:
        owner = self.record.owner.encode()
        self.tenant = hashlib.blake2b(owner, digest_size=16, person=b"tr-tenant").digest()
        self._salt_key = hashlib.blake2b(owner, digest_size=32, person=b"tr-salt").digest()
        self.salt = self.salt_of(b"")

    def salt_of(self, salt: bytes) -> bytes:
        """The cache salt of its requests that name this one: 32 bytes, no other tenant's whatever they name."""
        return hashlib.blake2b(salt, digest_size=32, key=self._salt_key).digest()

    def enter(self, now_s: float) -> None:
        """Count a request in; `leave` must follow. Raises RateLimited that says which limit, and when to come again."""
        record = self.record
        if record.concurrency and self.open >= record.concurrency:
            self._refuse("concurrency", f"{self.open} requests are in work, its most", CONCURRENCY_RETRY_S)
        for limit, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            wait_s = bucket.wait_s(now_s)
            if wait_s:
                self._refuse(limit, f"{bucket.per_minute} {limit} a minute are used", wait_s)
        self.requests.take(1, now_s)
        self.counts["requests"] += 1
        self.open += 1

    def _refuse(self, limit: str, why: str, wait_s: float) -> None:
        self.refused[limit] += 1
        message = f"the limit of key {self.record.name!r} is reached: {why}; try again in {math.ceil(wait_s)} s"
        raise RateLimited(message, retry_after_s=wait_s)

    def leave(self) -> None:
        """The request has its reply."""
        self.open -= 1

    def begin(self, run: Costs) -> None:
        """Prompts are at the workers: their tokens count until it is known how many a cache had."""
        self._charged.add(run)
        self.tokens.take(run.tokens[0], time.monotonic())

    def end(self, run: Costs) -> None:
        """What it came to; to be called before it is closed. What the workers refused or lost costs nothing."""
        if run not in self._charged:
            return
        self._charged.discard(run)
        prompt_tokens, cached_tokens, output_tokens = run.tokens
        if run.error is not None and not output_tokens:
            cached_tokens = prompt_tokens
        self.tokens.take(output_tokens - cached_tokens, time.monotonic())
        self.counts["prompt"] += prompt_tokens
        self.counts["cached"] += cached_tokens
        self.counts["output"] += output_tokens


class Gate:
    """All keys of one router. Event loop only."""

    def __init__(self, path: Path, *, keyless: tuple[str, ...] = ()) -> None:
        """Reads the file. Raises ConfigError. `keyless`: paths that need no key; one that ends in / with all below."""
        self._path = path
        self._keyless = frozenset(keyless)
        self._keyless_below = tuple(one for one in keyless if one.endswith("/") and one != "/")
        self.callers: dict[str, Caller] = {}
        self.refused: Counter[str] = Counter()  # missing, wrong, forbidden
        self.reloads = 0
        self._stamp = self._stamp_now()
        self._looked_s = time.monotonic()
        self._complained_s = -math.inf
        self._take(read_keys(path))

    # -- requests -----------------------------------------------------------------------------------------------------
    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets a request in, as its key's caller, within its limits. Raises Unauthenticated, Forbidden, RateLimited."""
        path = request.path
        if path in self._keyless or (self._keyless_below and path.startswith(self._keyless_below)):
            return await handler(request)
        now_s = time.monotonic()
        caller = self.authenticate(request.headers, now_s)
        if not (caller.record.admin or path.startswith(API_PATHS)):
            self.refused["forbidden"] += 1
            raise Forbidden(f"{path[:256]} is for keys of admins: key {caller.record.name!r} is none")
        request[CALLER] = caller
        if request.method != "POST":
            return await handler(request)
        caller.enter(now_s)
        try:
            return await handler(request)
        finally:
            caller.leave()

    def authenticate(self, headers: Mapping[str, str], now_s: float) -> Caller:
        """Whose key the headers show. Raises Unauthenticated."""
        if now_s - self._looked_s >= LOOK_S:
            self._look(now_s)
        key = _key_in(headers)
        if not key:
            self.refused["missing"] += 1
            raise Unauthenticated("an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY")
        record = self._book.find(key) if len(key) <= KEY_CHARS_MAX else None
        if record is None and now_s - self._looked_s >= LOOK_AGAIN_S:  # it may have been made just now
            self._look(now_s)
            record = self._book.find(key) if len(key) <= KEY_CHARS_MAX else None
        if record is None:
            self.refused["wrong"] += 1
            if now_s - self._complained_s >= COMPLAIN_S:
                self._complained_s = now_s
                log.warning("a key that nobody has", refused=self.refused["wrong"])
            raise Unauthenticated("the API key is not valid")
        return self.callers[record.id]

    # -- the file -----------------------------------------------------------------------------------------------------
    def _look(self, now_s: float) -> None:
        self._looked_s = now_s
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(read_keys(self._path))
        except ConfigError as error:
            log.error("the keys stay as they were", reason=error.message)
            return
        self.reloads += 1
        log.info("keys read again", keys=len(self.callers))

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _take(self, records: list[KeyRecord]) -> None:
        now_s, old = time.monotonic(), self.callers
        self._book = KeyBook(records)
        self.callers = {}
        for record in records:
            caller = old.get(record.id)
            if caller is None:
                caller = Caller(record, now_s)
            elif caller.record != record:
                caller.change(record, now_s)
            self.callers[record.id] = caller


def _key_in(headers: Mapping[str, str]) -> str:
    """The key; empty: none is there."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    return headers.get("X-Api-Key", "")


def caller_of(request: web.Request) -> Caller | None:
    """Whose request it is; None: this router asks for no keys."""
    found: Caller | None = request.get(CALLER)
    return found


def as_caller(request: web.Request, wanted: Wanted, tps_floor_max: int) -> Wanted:
    """What is wanted, headers included, within what its key may have: the tenant's salt, no better class and no higher
    floor than the key's. Raises InvalidRequest for a header that says nothing.
    """
    headers, caller = request.headers, caller_of(request)
    if SESSION_HEADER in headers:
        wanted = replace(wanted, session=headers[SESSION_HEADER].encode("utf-8", "surrogateescape"))
    if PRIORITY_HEADER in headers:
        wanted = replace(wanted, priority=_number(headers, PRIORITY_HEADER, limits.PRIORITY))
    if EXPECTED_HEADER in headers:
        wanted = replace(wanted, expected_tokens=_number(headers, EXPECTED_HEADER, limits.EXPECTED_TOKENS))
    if TPS_FLOOR_HEADER in headers:
        wanted = replace(wanted, tps_floor=_number(headers, TPS_FLOOR_HEADER, limits.TPS_FLOOR))
    if caller is not None and caller.record.tps_floor:
        tps_floor_max = min(tps_floor_max, caller.record.tps_floor)
    if wanted.tps_floor > tps_floor_max:
        wanted = replace(wanted, tps_floor=tps_floor_max)
    if caller is None:
        return wanted
    salt = caller.salt_of(wanted.salt) if wanted.salt else caller.salt
    return replace(wanted, salt=salt, priority=max(wanted.priority, caller.record.priority))


def _number(headers: Mapping[str, str], name: str, bounds: tuple[int, int]) -> int:
    """A header's whole number. Raises InvalidRequest that names it."""
    try:
        value = int(headers[name])
    except ValueError:
        raise InvalidRequest(f"{name} is not a whole number", param=name) from None
    check_range(name, value, bounds)
    return value


def salt_of(request: web.Request) -> bytes:
    """The cache salt of a request that names none."""
    caller = caller_of(request)
    return caller.salt if caller is not None else b""
