from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransferLayout(_message.Message):
    __slots__ = ("model_identity", "dtype", "block_tokens", "layout", "block_bytes", "parallel_width")
    MODEL_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_WIDTH_FIELD_NUMBER: _ClassVar[int]
    model_identity: bytes
    dtype: str
    block_tokens: int
    layout: str
    block_bytes: _containers.RepeatedScalarFieldContainer[int]
    parallel_width: int
    def __init__(self, model_identity: _Optional[bytes] = ..., dtype: _Optional[str] = ..., block_tokens: _Optional[int] = ..., layout: _Optional[str] = ..., block_bytes: _Optional[_Iterable[int]] = ..., parallel_width: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("version", "name", "incarnation", "layout")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    version: int
    name: str
    incarnation: str
    layout: TransferLayout
    def __init__(self, version: _Optional[int] = ..., name: _Optional[str] = ..., incarnation: _Optional[str] = ..., layout: _Optional[_Union[TransferLayout, _Mapping]] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("session", "name", "incarnation", "layout", "blocks")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    name: str
    incarnation: str
    layout: TransferLayout
    blocks: int
    def __init__(self, session: _Optional[bytes] = ..., name: _Optional[str] = ..., incarnation: _Optional[str] = ..., layout: _Optional[_Union[TransferLayout, _Mapping]] = ..., blocks: _Optional[int] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("session", "layers", "blocks", "counts")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    layers: bytes
    blocks: bytes
    counts: bytes
    def __init__(self, session: _Optional[bytes] = ..., layers: _Optional[bytes] = ..., blocks: _Optional[bytes] = ..., counts: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data", "crc32", "checked")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    crc32: int
    checked: bool
    def __init__(self, data: _Optional[bytes] = ..., crc32: _Optional[int] = ..., checked: _Optional[bool] = ...) -> None: ...

class GenerationsRequest(_message.Message):
    __slots__ = ("session", "blocks")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    blocks: bytes
    def __init__(self, session: _Optional[bytes] = ..., blocks: _Optional[bytes] = ...) -> None: ...

class GenerationsReply(_message.Message):
    __slots__ = ("words",)
    WORDS_FIELD_NUMBER: _ClassVar[int]
    words: bytes
    def __init__(self, words: _Optional[bytes] = ...) -> None: ...
