"""Between the ledger's values and the wire's messages (proto/kvstore.proto). Raises Malformed for what is neither."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tokenrelay.ledger.api import (
    Actor,
    CacheEvent,
    Code,
    Duty,
    DutyDue,
    Handle,
    HandleChanged,
    HandleView,
    Joined,
    Member,
    MemberEnded,
    MemberJoined,
    Notice,
    Rejection,
    Snapshot,
    State,
    Suspended,
)
from tokenrelay.proto import kvstore_pb2 as pb

HASH_BYTES = 16
ACTIVE_KVSTORE_KEY = "tokenrelay-active-kvstore"  # trailing metadata of a standby's refusal: where the active one is
_KINDS = {"sealed": 1, "evicted": 2}
_KIND_NAMES = {number: name for name, number in _KINDS.items()}


class Malformed(ValueError):
    """A message that no version of this protocol sends."""


def to_ms(duration_s: float) -> int:
    """Whole milliseconds, upwards: a duration that is not over never travels as 0."""
    return math.ceil(duration_s * 1000)


def pack_actor(actor: Actor) -> pb.KvActor:
    """To the wire."""
    return pb.KvActor(name=actor.name, incarnation=actor.incarnation)


def unpack_actor(message: pb.KvActor) -> Actor:
    """From the wire."""
    return Actor(message.name, message.incarnation)


def pack_handle(handle: Handle) -> pb.KvHandle:
    """To the wire."""
    return pb.KvHandle(number=handle.number, generation=handle.generation, term=handle.term)


def unpack_handle(message: pb.KvHandle) -> Handle:
    """From the wire."""
    return Handle(message.number, message.generation, message.term)


def pack_member(member: Member) -> pb.KvMember:
    """To the wire."""
    return pb.KvMember(
        actor=pack_actor(member.actor),
        role=member.role,
        address=member.address,
        model_identity=member.model_identity,
        dtype=member.dtype,
        block_tokens=member.block_tokens,
        layout=member.layout,
        width=member.width,
        protocol=member.protocol,
    )


def unpack_member(message: pb.KvMember) -> Member:
    """From the wire."""
    return Member(
        name=message.actor.name,
        incarnation=message.actor.incarnation,
        role=message.role,
        address=message.address,
        model_identity=message.model_identity,
        dtype=message.dtype,
        block_tokens=message.block_tokens,
        layout=message.layout,
        width=message.width,
        protocol=message.protocol,
    )


def pack_view(view: HandleView) -> pb.KvHandleView:
    """To the wire."""
    message = pb.KvHandleView(
        handle=pack_handle(view.handle),
        state=view.state.value,
        extents=view.extents,
        sealed=view.sealed,
        deadline_left_ms=to_ms(view.deadline_left_s),
    )
    if view.owner is not None:
        message.owner.CopyFrom(pack_actor(view.owner))
    if view.claimant is not None:
        message.claimant.CopyFrom(pack_actor(view.claimant))
    return message


def unpack_view(message: pb.KvHandleView) -> HandleView:
    """From the wire. Raises Malformed for a state nobody knows."""
    try:
        state = State(message.state)
    except ValueError as error:
        raise Malformed(f"state {message.state!r}") from error
    return HandleView(
        unpack_handle(message.handle),
        state,
        unpack_actor(message.owner) if message.HasField("owner") else None,
        unpack_actor(message.claimant) if message.HasField("claimant") else None,
        message.extents,
        message.sealed,
        message.deadline_left_ms / 1000,
    )


def pack_rejection(rejection: Rejection) -> pb.KvRejection:
    """To the wire."""
    return pb.KvRejection(code=rejection.code.value, reason=rejection.reason)


def unpack_rejection(message: pb.KvRejection) -> Rejection:
    """From the wire; a code of a newer version is UNAVAILABLE: the one that claims to know nothing."""
    try:
        return Rejection(Code(message.code), message.reason)
    except ValueError:
        return Rejection(Code.UNAVAILABLE, f"{message.code}: {message.reason}")


def unpack_joined(message: pb.KvJoined) -> Joined:
    """From the wire."""
    return Joined(message.term, message.lease_ms / 1000, message.hash_key)


def pack_notice(to: Actor, notice: Notice) -> pb.KvNotice:
    """To the wire."""
    message = pb.KvNotice(to=pack_actor(to))
    match notice:
        case Snapshot(term, members, handles):
            message.snapshot.CopyFrom(
                pb.KvSnapshot(
                    term=term, members=map(pack_member, members), handles=[pack_view(view) for view in handles]
                )
            )
        case HandleChanged(view):
            message.changed.CopyFrom(pack_view(view))
        case MemberJoined(member):
            message.joined.CopyFrom(pack_member(member))
        case MemberEnded(actor, reason):
            message.ended.CopyFrom(pb.KvEnded(actor=pack_actor(actor), reason=reason))
        case DutyDue(handle, duty):
            message.due.CopyFrom(pb.KvDuty(handle=pack_handle(handle), duty=duty.value))
        case Suspended(reason):
            message.suspended = reason
    return message


def unpack_notice(message: pb.KvNotice) -> Notice:
    """From the wire. Raises Malformed."""
    kind = message.WhichOneof("notice")
    match kind:
        case "snapshot":
            found = message.snapshot
            return Snapshot(
                found.term, tuple(map(unpack_member, found.members)), tuple(map(unpack_view, found.handles))
            )
        case "changed":
            return HandleChanged(unpack_view(message.changed))
        case "joined":
            return MemberJoined(unpack_member(message.joined))
        case "ended":
            return MemberEnded(unpack_actor(message.ended.actor), message.ended.reason)
        case "due":
            try:
                return DutyDue(unpack_handle(message.due.handle), Duty(message.due.duty))
            except ValueError as error:
                raise Malformed(f"duty {message.due.duty!r}") from error
        case "suspended":
            return Suspended(message.suspended)
        case _:
            raise Malformed("a notice without content")


def pack_events(events: Iterable[CacheEvent]) -> tuple[bytes, bytes]:
    """(kinds, block_hashes): one byte and 16 bytes an event."""
    kinds, hashes = bytearray(), bytearray()
    for kind, block_hash in events:
        kinds.append(_KINDS[kind])
        hashes += block_hash
    return bytes(kinds), bytes(hashes)


def unpack_events(kinds: bytes, hashes: bytes) -> list[CacheEvent]:
    """From the wire. Raises Malformed when the two do not fit."""
    if len(hashes) != HASH_BYTES * len(kinds):
        raise Malformed(f"{len(kinds)} events with {len(hashes)} bytes of hashes")
    try:
        return [(_KIND_NAMES[kind], hashes[HASH_BYTES * i : HASH_BYTES * (i + 1)]) for i, kind in enumerate(kinds)]
    except KeyError as error:
        raise Malformed(f"an event of kind {error.args[0]}") from error


def unpack_hashes(hashes: bytes) -> list[bytes]:
    """From the wire. Raises Malformed for a part of one."""
    if len(hashes) % HASH_BYTES:
        raise Malformed(f"{len(hashes)} bytes of hashes")
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def pack_hashes(block_hashes: Sequence[bytes]) -> bytes:
    """To the wire."""
    return b"".join(block_hashes)
