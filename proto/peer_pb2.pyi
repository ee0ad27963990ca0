from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvOffer(_message.Message):
    __slots__ = ("number", "generation", "term", "sequence", "owner", "incarnation", "address", "endpoints", "preferred", "tokens")
    class EndpointsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    number: int
    generation: int
    term: int
    sequence: int
    owner: str
    incarnation: str
    address: str
    endpoints: _containers.ScalarMap[str, bytes]
    preferred: str
    tokens: int
    def __init__(self, number: _Optional[int] = ..., generation: _Optional[int] = ..., term: _Optional[int] = ..., sequence: _Optional[int] = ..., owner: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., endpoints: _Optional[_Mapping[str, bytes]] = ..., preferred: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class FollowHandle(_message.Message):
    __slots__ = ("number", "generation", "term", "sequence", "incarnation", "claimant", "claimant_incarnation")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CLAIMANT_FIELD_NUMBER: _ClassVar[int]
    CLAIMANT_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    number: int
    generation: int
    term: int
    sequence: int
    incarnation: str
    claimant: str
    claimant_incarnation: str
    def __init__(self, number: _Optional[int] = ..., generation: _Optional[int] = ..., term: _Optional[int] = ..., sequence: _Optional[int] = ..., incarnation: _Optional[str] = ..., claimant: _Optional[str] = ..., claimant_incarnation: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("extents", "complete", "gone")
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    extents: Extents
    complete: Complete
    gone: Gone
    def __init__(self, extents: _Optional[_Union[Extents, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ..., gone: _Optional[_Union[Gone, _Mapping]] = ...) -> None: ...

class Extents(_message.Message):
    __slots__ = ("first", "blocks", "generations")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    first: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, first: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ("first_token",)
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    def __init__(self, first_token: _Optional[int] = ...) -> None: ...

class Gone(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: str
    def __init__(self, error: _Optional[str] = ...) -> None: ...
