"""Types of the native module; docs/contracts.md explains plans and outcomes, docs/scheduler.md the words."""

import enum
from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokenrelay.libscheduler.explanation import Explanation

# uint32 in a contiguous buffer, or packed little-endian bytes as they come from the wire.
TokenIds: TypeAlias = NDArray[Any] | bytes | bytearray | memoryview | array[int]

class RejectReason(enum.IntEnum):
    """Why a submission was refused; the values of the wire's RejectReason."""

    QUEUE_FULL = 1
    PROMPT_TOO_LONG = 2
    DUPLICATE_ID = 3
    INVALID = 5
    PARENT_UNKNOWN = 6

DRAFT_TOKENS_MAX: int

class DraftAnswer(enum.IntEnum):
    """What a draft found."""

    DRAFTED = 0
    UNKNOWN = 1
    NOT_DECODING = 2
    NOTHING_LEFT = 3
    OFF = 4

class NgramIndex:
    """Where the last tokens of a text stood before, and what followed them. ValueError names what is out of bounds."""

    def __init__(self, *, order: int = 3, tokens_max: int = 131072) -> None: ...
    def extend(self, token_ids: NDArray[np.uint32]) -> None:
        """Tokens come behind the text. O(1) each."""

    def append(self, token_id: int) -> None: ...
    def find(self, width: int) -> tuple[NDArray[np.uint32], int]:
        """Up to `width` tokens (15 at most) that followed before, and how many before them are the same (0: none)."""

    @property
    def bytes(self) -> int: ...
    def __len__(self) -> int: ...

class DraftCounts:
    """Drafts that steps computed, a snapshot."""

    @property
    def sequences(self) -> int: ...
    @property
    def drafts(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def accepted(self) -> int: ...

class AbortAnswer(enum.IntEnum):
    """What an abort found."""

    ABORTED = 0
    UNKNOWN = 1
    ALREADY_ENDED = 2

class Finish(enum.IntEnum):
    """How a sequence ended, in `Outcome.finish`."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    HANDOVER = 6

class Handover(enum.IntEnum):
    """What becomes of the KV of a prompt, in a worker that is not alone."""

    NONE = 0
    SOURCE = 1
    DESTINATION = 2

class HandleEvent(enum.IntEnum):
    """What happens to the handle of a sequence; the table is `fsm_tables()["kv_handle"]`."""

    OFFER = 0
    CLAIM = 1
    TRANSFER = 2
    ADOPT = 3
    DECLINE = 4
    ACKNOWLEDGE = 5
    RELEASE = 6
    QUARANTINE = 7
    EXPIRE = 8
    RECLAIM = 9
    FENCE = 10
    LOSE = 11

class ImportAnswer(enum.IntEnum):
    """What the end of a transfer found."""

    DONE = 0
    UNKNOWN = 1
    NOT_IMPORTING = 2
    NOTHING_LEFT = 3

class Why(enum.IntEnum):
    """What was decided about a sequence last. `words_of` says it for a person."""

    NONE = 0
    WAITS_BLOCKS = 1
    WAITS_PREFIX = 2
    WAITS_STEP = 3
    WAITS_FLOOR = 4
    WAITS_TIME = 5
    WAITS_LEARNING = 6
    STAYS_STEP = 7
    STAYS_FLOOR = 8
    CHUNK_REST = 9
    CHUNK_LIMIT = 10
    CHUNK_STEP = 11
    CHUNK_FLOOR = 12
    CHUNK_SHARE = 13
    CHUNK_LEARNING = 14
    DECODES = 15
    WAITS_OWN_END = 16
    WAITS_ROOM = 17
    PREEMPTED = 18
    PREEMPTED_SELF = 19
    IMPORTS = 20
    LOADS = 21
    WAITS_LOADS = 22

def words_of(why: Why) -> str:
    """A decision in words."""

class CostModel:
    """What a step costs: linear in what it computes, fitted online. A shape is given as sums over the step's rows.

    `prefill_pairs` counts (query, key) pairs of prefill rows, `decode_context` tokens that decode rows read.
    """

    def __init__(self) -> None: ...
    def observe(
        self,
        us: float,
        *,
        prefill_rows: float = 0.0,
        prefill_tokens: float = 0.0,
        prefill_pairs: float = 0.0,
        decode_rows: float = 0.0,
        decode_context: float = 0.0,
    ) -> None:
        """A step of this shape took so long."""

    def predict_us(
        self,
        *,
        prefill_rows: float = 0.0,
        prefill_tokens: float = 0.0,
        prefill_pairs: float = 0.0,
        decode_rows: float = 0.0,
        decode_context: float = 0.0,
    ) -> float:
        """How long such a step will take; 0 while nothing is known."""

    def prefill_us(self, start: int, length: int, beside: int = 0) -> float:
        """What a prefill row of tokens [start, start + length) adds to a step that has so many tokens beside it."""

    def prefill_tokens_within(self, start: int, us: float, most: int, beside: int = 0) -> int:
        """The most tokens from `start` on, up to `most`, whose row adds no more than `us`."""

    def coefficients(self) -> dict[str, float]:
        """Microseconds per step, prefill_row, prefill_token, prefill_pair, decode_row, decode_context_token,
        and token of a step beyond_32, beyond_128, beyond_512."""

    @property
    def speed(self) -> float:
        """How much slower the device is at this moment than the fit says."""

    @property
    def observations(self) -> int: ...

class Config:
    """Sizes and bounds, in the units of their names. ValueError names the field that is out of its bounds."""

    def __init__(
        self,
        *,
        block_tokens: int = 64,
        blocks: int,
        slots: int,
        context_tokens: int,
        step_tokens: int = 2048,
        chunk_tokens: int = 512,
        waiting_max: int = 1024,
        hash_key: bytes,
        model_identity: bytes,
        steps_in_flight: int = 2,
        overtakes_max: int = 16,
        class_overtakes_max: int = 256,
        preemptions_max: int = 3,
        tps_floor: float = 0.0,
        tps_fraction: float = 0.5,
        prefill_share: float = 0.125,
        floor_wait_us: int = 10_000_000,
        eviction: str = "reuse",
        host_blocks: int = 0,
        write_backs_max: int = 64,
        copy_deadline_us: int = 10_000_000,
        draft_tokens: int = 0,
        parts: int = 1,
        tail_tokens_min: int = 0,
    ) -> None: ...
    @property
    def parts(self) -> int: ...
    @property
    def draft_tokens(self) -> int: ...
    @property
    def tail_tokens_min(self) -> int: ...
    @property
    def host_blocks(self) -> int: ...
    @property
    def write_backs_max(self) -> int: ...
    @property
    def copy_deadline_us(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def step_tokens(self) -> int: ...
    @property
    def chunk_tokens(self) -> int: ...
    @property
    def waiting_max(self) -> int: ...
    @property
    def steps_in_flight(self) -> int: ...
    @property
    def overtakes_max(self) -> int: ...
    @property
    def class_overtakes_max(self) -> int: ...
    @property
    def preemptions_max(self) -> int: ...
    @property
    def tps_floor(self) -> float: ...
    @property
    def tps_fraction(self) -> float: ...
    @property
    def prefill_share(self) -> float: ...
    @property
    def floor_wait_us(self) -> int: ...
    @property
    def eviction(self) -> str:
        """ "lru" or "reuse": which cached block goes when room is needed."""

class Plan:
    """One step: rows [0, decodes) decode, the others prefill. Views live as long as the plan.

    A decode row that is longer than 1 has a draft: a token is sampled after each of its tokens.
    """

    @property
    def step(self) -> int: ...
    @property
    def decodes(self) -> int: ...
    @property
    def sampled(self) -> int:
        """Tokens that the step samples: one for each row that samples, and one for each drafted token."""

    @property
    def drafted(self) -> int:
        """Drafted tokens of all rows."""

    @property
    def predicted_us(self) -> float:
        """How long the step will take, by the cost model; 0 while nothing is known."""

    @property
    def sequence_ids(self) -> NDArray[np.uint64]: ...
    @property
    def slots(self) -> NDArray[np.int32]: ...
    @property
    def starts(self) -> NDArray[np.int32]: ...
    @property
    def lengths(self) -> NDArray[np.int32]: ...
    @property
    def token_ids(self) -> NDArray[np.uint32]: ...
    @property
    def feedback(self) -> NDArray[np.uint8]: ...
    @property
    def samples(self) -> NDArray[np.uint8]: ...
    @property
    def admitted_ids(self) -> NDArray[np.uint64]: ...
    @property
    def admitted_slots(self) -> NDArray[np.int32]: ...
    @property
    def admitted_cached(self) -> NDArray[np.int32]: ...
    @property
    def admitted_output_start(self) -> NDArray[np.int32]: ...
    @property
    def tail_sources(self) -> NDArray[np.int32]: ...
    @property
    def tail_blocks(self) -> NDArray[np.int32]: ...
    @property
    def tail_tokens(self) -> NDArray[np.int32]: ...

class Outcome:
    """The new tokens of one committed step, a row for each sequence that goes on or ends with it."""

    @property
    def sequence_ids(self) -> NDArray[np.uint64]: ...
    @property
    def token_ids(self) -> NDArray[np.uint32]: ...
    @property
    def finish(self) -> NDArray[np.uint8]: ...
    @property
    def rows(self) -> NDArray[np.int32]: ...
    @property
    def first(self) -> NDArray[np.uint8]: ...
    @property
    def cached_tokens(self) -> NDArray[np.int32]: ...

class FloorCounts:
    """How the TPS floor fares. A user's token is late when it came more than one token's time after it was due."""

    @property
    def tps_in_force(self) -> float:
        """The smaller of the configured floor and a fraction of `tps_batch_1`; 0: none, or not known yet."""

    @property
    def tps_batch_1(self) -> float:
        """What one user alone would get now; 0: not known yet."""

    @property
    def users_below(self) -> int:
        """Users whose token was late in the last step that had any."""

    @property
    def tokens(self) -> int:
        """Tokens that were due."""

    @property
    def tokens_late(self) -> int:
        """Of those."""

    @property
    def overrides(self) -> int:
        """Admissions past `floor_wait_us` that the floor would have kept back."""

class Copies:
    """Copies of blocks between device and host memory that are to be made, each independent of the others.

    int32 and uint64 arrays, of one length for the `store_` ones (device -> host) and for the `load_` ones.
    """

    @property
    def store_ids(self) -> NDArray[np.uint64]: ...
    @property
    def store_blocks(self) -> NDArray[np.int32]: ...
    @property
    def store_slots(self) -> NDArray[np.int32]: ...
    @property
    def load_ids(self) -> NDArray[np.uint64]: ...
    @property
    def load_slots(self) -> NDArray[np.int32]: ...
    @property
    def load_blocks(self) -> NDArray[np.int32]: ...

class LateCopy:
    """A copy that did not end before its deadline: what it holds stays held until it ends."""

    @property
    def id(self) -> int: ...
    @property
    def load(self) -> bool: ...
    @property
    def block(self) -> int: ...
    @property
    def slot(self) -> int: ...

class HostCounts:
    """The host tier, a snapshot; `blocks` of 0: there is none."""

    @property
    def blocks(self) -> int: ...
    @property
    def blocks_used(self) -> int: ...
    @property
    def write_backs_in_flight(self) -> int: ...
    @property
    def loads_in_flight(self) -> int: ...
    @property
    def copies_late(self) -> int: ...
    @property
    def blocks_stored(self) -> int: ...
    @property
    def blocks_loaded(self) -> int: ...
    @property
    def loads(self) -> int: ...
    @property
    def tokens_loaded(self) -> int: ...
    @property
    def copies_failed(self) -> int: ...
    @property
    def copies_expired(self) -> int: ...

class Counts:
    """A snapshot; blocks_free + blocks_cached + blocks_active is the pool, and the four other states are the active."""

    @property
    def drafts(self) -> DraftCounts: ...
    @property
    def blocks_free(self) -> int: ...
    @property
    def blocks_cached(self) -> int: ...
    @property
    def blocks_active(self) -> int: ...
    @property
    def blocks_writable(self) -> int: ...
    @property
    def blocks_in_flight(self) -> int: ...
    @property
    def blocks_quarantined(self) -> int: ...
    @property
    def blocks_sealed(self) -> int: ...
    @property
    def sequences_waiting(self) -> int: ...
    @property
    def sequences_running(self) -> int: ...
    @property
    def steps_in_flight(self) -> int: ...
    @property
    def sequences_importing(self) -> int: ...
    @property
    def handles_open(self) -> int: ...
    @property
    def sequences_loading(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def aborts(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def tail_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def hashed_blocks(self) -> int: ...
    @property
    def floor(self) -> FloorCounts: ...
    @property
    def host(self) -> HostCounts: ...

class ReuseRow:
    """One kind of block as the reuse model sees it; counts are of a sample, and decayed."""

    @property
    def origin(self) -> str:
        """Whose it was: "prompt", "turn", "output" or "tool_turn"."""
    @property
    def level(self) -> int:
        """How often it was wanted again: never, once, two or three times, more often."""
    @property
    def reused(self) -> float: ...
    @property
    def gone(self) -> float:
        """Given up on: nobody came while it was watched."""
    @property
    def watched(self) -> int:
        """Idle now, or evicted not long ago."""

class Scheduler:
    """The state machine. Used from one thread; time comes in as `now_us`; the same calls give the same answers."""

    def __init__(self, config: Config, *, generations: NDArray[np.uint64] | None = None) -> None:
        """`generations`: writable memory for a word per block, where peers read it; kept as long as the scheduler."""

    def submit(
        self,
        sequence_id: int,
        token_ids: TokenIds,
        *,
        output_start: int,
        tokens_max: int,
        stop_token_ids: Sequence[int] = (),
        priority: int = 0,
        salt: bytes = b"",
        tenant: bytes = b"",
        parent: int | None = None,
        parent_tokens: int | None = None,
        handover: Handover = Handover.NONE,
        tools: bool = False,
        expected_tokens: int = 0,
        tps_floor: int = 0,
        now_us: int,
    ) -> RejectReason | None:
        """Queue a sequence: `token_ids` (uint32, copied) is the prompt up to `output_start`, then earlier output.

        `tokens_max` counts output tokens, those in `token_ids` included. `tenant`: tenants of a priority class
        get equal shares; empty: the salt tells them apart. None: accepted.

        With `parent` the prompt begins with the first `parent_tokens` tokens (None: all) of that sequence, live or
        ended, and `token_ids` is only what comes behind; `output_start` counts from the beginning all the same.
        PARENT_UNKNOWN: its text is gone or shorter, or it has another salt; submit again with all tokens.

        `handover`: a SOURCE gets a handle of the same id, and ends with its first token (Finish.HANDOVER, or as it
        would have); a DESTINATION waits for room, and then for `imported`.

        `tools`: a hint that it may end with a tool call, whose results come back as the next turn.
        `expected_tokens`: a hint, output tokens it will likely have (0: nobody says): it is admitted when there is room
        for them, and that room is kept. `tps_floor`: tokens a second that its user keeps, in place of the configured
        floor (0: that one), clamped to [0, 1000].
        """

    def handle(self, sequence_id: int, event: HandleEvent) -> str | None:
        """Move the handle of a sequence, which may have ended: the table's reason when it is refused, else None."""

    def handle_state(self, sequence_id: int) -> str:
        """Where the handle is, in the table's words; empty when there is none."""

    def readable(self, sequence_id: int, first: int = 0) -> NDArray[np.int32]:
        """Blocks from the `first` on that the handle lets a peer read, in the order of the sequence's tokens."""

    def sealed_block(self, block_hash: bytes) -> int:
        """The block that holds this content, sealed; -1 when there is none. Its generation says if it still does."""

    @property
    def generations(self) -> NDArray[np.uint64]:
        """How often each block was taken, [blocks]; a read-only view."""

    def take_reserved(self) -> list[tuple[int, int]]:
        """Destinations that got room since the last call: sequence, tokens found in the cache."""

    def import_blocks(self, sequence_id: int) -> NDArray[np.int32]:
        """The blocks that the transfer writes: of the tokens behind those that were found in the cache."""

    def imported(self, sequence_id: int, token_id: int) -> ImportAnswer:
        """The transfer has ended and was validated; `token_id` is the first one, sampled by the source."""

    def import_stopped(self, sequence_id: int, token_id: int | None = None) -> ImportAnswer:
        """There is no transfer, or it has ended in vain: the sequence computes its prompt (and `token_id`) itself."""

    def abort(self, sequence_id: int, now_us: int) -> AbortAnswer:
        """End a sequence; what it holds is given back at the commit of the last launched step that holds it."""

    def plan(self, now_us: int) -> Plan | None:
        """The next step, which counts as launched; None when nothing can run now."""

    def draft(self, sequence_id: int, token_ids: TokenIds) -> DraftAnswer:
        """Somebody guesses what comes next, behind all tokens that are known; its next row computes it."""

    def commit(self, step: int, token_ids: TokenIds, now_us: int, run_us: int | None = None) -> Outcome:
        """Take what the oldest launched step sampled: uint32, one per row with `samples`, in row order.

        `run_us`: how long the device ran it, for the cost model; 0 when that says nothing (the step failed), None for
        the time since the commit before, or since it was planned.
        ValueError when `step` is not the oldest launched one, or when the number of tokens differs.
        """

    @property
    def block_table(self) -> NDArray[np.int32]:
        """Block numbers, [slots, ceil(context_tokens / block_tokens)]; a read-only view that steps append to."""

    def counts(self) -> Counts:
        """Counters and gauges, now."""

    def token_ids(self, sequence_id: int) -> NDArray[np.uint32] | None:
        """Prompt and output known so far (a copy); None when the sequence is not live."""

    def take_copies(self) -> Copies | None:
        """What is to be copied since the last call, after each `plan`; None when there is nothing."""

    def copied(self, ids: Sequence[int]) -> int:
        """These copies have ended well: nobody reads or writes for them. How many of them were in flight."""

    def copy_failed(self, ids: Sequence[int]) -> int:
        """The same for copies that ended in vain; what they wrote is never read."""

    def copy_deadline_us(self) -> int | None:
        """When the first copy in flight will be late, which the next `plan` then finds; None without one."""

    def take_late_copies(self) -> list[LateCopy]:
        """Copies that were found late since the last call."""

    def take_cache_events(self) -> list[tuple[str, bytes]]:
        """("sealed" | "evicted", block_hash) since the last call, in order.

        Bounded: when nobody asked for too long the oldest are dropped, and the first item is ("lost", 16 zero bytes).
        """

    def check(self) -> None:
        """Check every invariant; AssertionError says which one is broken. O(everything)."""

    def reuse(self) -> list[ReuseRow]:
        """What was learned about which blocks come back, a row for each kind."""

    @property
    def bookkeeping_bytes_per_block(self) -> float:
        """What a block costs beside its KV and its token ids, what every pool has included."""

    def why(self, sequence_id: int) -> Why | None:
        """What was decided about the sequence last; None when it is not live."""

    def cost_model(self) -> CostModel:
        """A copy of the model of what steps cost, as fitted until now."""

    def explanation(self, sequence_id: int) -> Explanation | None:
        """Where a live sequence stands and why; None for another id. O(sequences), nothing until somebody asks."""

    def explain(self, sequence_id: int) -> str:
        """What the sequence is doing and what it waits for, for a person."""

class Row:
    """One line of a table: a transition to `next`, or a rejection (`next` is None) with its `reason`."""

    @property
    def state(self) -> str: ...
    @property
    def event(self) -> str: ...
    @property
    def next(self) -> str | None: ...
    @property
    def reason(self) -> str: ...

class StateFacts:
    """What is true in a state of the `kv_handle` machine (handle_laws.hpp)."""

    @property
    def blocks(self) -> str:
        """Whose the blocks are: "owner" or "nobody"."""
    @property
    def peer_may_touch(self) -> bool:
        """A peer may be reading the blocks."""
    @property
    def deadline(self) -> str:
        """What must have happened by then: "offer", "claim", "start", "progress", "answer", "reclaim", "release"."""
    @property
    def duty(self) -> str | None:
        """The event that is due when the deadline is over."""
    @property
    def actor(self) -> str:
        """Who must see to it: "owner", "ledger", "nobody"."""

class EventFacts:
    """Whose event it is, and what it proves (handle_laws.hpp)."""

    @property
    def party(self) -> str:
        """ "owner", "claimant", "anyone" or "ledger"."""
    @property
    def guard(self) -> str:
        """What else must hold: "none", "all_sealed", "overdue", "cut_off" or "owner_gone"."""
    @property
    def proof(self) -> str:
        """Why nobody reads any more after it: "none", "acknowledged", "fenced" or "gone"."""
    @property
    def crosses(self) -> bool:
        """It reaches the ledger; False: it stays in the owner's process."""

class Table:
    """A state machine: every (state, event) pair has one row."""

    @property
    def name(self) -> str: ...
    @property
    def initial(self) -> str: ...
    @property
    def states(self) -> list[str]: ...
    @property
    def events(self) -> list[str]: ...
    @property
    def rows(self) -> list[Row]: ...
    @property
    def state_facts(self) -> dict[str, StateFacts]:
        """Of every state, in `kv_handle`; empty in the others."""
    @property
    def event_facts(self) -> dict[str, EventFacts]:
        """Of every event, in `kv_handle`; empty in the others."""

def block_hashes(
    token_ids: TokenIds, *, block_tokens: int, hash_key: bytes, model_identity: bytes, salt: bytes = b""
) -> list[bytes]:
    """The chained 16-byte hash of every full block: SipHash-2-4-128 of the parent's hash and the block's token ids."""

def fsm_tables() -> dict[str, Table]:
    """The constexpr tables that the compiler checked, by name: "block", "kv_handle" and "request"."""
