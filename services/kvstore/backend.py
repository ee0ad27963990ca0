"""The etcd backend of a kvstore: reign, write down, take over.

    backend = EtcdBackend(config, store, address, end_sessions)
    backend.start()

Keys, under the fleet's prefix: `leader` (bound to the lease), `term`, `hash_key`, `members/<name>`, `handles/<number>`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from google.protobuf.message import DecodeError

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Actor, HandleView, Member
from tokenrelay.ledger.etcd import EtcdStore, StoreError
from tokenrelay.ledger.journal import Journal
from tokenrelay.ledger.recovery import Recovery
from tokenrelay.ledger.reign import Reign
from tokenrelay.ledger.states import TERMINAL
from tokenrelay.ledger.wire import Malformed, pack_member, pack_view, to_ms, unpack_member, unpack_view
from tokenrelay.proto import kvstore_pb2 as pb
from tokenrelay.services.kvstore.config import KvstoreConfig
from tokenrelay.services.kvstore.store import Store

log = get_logger("kvstore")

DURABLE_TIMEOUTS = 1.5  # of etcd_timeout_s: a first try that failed, and a second one begun


class EtcdBackend:
    """What makes one kvstore of several the active one."""

    def __init__(
        self,
        config: KvstoreConfig,
        store: Store,
        address: Callable[[], str],
        end_sessions: Callable[[str], None],
    ) -> None:
        self._config = config
        self._store = store
        self._end_sessions = end_sessions
        self._prefix = config.etcd_prefix.encode()
        self._recovery: Recovery | None = None
        self._whole = True  # this process's memory is not left over from half a takeover
        self.etcd = EtcdStore(config.etcd, timeout_s=config.etcd_timeout_s)
        self.reign = Reign(
            self.etcd, prefix=self._prefix, address=address, incarnation=store.incarnation, lease_s=config.lease_s
        )
        self.journal = Journal(self.etcd, guard=lambda: self.reign.guard, on_foreign=self.reign.lost)
        self.reign.on_begin, self.reign.on_end = self._begin, self._end
        self.reign.on_pause, self.reign.on_resume = self._pause, self._resume
        store.active, store.remembers = False, True
        store.active_address = lambda: self.reign.leader.address if self.reign.leader else ""
        store.durable = lambda: self.journal.flushed(DURABLE_TIMEOUTS * config.etcd_timeout_s)
        store.host.authority = self.reign.refusal
        store.host.on_handle = self._write_handle
        store.host.on_member = self._write_member
        store.host.suspend("this kvstore is not the active one")

    def start(self) -> None:
        """Stand by from now on."""
        self.reign.start()

    async def drain(self, timeout_s: float) -> None:
        """Write everything down, and let a standby begin at once."""
        if self._store.active and not await self.journal.flushed(timeout_s):
            log.warning("not everything was written down", keys=len(self.journal))
        await self.reign.stop(resign=True)

    async def stop(self) -> None:
        """End it."""
        await self.reign.stop(resign=False)
        await self.journal.stop()
        if self._recovery is not None:
            self._recovery.cancel()
        await self.etcd.close()

    # -- the reign ----------------------------------------------------------------------------------------------------
    async def _begin(self, continued: bool) -> None:
        """This process reigns now. Raises StoreError when what is written cannot be read."""
        store, term = self._store, self.reign.term
        if continued and self._whole:
            store.active = True
            self.journal.start()
            self._resume()
            return
        self.journal.clear()
        hash_key = await self._hash_key()
        members, handles = await self._read()
        store.host.begin_anew(term, hash_key)
        store.directory.clear()
        try:
            self._recovery = Recovery(store.host, members, handles, self._recovered)
        except ValueError as error:
            raise StoreError(f"what is written under {self._prefix!r} makes no sense: {error}") from error
        store.attach = self._recovery.attach
        store.active = True
        self.journal.start()
        self._whole = True
        self._recovery.start()

    def _recovered(self, missing: list[Actor]) -> None:
        self._store.attach = None
        self._store.host.end(missing, "it did not come back to the kvstore that took over")
        self._resume()

    def _resume(self) -> None:
        if self.reign.refusal() is None and (self._recovery is None or self._recovery.finished):
            self._store.host.resume(self.reign.term)

    def _pause(self, reason: str) -> None:
        self._store.host.suspend(reason)

    def _end(self, reason: str) -> None:
        """Another one may reign from now on."""
        self._store.active = False
        self._store.attach = None
        self._store.host.suspend(reason)
        if self._recovery is not None and not self._recovery.finished:
            self._recovery.cancel()
            self._whole = False
        self._end_sessions(f"this kvstore is not the active one any more: {reason}")

    # -- what is written ----------------------------------------------------------------------------------------------
    def _write_handle(self, view: HandleView) -> None:
        value = None if view.state in TERMINAL else pack_view(view).SerializeToString()
        self.journal.put(self._prefix + b"handles/%d" % view.handle.number, value)

    def _write_member(self, member: Member, lease_s: float) -> None:
        self._store.member_changed(member, lease_s)
        value = None
        if lease_s:
            value = pb.KvJoin(member=pack_member(member), lease_ms=to_ms(lease_s)).SerializeToString()
        self.journal.put(self._prefix + b"members/" + member.name.encode(), value)

    async def _read(self) -> tuple[list[tuple[Member, float]], list[HandleView]]:
        members, handles = await asyncio.gather(
            self.etcd.get_prefix(self._prefix + b"members/"), self.etcd.get_prefix(self._prefix + b"handles/")
        )
        try:
            joins = [pb.KvJoin.FromString(value) for value in members.values()]
            views = [unpack_view(pb.KvHandleView.FromString(value)) for value in handles.values()]
        except (DecodeError, Malformed) as error:
            raise StoreError(f"what is written under {self._prefix!r} is not ours: {error}") from error
        return [(unpack_member(join.member), join.lease_ms / 1000) for join in joins], views

    async def _hash_key(self) -> bytes:
        """The fleet's, made once."""
        key = self._prefix + b"hash_key"
        found = await self.etcd.get(key)
        if found is None:
            await self.etcd.swap({key: None, **self.reign.guard}, puts={key: secrets.token_bytes(16)})
            found = await self.etcd.get(key)
        if found is None or len(found) != 16:
            raise StoreError(f"{key!r} is {found!r}, expected 16 bytes")
        return found
