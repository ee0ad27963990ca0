from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvActor(_message.Message):
    __slots__ = ("name", "incarnation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class KvHandle(_message.Message):
    __slots__ = ("number", "generation", "term")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    number: int
    generation: int
    term: int
    def __init__(self, number: _Optional[int] = ..., generation: _Optional[int] = ..., term: _Optional[int] = ...) -> None: ...

class KvMember(_message.Message):
    __slots__ = ("actor", "role", "address", "model_identity", "dtype", "block_tokens", "layout", "width", "protocol")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    actor: KvActor
    role: str
    address: str
    model_identity: bytes
    dtype: str
    block_tokens: int
    layout: str
    width: int
    protocol: int
    def __init__(self, actor: _Optional[_Union[KvActor, _Mapping]] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., model_identity: _Optional[bytes] = ..., dtype: _Optional[str] = ..., block_tokens: _Optional[int] = ..., layout: _Optional[str] = ..., width: _Optional[int] = ..., protocol: _Optional[int] = ...) -> None: ...

class KvHandleView(_message.Message):
    __slots__ = ("handle", "state", "owner", "claimant", "extents", "sealed", "deadline_left_ms")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    CLAIMANT_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    handle: KvHandle
    state: str
    owner: KvActor
    claimant: KvActor
    extents: int
    sealed: int
    deadline_left_ms: int
    def __init__(self, handle: _Optional[_Union[KvHandle, _Mapping]] = ..., state: _Optional[str] = ..., owner: _Optional[_Union[KvActor, _Mapping]] = ..., claimant: _Optional[_Union[KvActor, _Mapping]] = ..., extents: _Optional[int] = ..., sealed: _Optional[int] = ..., deadline_left_ms: _Optional[int] = ...) -> None: ...

class KvRejection(_message.Message):
    __slots__ = ("code", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: str
    reason: str
    def __init__(self, code: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class KvHello(_message.Message):
    __slots__ = ("client", "version", "term_seen")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TERM_SEEN_FIELD_NUMBER: _ClassVar[int]
    client: str
    version: str
    term_seen: int
    def __init__(self, client: _Optional[str] = ..., version: _Optional[str] = ..., term_seen: _Optional[int] = ...) -> None: ...

class KvWelcome(_message.Message):
    __slots__ = ("incarnation", "term", "version", "resumed")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    term: int
    version: str
    resumed: bool
    def __init__(self, incarnation: _Optional[str] = ..., term: _Optional[int] = ..., version: _Optional[str] = ..., resumed: _Optional[bool] = ...) -> None: ...

class KvCalls(_message.Message):
    __slots__ = ("hello", "calls")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    hello: KvHello
    calls: _containers.RepeatedCompositeFieldContainer[KvCall]
    def __init__(self, hello: _Optional[_Union[KvHello, _Mapping]] = ..., calls: _Optional[_Iterable[_Union[KvCall, _Mapping]]] = ...) -> None: ...

class KvCall(_message.Message):
    __slots__ = ("number", "join", "attach", "keepalive", "leave", "reserve", "move", "watch", "unwatch", "view", "views", "members", "publish", "resync")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    KEEPALIVE_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    WATCH_FIELD_NUMBER: _ClassVar[int]
    UNWATCH_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    RESYNC_FIELD_NUMBER: _ClassVar[int]
    number: int
    join: KvJoin
    attach: KvAttach
    keepalive: KvActor
    leave: KvActor
    reserve: KvReserve
    move: KvMove
    watch: KvActor
    unwatch: KvActor
    view: KvHandle
    views: KvViews
    members: KvMembers
    publish: KvPublish
    resync: KvResync
    def __init__(self, number: _Optional[int] = ..., join: _Optional[_Union[KvJoin, _Mapping]] = ..., attach: _Optional[_Union[KvAttach, _Mapping]] = ..., keepalive: _Optional[_Union[KvActor, _Mapping]] = ..., leave: _Optional[_Union[KvActor, _Mapping]] = ..., reserve: _Optional[_Union[KvReserve, _Mapping]] = ..., move: _Optional[_Union[KvMove, _Mapping]] = ..., watch: _Optional[_Union[KvActor, _Mapping]] = ..., unwatch: _Optional[_Union[KvActor, _Mapping]] = ..., view: _Optional[_Union[KvHandle, _Mapping]] = ..., views: _Optional[_Union[KvViews, _Mapping]] = ..., members: _Optional[_Union[KvMembers, _Mapping]] = ..., publish: _Optional[_Union[KvPublish, _Mapping]] = ..., resync: _Optional[_Union[KvResync, _Mapping]] = ...) -> None: ...

class KvJoin(_message.Message):
    __slots__ = ("member", "lease_ms")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    member: KvMember
    lease_ms: int
    def __init__(self, member: _Optional[_Union[KvMember, _Mapping]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class KvAttach(_message.Message):
    __slots__ = ("member", "lease_ms", "handles", "hash_key")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    HASH_KEY_FIELD_NUMBER: _ClassVar[int]
    member: KvMember
    lease_ms: int
    handles: _containers.RepeatedCompositeFieldContainer[KvHandleView]
    hash_key: bytes
    def __init__(self, member: _Optional[_Union[KvMember, _Mapping]] = ..., lease_ms: _Optional[int] = ..., handles: _Optional[_Iterable[_Union[KvHandleView, _Mapping]]] = ..., hash_key: _Optional[bytes] = ...) -> None: ...

class KvReserve(_message.Message):
    __slots__ = ("owner", "extents", "deadline_ms")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    owner: KvActor
    extents: int
    deadline_ms: int
    def __init__(self, owner: _Optional[_Union[KvActor, _Mapping]] = ..., extents: _Optional[int] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class KvMove(_message.Message):
    __slots__ = ("event", "handle", "actor", "deadline_ms", "extents")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    event: str
    handle: KvHandle
    actor: KvActor
    deadline_ms: int
    extents: int
    def __init__(self, event: _Optional[str] = ..., handle: _Optional[_Union[KvHandle, _Mapping]] = ..., actor: _Optional[_Union[KvActor, _Mapping]] = ..., deadline_ms: _Optional[int] = ..., extents: _Optional[int] = ...) -> None: ...

class KvViews(_message.Message):
    __slots__ = ("actor",)
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    actor: KvActor
    def __init__(self, actor: _Optional[_Union[KvActor, _Mapping]] = ...) -> None: ...

class KvMembers(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvPublish(_message.Message):
    __slots__ = ("actor", "sequence", "kinds", "block_hashes")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    actor: KvActor
    sequence: int
    kinds: bytes
    block_hashes: bytes
    def __init__(self, actor: _Optional[_Union[KvActor, _Mapping]] = ..., sequence: _Optional[int] = ..., kinds: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ...) -> None: ...

class KvResync(_message.Message):
    __slots__ = ("actor", "sequence", "page", "last", "block_hashes")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    actor: KvActor
    sequence: int
    page: int
    last: bool
    block_hashes: bytes
    def __init__(self, actor: _Optional[_Union[KvActor, _Mapping]] = ..., sequence: _Optional[int] = ..., page: _Optional[int] = ..., last: _Optional[bool] = ..., block_hashes: _Optional[bytes] = ...) -> None: ...

class KvReplies(_message.Message):
    __slots__ = ("welcome", "replies", "notices")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    welcome: KvWelcome
    replies: _containers.RepeatedCompositeFieldContainer[KvReply]
    notices: _containers.RepeatedCompositeFieldContainer[KvNotice]
    def __init__(self, welcome: _Optional[_Union[KvWelcome, _Mapping]] = ..., replies: _Optional[_Iterable[_Union[KvReply, _Mapping]]] = ..., notices: _Optional[_Iterable[_Union[KvNotice, _Mapping]]] = ...) -> None: ...

class KvReply(_message.Message):
    __slots__ = ("number", "rejection", "joined", "handle", "view", "views", "members", "applied")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REJECTION_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    number: int
    rejection: KvRejection
    joined: KvJoined
    handle: KvHandle
    view: KvHandleView
    views: KvHandleViews
    members: KvMemberList
    applied: str
    def __init__(self, number: _Optional[int] = ..., rejection: _Optional[_Union[KvRejection, _Mapping]] = ..., joined: _Optional[_Union[KvJoined, _Mapping]] = ..., handle: _Optional[_Union[KvHandle, _Mapping]] = ..., view: _Optional[_Union[KvHandleView, _Mapping]] = ..., views: _Optional[_Union[KvHandleViews, _Mapping]] = ..., members: _Optional[_Union[KvMemberList, _Mapping]] = ..., applied: _Optional[str] = ...) -> None: ...

class KvJoined(_message.Message):
    __slots__ = ("term", "lease_ms", "hash_key")
    TERM_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    HASH_KEY_FIELD_NUMBER: _ClassVar[int]
    term: int
    lease_ms: int
    hash_key: bytes
    def __init__(self, term: _Optional[int] = ..., lease_ms: _Optional[int] = ..., hash_key: _Optional[bytes] = ...) -> None: ...

class KvHandleViews(_message.Message):
    __slots__ = ("views",)
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    views: _containers.RepeatedCompositeFieldContainer[KvHandleView]
    def __init__(self, views: _Optional[_Iterable[_Union[KvHandleView, _Mapping]]] = ...) -> None: ...

class KvMemberList(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[KvMember]
    def __init__(self, members: _Optional[_Iterable[_Union[KvMember, _Mapping]]] = ...) -> None: ...

class KvNotice(_message.Message):
    __slots__ = ("to", "snapshot", "changed", "joined", "ended", "due", "suspended")
    TO_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    DUE_FIELD_NUMBER: _ClassVar[int]
    SUSPENDED_FIELD_NUMBER: _ClassVar[int]
    to: KvActor
    snapshot: KvSnapshot
    changed: KvHandleView
    joined: KvMember
    ended: KvEnded
    due: KvDuty
    suspended: str
    def __init__(self, to: _Optional[_Union[KvActor, _Mapping]] = ..., snapshot: _Optional[_Union[KvSnapshot, _Mapping]] = ..., changed: _Optional[_Union[KvHandleView, _Mapping]] = ..., joined: _Optional[_Union[KvMember, _Mapping]] = ..., ended: _Optional[_Union[KvEnded, _Mapping]] = ..., due: _Optional[_Union[KvDuty, _Mapping]] = ..., suspended: _Optional[str] = ...) -> None: ...

class KvSnapshot(_message.Message):
    __slots__ = ("term", "members", "handles")
    TERM_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    term: int
    members: _containers.RepeatedCompositeFieldContainer[KvMember]
    handles: _containers.RepeatedCompositeFieldContainer[KvHandleView]
    def __init__(self, term: _Optional[int] = ..., members: _Optional[_Iterable[_Union[KvMember, _Mapping]]] = ..., handles: _Optional[_Iterable[_Union[KvHandleView, _Mapping]]] = ...) -> None: ...

class KvEnded(_message.Message):
    __slots__ = ("actor", "reason")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    actor: KvActor
    reason: str
    def __init__(self, actor: _Optional[_Union[KvActor, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class KvDuty(_message.Message):
    __slots__ = ("handle", "duty")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    DUTY_FIELD_NUMBER: _ClassVar[int]
    handle: KvHandle
    duty: str
    def __init__(self, handle: _Optional[_Union[KvHandle, _Mapping]] = ..., duty: _Optional[str] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HoldingPages(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: _containers.RepeatedCompositeFieldContainer[HoldingPage]
    def __init__(self, pages: _Optional[_Iterable[_Union[HoldingPage, _Mapping]]] = ...) -> None: ...

class HoldingPage(_message.Message):
    __slots__ = ("actor", "sequence", "kinds", "block_hashes", "replaces", "ended")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    REPLACES_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    actor: KvActor
    sequence: int
    kinds: bytes
    block_hashes: bytes
    replaces: bool
    ended: bool
    def __init__(self, actor: _Optional[_Union[KvActor, _Mapping]] = ..., sequence: _Optional[int] = ..., kinds: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ..., replaces: _Optional[bool] = ..., ended: _Optional[bool] = ...) -> None: ...

class PutBlockRequest(_message.Message):
    __slots__ = ("block_hash", "layout", "payload", "checksum")
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    block_hash: bytes
    layout: str
    payload: bytes
    checksum: bytes
    def __init__(self, block_hash: _Optional[bytes] = ..., layout: _Optional[str] = ..., payload: _Optional[bytes] = ..., checksum: _Optional[bytes] = ...) -> None: ...

class PutBlockReply(_message.Message):
    __slots__ = ("rejection",)
    REJECTION_FIELD_NUMBER: _ClassVar[int]
    rejection: KvRejection
    def __init__(self, rejection: _Optional[_Union[KvRejection, _Mapping]] = ...) -> None: ...

class GetBlockRequest(_message.Message):
    __slots__ = ("block_hash", "layout")
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    block_hash: bytes
    layout: str
    def __init__(self, block_hash: _Optional[bytes] = ..., layout: _Optional[str] = ...) -> None: ...

class GetBlockReply(_message.Message):
    __slots__ = ("found", "payload", "checksum")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    found: bool
    payload: bytes
    checksum: bytes
    def __init__(self, found: _Optional[bool] = ..., payload: _Optional[bytes] = ..., checksum: _Optional[bytes] = ...) -> None: ...

class CountBlocksRequest(_message.Message):
    __slots__ = ("block_hashes", "layout")
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    block_hashes: bytes
    layout: str
    def __init__(self, block_hashes: _Optional[bytes] = ..., layout: _Optional[str] = ...) -> None: ...

class CountBlocksReply(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class KvStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvStatus(_message.Message):
    __slots__ = ("incarnation", "role", "backend", "term", "members", "handles_open", "active_address", "reason")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    HANDLES_OPEN_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    role: str
    backend: str
    term: int
    members: int
    handles_open: int
    active_address: str
    reason: str
    def __init__(self, incarnation: _Optional[str] = ..., role: _Optional[str] = ..., backend: _Optional[str] = ..., term: _Optional[int] = ..., members: _Optional[int] = ..., handles_open: _Optional[int] = ..., active_address: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
