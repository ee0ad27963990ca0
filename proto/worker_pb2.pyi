from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_NONE: _ClassVar[FinishReason]
    FINISH_STOP: _ClassVar[FinishReason]
    FINISH_LENGTH: _ClassVar[FinishReason]
    FINISH_ABORT: _ClassVar[FinishReason]
    FINISH_REJECTED: _ClassVar[FinishReason]
    FINISH_ERROR: _ClassVar[FinishReason]
    FINISH_HANDOVER: _ClassVar[FinishReason]

class RejectReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECT_NONE: _ClassVar[RejectReason]
    REJECT_QUEUE_FULL: _ClassVar[RejectReason]
    REJECT_PROMPT_TOO_LONG: _ClassVar[RejectReason]
    REJECT_DUPLICATE_ID: _ClassVar[RejectReason]
    REJECT_DRAINING: _ClassVar[RejectReason]
    REJECT_INVALID: _ClassVar[RejectReason]
    REJECT_PARENT_UNKNOWN: _ClassVar[RejectReason]
FINISH_NONE: FinishReason
FINISH_STOP: FinishReason
FINISH_LENGTH: FinishReason
FINISH_ABORT: FinishReason
FINISH_REJECTED: FinishReason
FINISH_ERROR: FinishReason
FINISH_HANDOVER: FinishReason
REJECT_NONE: RejectReason
REJECT_QUEUE_FULL: RejectReason
REJECT_PROMPT_TOO_LONG: RejectReason
REJECT_DUPLICATE_ID: RejectReason
REJECT_DRAINING: RejectReason
REJECT_INVALID: RejectReason
REJECT_PARENT_UNKNOWN: RejectReason

class HandshakeRequest(_message.Message):
    __slots__ = ("router_incarnation", "version")
    ROUTER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    router_incarnation: str
    version: str
    def __init__(self, router_incarnation: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class HandshakeReply(_message.Message):
    __slots__ = ("incarnation", "role", "version", "model_name", "model_path", "model_identity", "context_tokens", "block_tokens", "blocks", "slots", "waiting_max", "dtype", "device", "vocab_size", "eos_token_ids", "numerics", "next_turns", "grammars")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_MAX_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    NEXT_TURNS_FIELD_NUMBER: _ClassVar[int]
    GRAMMARS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    role: str
    version: str
    model_name: str
    model_path: str
    model_identity: bytes
    context_tokens: int
    block_tokens: int
    blocks: int
    slots: int
    waiting_max: int
    dtype: str
    device: str
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    numerics: str
    next_turns: bool
    grammars: bool
    def __init__(self, incarnation: _Optional[str] = ..., role: _Optional[str] = ..., version: _Optional[str] = ..., model_name: _Optional[str] = ..., model_path: _Optional[str] = ..., model_identity: _Optional[bytes] = ..., context_tokens: _Optional[int] = ..., block_tokens: _Optional[int] = ..., blocks: _Optional[int] = ..., slots: _Optional[int] = ..., waiting_max: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., numerics: _Optional[str] = ..., next_turns: _Optional[bool] = ..., grammars: _Optional[bool] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("submit", "abort")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    abort: Abort
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("id", "request_id", "token_ids", "output_start", "tokens_max", "sampling", "choice", "seed", "priority", "salt", "parent", "deadline_left_ms", "parent_tokens", "tenant", "tools", "traceparent", "expected_tokens", "tps_floor", "handover")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_START_FIELD_NUMBER: _ClassVar[int]
    TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    PARENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TPS_FLOOR_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    id: int
    request_id: str
    token_ids: bytes
    output_start: int
    tokens_max: int
    sampling: Sampling
    choice: int
    seed: int
    priority: int
    salt: bytes
    parent: int
    deadline_left_ms: int
    parent_tokens: int
    tenant: bytes
    tools: bool
    traceparent: str
    expected_tokens: int
    tps_floor: int
    handover: Handover
    def __init__(self, id: _Optional[int] = ..., request_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., output_start: _Optional[int] = ..., tokens_max: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., choice: _Optional[int] = ..., seed: _Optional[int] = ..., priority: _Optional[int] = ..., salt: _Optional[bytes] = ..., parent: _Optional[int] = ..., deadline_left_ms: _Optional[int] = ..., parent_tokens: _Optional[int] = ..., tenant: _Optional[bytes] = ..., tools: _Optional[bool] = ..., traceparent: _Optional[str] = ..., expected_tokens: _Optional[int] = ..., tps_floor: _Optional[int] = ..., handover: _Optional[_Union[Handover, _Mapping]] = ...) -> None: ...

class Handover(_message.Message):
    __slots__ = ("role", "offer")
    class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ROLE_NONE: _ClassVar[Handover.Role]
        ROLE_SOURCE: _ClassVar[Handover.Role]
        ROLE_DESTINATION: _ClassVar[Handover.Role]
    ROLE_NONE: Handover.Role
    ROLE_SOURCE: Handover.Role
    ROLE_DESTINATION: Handover.Role
    ROLE_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    role: Handover.Role
    offer: bytes
    def __init__(self, role: _Optional[_Union[Handover.Role, str]] = ..., offer: _Optional[bytes] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stop_token_ids", "ignore_eos", "logprobs", "tokens_min", "grammar")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_MIN_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    tokens_min: int
    grammar: str
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., tokens_min: _Optional[int] = ..., grammar: _Optional[str] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    def __init__(self, id: _Optional[int] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("step", "outputs", "stats")
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    step: int
    outputs: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    stats: Stats
    def __init__(self, step: _Optional[int] = ..., outputs: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ..., stats: _Optional[_Union[Stats, _Mapping]] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("id", "token_ids", "finish", "cached_tokens", "logprobs", "reject_reason", "error", "offer", "waited_us")
    ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    REJECT_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    WAITED_US_FIELD_NUMBER: _ClassVar[int]
    id: int
    token_ids: bytes
    finish: FinishReason
    cached_tokens: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    reject_reason: RejectReason
    error: str
    offer: bytes
    waited_us: int
    def __init__(self, id: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., finish: _Optional[_Union[FinishReason, str]] = ..., cached_tokens: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., reject_reason: _Optional[_Union[RejectReason, str]] = ..., error: _Optional[str] = ..., offer: _Optional[bytes] = ..., waited_us: _Optional[int] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top_token_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("sequences", "left_out")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceExplanation]
    left_out: int
    def __init__(self, sequences: _Optional[_Iterable[_Union[SequenceExplanation, _Mapping]]] = ..., left_out: _Optional[int] = ...) -> None: ...

class SequenceExplanation(_message.Message):
    __slots__ = ("request_id", "choice", "text", "json")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice: int
    text: str
    json: str
    def __init__(self, request_id: _Optional[str] = ..., choice: _Optional[int] = ..., text: _Optional[str] = ..., json: _Optional[str] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Stats(_message.Message):
    __slots__ = ("blocks_free", "blocks_cached", "blocks_active", "sequences_waiting", "sequences_running", "steps", "prompt_tokens", "cached_tokens", "output_tokens", "preemptions", "aborts", "step_time_us", "integrity_checks", "integrity_failures", "integrity_check_us", "tps_floor", "host_tier", "drafts", "blocks_writable", "blocks_in_flight", "blocks_quarantined", "blocks_sealed")
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_WAITING_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_RUNNING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    ABORTS_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_US_FIELD_NUMBER: _ClassVar[int]
    INTEGRITY_CHECKS_FIELD_NUMBER: _ClassVar[int]
    INTEGRITY_FAILURES_FIELD_NUMBER: _ClassVar[int]
    INTEGRITY_CHECK_US_FIELD_NUMBER: _ClassVar[int]
    TPS_FLOOR_FIELD_NUMBER: _ClassVar[int]
    HOST_TIER_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_WRITABLE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_SEALED_FIELD_NUMBER: _ClassVar[int]
    blocks_free: int
    blocks_cached: int
    blocks_active: int
    sequences_waiting: int
    sequences_running: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    aborts: int
    step_time_us: int
    integrity_checks: int
    integrity_failures: int
    integrity_check_us: int
    tps_floor: TpsFloor
    host_tier: HostTier
    drafts: Drafts
    blocks_writable: int
    blocks_in_flight: int
    blocks_quarantined: int
    blocks_sealed: int
    def __init__(self, blocks_free: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., blocks_active: _Optional[int] = ..., sequences_waiting: _Optional[int] = ..., sequences_running: _Optional[int] = ..., steps: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., aborts: _Optional[int] = ..., step_time_us: _Optional[int] = ..., integrity_checks: _Optional[int] = ..., integrity_failures: _Optional[int] = ..., integrity_check_us: _Optional[int] = ..., tps_floor: _Optional[_Union[TpsFloor, _Mapping]] = ..., host_tier: _Optional[_Union[HostTier, _Mapping]] = ..., drafts: _Optional[_Union[Drafts, _Mapping]] = ..., blocks_writable: _Optional[int] = ..., blocks_in_flight: _Optional[int] = ..., blocks_quarantined: _Optional[int] = ..., blocks_sealed: _Optional[int] = ...) -> None: ...

class Drafts(_message.Message):
    __slots__ = ("drafts", "tokens", "accepted", "proposer")
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROPOSER_FIELD_NUMBER: _ClassVar[int]
    drafts: int
    tokens: int
    accepted: int
    proposer: str
    def __init__(self, drafts: _Optional[int] = ..., tokens: _Optional[int] = ..., accepted: _Optional[int] = ..., proposer: _Optional[str] = ...) -> None: ...

class HostTier(_message.Message):
    __slots__ = ("blocks", "blocks_used", "copies_late", "blocks_stored", "blocks_loaded", "loads", "tokens_loaded", "copies_failed", "copies_expired", "block_bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    COPIES_LATE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_STORED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_LOADED_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_LOADED_FIELD_NUMBER: _ClassVar[int]
    COPIES_FAILED_FIELD_NUMBER: _ClassVar[int]
    COPIES_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    blocks_used: int
    copies_late: int
    blocks_stored: int
    blocks_loaded: int
    loads: int
    tokens_loaded: int
    copies_failed: int
    copies_expired: int
    block_bytes: int
    def __init__(self, blocks: _Optional[int] = ..., blocks_used: _Optional[int] = ..., copies_late: _Optional[int] = ..., blocks_stored: _Optional[int] = ..., blocks_loaded: _Optional[int] = ..., loads: _Optional[int] = ..., tokens_loaded: _Optional[int] = ..., copies_failed: _Optional[int] = ..., copies_expired: _Optional[int] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class TpsFloor(_message.Message):
    __slots__ = ("configured", "in_force", "batch_1", "users_below", "tokens", "tokens_late", "overrides")
    CONFIGURED_FIELD_NUMBER: _ClassVar[int]
    IN_FORCE_FIELD_NUMBER: _ClassVar[int]
    BATCH_1_FIELD_NUMBER: _ClassVar[int]
    USERS_BELOW_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_LATE_FIELD_NUMBER: _ClassVar[int]
    OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    configured: float
    in_force: float
    batch_1: float
    users_below: int
    tokens: int
    tokens_late: int
    overrides: int
    def __init__(self, configured: _Optional[float] = ..., in_force: _Optional[float] = ..., batch_1: _Optional[float] = ..., users_below: _Optional[int] = ..., tokens: _Optional[int] = ..., tokens_late: _Optional[int] = ..., overrides: _Optional[int] = ...) -> None: ...
