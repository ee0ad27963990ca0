"""Which implementations of an operation exist, which one runs, and why.

An implementation registers with what it needs and supports; `select` takes the supported one of the highest priority,
`explain` says for each other one what was required beside what it supports:

    @register(op="rms_norm", path="cpu/avx2", device="cpu", isa={"avx2", "fma"}, dtypes={"float32"}, priority=20)
    def rms_norm(x, weight, eps): ...

    explain("mla_decode", device="cpu", dtype="bfloat16", heads=16, rank=512, rope=64)

Plugins are callables without arguments in the entry-point group `tokenrelay.kernels`; they are called once, before the
first selection, and register. A plugin that fails is reported by `plugin_errors`, it never stops a model from running.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from tokenrelay.base.errors import KernelUnavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.kernels import isa as machine_isa

if TYPE_CHECKING:
    import torch

ENTRY_POINT_GROUP = "tokenrelay.kernels"
PARTS = "ref/parts"  # the path of kernels that only call other operations, which are timed themselves
NUMERICS_VERSION = 2  # raised when a kernel's results change in their last bits
_CACHE_ENTRIES_MAX = 1024

# Each operation, and the named dimensions that its kernels may limit, in the order in which `pick` receives them.
OPS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("width",),
    "add_rms_norm": ("width",),
    "rotary": ("rope",),
    "silu_mul": ("width",),
    "mla_cache_write": ("rank", "rope"),
    "gqa_cache_write": ("kv_heads", "head_dim"),
    "mla_rotary_write": ("heads", "rank", "rope"),
    "gqa_rotary_write": ("heads", "kv_heads", "head_dim"),
    "mla_absorb": ("heads", "nope", "rank"),
    "mla_expand": ("heads", "value", "rank"),
    "mla_decode": ("heads", "rank", "rope", "block_tokens"),
    "mla_prefill": ("heads", "rank", "rope", "block_tokens", "nope", "value"),
    "gqa_decode": ("heads", "kv_heads", "head_dim", "block_tokens"),
    "gqa_prefill": ("heads", "kv_heads", "head_dim", "block_tokens"),
    "linear": ("width", "columns"),
    "quantized_linear": ("width", "columns", "bits", "group"),
    "packed_linear": ("width", "columns", "bits", "group"),
    "scaled_linear": ("width", "columns"),
    "moe": ("experts", "width", "hidden"),
    "quantized_moe": ("experts", "width", "hidden", "bits", "group"),
    "packed_moe": ("experts", "width", "hidden", "bits", "group"),
    "scaled_moe": ("experts", "width", "hidden"),
    "moe_route": ("experts",),
    "sample": ("vocab",),
    "token_logprobs": ("vocab",),
    "apply_penalties": ("vocab",),
    "finite_rows": ("vocab",),
}

log = get_logger("kernels")


@dataclass(frozen=True, slots=True)
class Limit:
    """What a kernel supports in one dimension: minimum <= value <= maximum, a multiple of `multiple_of`."""

    minimum: int = 1
    maximum: int | None = None
    multiple_of: int = 1

    def allows(self, value: int) -> bool:
        """Whether `value` is inside."""
        return (
            value >= self.minimum and (self.maximum is None or value <= self.maximum) and value % self.multiple_of == 0
        )

    def __str__(self) -> str:
        text = f"{self.minimum}..{'' if self.maximum is None else self.maximum}"
        return text if self.multiple_of == 1 else f"{text}, a multiple of {self.multiple_of}"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of one operation."""

    op: str
    path: str  # its name: arch/variant, for example cpu/avx512
    call: Callable[..., Any] = field(repr=False)
    device: str  # torch's device type, or "any"
    isa: frozenset[str]  # instruction sets it needs
    dtypes: frozenset[str]  # of the operation's leading tensor, by torch's names; empty: any
    limits: Mapping[str, Limit]
    layout: str  # of the KV cache or weights it reads; "" where there is none
    priority: int
    source: str  # "tokenrelay" or the plugin's distribution
    invariant: bool = True  # a row's bits depend on nothing but its own input

    def unmet(self, device: str, dtype: str, dims: Mapping[str, int]) -> tuple[Unmet, ...]:
        """What keeps this kernel from running there; empty: it can."""
        found = []
        if self.device not in ("any", device):
            found.append(Unmet("device", device, self.device))
        missing = self.isa - machine_isa.features_of(device) if self.device in ("any", device) else frozenset()
        if missing:
            found.append(Unmet("isa", f"this machine lacks {', '.join(sorted(missing))}", ", ".join(sorted(self.isa))))
        if self.dtypes and dtype not in self.dtypes:
            found.append(Unmet("dtype", dtype, ", ".join(sorted(self.dtypes))))
        if _deterministic and not self.invariant:
            found.append(Unmet("deterministic", "rows that do not depend on others", "rows that may"))
        for name, limit in self.limits.items():
            if name in dims and not limit.allows(dims[name]):
                found.append(Unmet(name, str(dims[name]), str(limit)))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Unmet:
    """One reason why a kernel cannot run."""

    feature: str
    required: str
    supported: str

    def __str__(self) -> str:
        return f"{self.feature}: required {self.required}, supported {self.supported}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one candidate."""

    kernel: Kernel
    chosen: bool
    unmet: tuple[Unmet, ...]
    reason: str  # one line for a person


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer of `explain`: the chosen kernel, or None, and a verdict on each candidate, best priority first."""

    op: str
    device: str
    dtype: str
    dims: Mapping[str, int]
    chosen: Kernel | None
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        asked = " ".join([f"device={self.device}", f"dtype={self.dtype}", *(f"{k}={v}" for k, v in self.dims.items())])
        lines = [f"{self.op} {asked}"]
        lines += [f"  {'*' if v.chosen else ' '} {v.kernel.path:<16} {v.reason}" for v in self.verdicts]
        return "\n".join(lines)


TunedKey = tuple[str, str, str, tuple[tuple[str, int], ...]]  # op, device, dtype, dimensions
_F = TypeVar("_F", bound=Callable[..., Any])
_kernels: dict[str, dict[str, Kernel]] = {op: {} for op in OPS}
_forced: dict[str, str] = {}
_cache: dict[tuple[Any, ...], Callable[..., Any]] = {}
_plugin_errors: dict[str, str] = {}
_lock = threading.RLock()
_deterministic = False
_tuned: dict[TunedKey, str] = {}
_times: dict[TunedKey, list[float]] | None = None  # while `timing`
_observe: Callable[[TunedKey, tuple[Any, ...], Any, float], None] | None = None  # likewise
_generation = 0  # raised whenever another kernel may be chosen than before
_loaded = False
_registering = "tokenrelay"  # who registers now; a plugin's name while its entry point runs


def register(
    *,
    op: str,
    path: str,
    device: str = "cpu",
    isa: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    limits: Mapping[str, Limit] | None = None,
    layout: str = "",
    priority: int = 10,
    invariant: bool = True,
) -> Callable[[_F], _F]:
    """A decorator: the function is an implementation of `op` with the signature of the public one in `ops`.

    `invariant`: whether a row's bits depend on its own input alone, whatever stands beside it and however a prompt is
    cut; deterministic mode takes no other.
    Built-in priorities: 0 references, 10 baseline, 20 AVX2, 30 AVX-512, 40 AVX-512 with BF16, 50 Triton. ValueError
    for an unknown op or dimension, or a path that is taken for this op.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    unknown = set(limits or {}) - set(OPS[op])
    if unknown:
        raise ValueError(f"{op} has no dimension {', '.join(sorted(unknown))}; it has {', '.join(OPS[op])}")

    def add(call: _F) -> _F:
        with _lock:
            if path in _kernels[op]:
                raise ValueError(f"{op} has a kernel {path!r} already, from {_kernels[op][path].source}")
            _kernels[op][path] = Kernel(
                op,
                path,
                call,
                device,
                frozenset(isa),
                frozenset(dtypes),
                dict(limits or {}),
                layout,
                priority,
                _registering,
                invariant,
            )
            _forget()
        return call

    return add


def unregister(op: str, path: str) -> None:
    """Take a kernel out again; KeyError where there is none. For plugins' tests."""
    with _lock:
        del _kernels[op][path]
        _forget()


def ops() -> tuple[str, ...]:
    """The names of all operations."""
    return tuple(OPS)


def kernels(op: str) -> tuple[Kernel, ...]:
    """All registered implementations of `op`, best priority first."""
    load()
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    return tuple(sorted(_kernels[op].values(), key=lambda k: (-k.priority, k.path)))


def explain(op: str, *, device: str = "cpu", dtype: str = "float32", **dims: int) -> Explanation:
    """Why which kernel of `op` runs for these features. A dimension that is not given limits nothing."""
    candidates = kernels(op)
    unknown = set(dims) - set(OPS[op])
    if unknown:
        raise ValueError(f"{op} has no dimension {', '.join(sorted(unknown))}; it has {', '.join(OPS[op])}")
    forced = _forced.get(op)
    able = [k for k in candidates if (forced is None or k.path == forced) and not k.unmet(device, dtype, dims)]
    chosen = able[0] if able else None
    tuned = _tuned.get((op, device, dtype, tuple(sorted(dims.items()))))
    if tuned is not None and forced is None:
        chosen = next((kernel for kernel in able if kernel.path == tuned), chosen)
    verdicts = tuple(_verdict(k, chosen, forced, tuned, k.unmet(device, dtype, dims)) for k in candidates)
    return Explanation(op, device, dtype, dict(dims), chosen, verdicts)


def _verdict(
    kernel: Kernel, chosen: Kernel | None, forced: str | None, tuned: str | None, unmet: tuple[Unmet, ...]
) -> Verdict:
    if kernel is chosen:
        why = "forced" if forced else "tuned" if tuned == kernel.path else f"priority {kernel.priority}"
        return Verdict(kernel, True, (), f"chosen: {why}")
    if unmet:
        return Verdict(kernel, False, unmet, "; ".join(map(str, unmet)))
    if forced is not None:
        return Verdict(kernel, False, (), f"{forced} is forced")
    assert chosen is not None
    if tuned == chosen.path:
        return Verdict(kernel, False, (), f"{chosen.path} was faster when it was tuned")
    return Verdict(kernel, False, (), f"priority {kernel.priority}, {chosen.path} has {chosen.priority}")


def select(op: str, *, device: str = "cpu", dtype: str = "float32", **dims: int) -> Kernel:
    """The kernel that runs for these features; KernelUnavailable prints what was required beside what is supported."""
    explanation = explain(op, device=device, dtype=dtype, **dims)
    if explanation.chosen is None:
        raise KernelUnavailable(f"no kernel can run this:\n{explanation}")
    return explanation.chosen


def pick(op: str, device: str, dtype: torch.dtype, *dims: int) -> Callable[..., Any]:
    """The dispatch of `ops`: as `select`, by position, found once for each combination and then remembered."""
    key = (op, device, dtype, dims)
    found = _cache.get(key)
    if found is None:
        names = dict(zip(OPS[op], dims, strict=True))
        named = str(dtype).removeprefix("torch.")
        kernel = select(op, device=device, dtype=named, **names)
        found = kernel.call
        if _times is not None and kernel.path != PARTS:
            found = _timed(found, (op, device, named, tuple(sorted(names.items()))))
        with _lock:
            if len(_cache) >= _CACHE_ENTRIES_MAX:
                _cache.clear()
            _cache[key] = found
    return found


@contextlib.contextmanager
def force(op: str, path: str) -> Iterator[None]:
    """Inside, `op` runs the kernel `path` in the whole process, or raises KernelUnavailable. For tests and benches."""
    if path not in {k.path for k in kernels(op)}:
        raise KernelUnavailable(f"{op} has no kernel {path!r}; it has {', '.join(k.path for k in kernels(op))}")
    before = _forced.get(op)
    _set_forced(op, path)
    try:
        yield
    finally:
        _set_forced(op, before)


def _set_forced(op: str, path: str | None) -> None:
    with _lock:
        if path is None:
            _forced.pop(op, None)
        else:
            _forced[op] = path
        _forget()


def deterministic(on: bool = True) -> None:
    """From now on, in the whole process, choose only kernels whose rows depend on nothing but their own input."""
    global _deterministic
    with _lock:
        _deterministic = on
        _forget()


def is_deterministic() -> bool:
    """Whether `deterministic` is on."""
    return _deterministic


def tuned(choices: Mapping[TunedKey, str]) -> None:
    """From now on, prefer these kernels for these shapes, where they can run (see kernels/tune.py)."""
    with _lock:
        _tuned.clear()
        _tuned.update(choices)
        _forget()


def tuned_choices() -> dict[TunedKey, str]:
    """What is preferred: for other processes, whose sums shall be the same."""
    with _lock:
        return dict(_tuned)


def tuned_digest() -> str:
    """Of the choices that are preferred; empty where there are none."""
    if not _tuned:
        return ""
    return hashlib.blake2b(repr(sorted(_tuned.items())).encode(), digest_size=4).hexdigest()


@contextlib.contextmanager
def timing(
    observe: Callable[[TunedKey, tuple[Any, ...], Any, float], None] | None = None,
) -> Iterator[dict[TunedKey, list[float]]]:
    """Inside, the seconds of every call of an operation, by what it was picked for. For `tune`; not reentrant.

    `observe(key, arguments, result, seconds)` is told of each call, outside of the time that is taken.
    """
    global _times, _observe
    found: dict[TunedKey, list[float]] = {}
    with _lock:
        _times, _observe = found, observe
        _forget()
    try:
        yield found
    finally:
        with _lock:
            _times = _observe = None
            _forget()


def _timed(call: Callable[..., Any], key: TunedKey) -> Callable[..., Any]:
    assert _times is not None
    times, observe = _times.setdefault(key, []), _observe

    def timed(*arguments: Any, **options: Any) -> Any:
        began_s = time.perf_counter()
        result = call(*arguments, **options)
        times.append(time.perf_counter() - began_s)
        if observe is not None:
            observe(key, arguments, result, times[-1])
        return result

    return timed


def _forget() -> None:
    global _generation
    _generation += 1
    _cache.clear()


def generation() -> int:
    """Changes whenever another kernel may be chosen than before: what was captured of a choice is old then."""
    return _generation


def load() -> None:
    """Register the built-in kernels and the plugins; done by itself before the first selection, once."""
    global _loaded
    if _loaded:
        return
    with _lock:
        if _loaded:
            return
        import tokenrelay.kernels.cpu
        import tokenrelay.kernels.ref
        import tokenrelay.kernels.triton

        tokenrelay.kernels.triton.register_all()
        _loaded = True  # before the plugins, which may call `kernels` or `select`
        for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
            _load_plugin(entry_point)


def _load_plugin(entry_point: metadata.EntryPoint) -> None:
    global _registering
    name = entry_point.dist.name if entry_point.dist is not None else entry_point.name
    _registering = name
    try:
        entry_point.load()()
    except Exception as error:  # a plugin is a stranger's code: whatever it raises, the built-in kernels stand
        _plugin_errors[name] = f"{type(error).__name__}: {error}"
        log.error("kernel plugin failed", plugin=name, error=_plugin_errors[name])
    finally:
        _registering = "tokenrelay"


def plugin_errors() -> dict[str, str]:
    """Plugins that failed to register, and why."""
    load()
    return dict(_plugin_errors)


def numerics(device: str = "cpu") -> str:
    """A fingerprint of what decides the last bits of a result here: ISA, chosen kernels, torch. Equal strings on two
    machines mean that the same input gives the same bits; workers compare it in the handshake."""
    import torch

    chosen = []
    for op in OPS:
        for dtype in ("float32", "bfloat16"):
            kernel = explain(op, device=device, dtype=dtype).chosen
            chosen.append(f"{op}:{dtype}={kernel.path if kernel else '-'}")
    found = machine_isa.features_of(device)
    level = next((name for name in ("avx512_bf16", "avx512f", "avx2") if name in found), "baseline")
    if device != "cpu":
        level = ",".join(sorted(found))
    digest = hashlib.blake2b("\n".join(chosen).encode(), digest_size=4).hexdigest()
    torch_version = torch.__version__.split("+")[0]
    return f"{device}/{machine_isa.machine()}/{level}/torch-{torch_version}/kernels-{NUMERICS_VERSION}-{digest}"
