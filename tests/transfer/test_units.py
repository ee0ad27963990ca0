"""Layouts, memory, runs and the gate: what needs no other process."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from pools import Pool, content, layout

from tokenrelay.base.errors import ConfigError, HandshakeRefused, TransferFailed
from tokenrelay.transfer.gate import OwnerGate, ReaderGate
from tokenrelay.transfer.memory import Memory, Region, SharedPool
from tokenrelay.transfer.metrics import Metrics
from tokenrelay.transfer.runs import Span, bounded, coalesce, split
from tokenrelay.transfer.select import available, open_transport
from tokenrelay.transfer.transport import Endpoint, Identity


def test_nixl_is_here_if_it_was_installed() -> None:
    """`make setup` leaves a marker where it installed NIXL: then the conformance suite has to run over it."""
    assert {"shared", "stream"} <= set(available())
    if (Path(sys.prefix) / ".nixl").exists():
        assert available()[0] == "nixl"
    if "nixl" in available():
        from nixl_cu12._api import nixl_agent

        assert nixl_agent


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"block_tokens": 32}, "block_tokens: a has 64, b has 32"),
        ({"dtype": "float32"}, "dtype: a has 'bfloat16', b has 'float32'"),
        ({"layout": "gqa 8x128"}, "layout: a has 'mla 512+64', b has 'gqa 8x128'"),
        ({"parallel_width": 2}, "parallel_width: a has 1, b has 2"),
        ({"model_identity": b"n" * 16}, f"model_identity: a has {'6d' * 16}, b has {'6e' * 16}"),
        ({"block_bytes": [4096, 8192, 1536]}, "bytes of a block in layer 1: a has 4096, b has 8192"),
        ({"block_bytes": [4096]}, "layers: a has 3, b has 1"),
    ],
)
def test_layouts_that_differ_are_refused(fields: dict[str, object], told: str) -> None:
    sizes = fields.pop("block_bytes", (4096, 4096, 1536))
    with pytest.raises(HandshakeRefused) as refused:
        layout().check("a", layout(sizes, **fields), "b")  # type: ignore[arg-type]
    assert refused.value.message == f"a and b do not fit: {told}"
    layout().check("a", layout(), "b")


def test_coalescing_finds_the_longest_runs() -> None:
    """Neighbours in both pools, whatever the order they were named in; per layer."""
    runs = coalesce([Span(1, 3, [9, 4, 5, 6, 7], [1, 10, 11, 12, 20])], layers=3, remote_blocks=10, local_blocks=30)
    assert runs.layers.tolist() == [1, 1, 1, 2, 2, 2]
    assert runs.remote.tolist() == [4, 7, 9] * 2
    assert runs.local.tolist() == [10, 20, 1] * 2
    assert runs.blocks.tolist() == [3, 1, 1] * 2
    assert runs.bytes([100, 10, 1]) == 55


def test_random_spans_become_the_same_copies() -> None:
    """Against the plain pairs: coalesced, bounded and split, each extent is copied exactly once."""
    chosen = random.Random(3)
    for _ in range(200):
        sizes = [chosen.choice([1, 7, 64]) for _ in range(chosen.randint(1, 4))]
        remote = chosen.sample(range(40), chosen.randint(0, 40))
        local = sorted(chosen.sample(range(50), len(remote)))
        if chosen.random() < 0.5:
            remote.sort()
        span = Span(chosen.randint(0, len(sizes)), len(sizes), remote, local)
        runs = coalesce([span], layers=len(sizes), remote_blocks=40, local_blocks=50)
        limit = chosen.randint(1, 200)
        pieces = bounded(runs, sizes, limit)
        seen = []
        for start, end in split(pieces, sizes, limit):
            for n in range(start, end):
                layer, count = int(pieces.layers[n]), int(pieces.blocks[n])
                assert count == 1 or count * sizes[layer] <= limit
                seen += [(layer, int(pieces.remote[n]) + k, int(pieces.local[n]) + k) for k in range(count)]
        expected = [(n, r, here) for n in range(span.layer_start, len(sizes)) for r, here in zip(remote, local)]  # noqa: B905
        assert sorted(seen) == sorted(expected)
        neighbours = (np.diff(runs.remote) == runs.blocks[:-1]) & (np.diff(runs.local) == runs.blocks[:-1])
        assert not (neighbours & (np.diff(runs.layers) == 0)).any()


def test_a_pool_is_what_its_memory_says() -> None:
    pool = Pool(layout((100, 4096)), 5)
    pool.fill([4])
    region = pool.memory.regions[0]
    assert (region.block_bytes, region.blocks, region.bytes) == (100, 5, 500)
    assert (
        bytes((np.ctypeslib.ctypes.c_char * 100).from_address(region.address + 400)) == content(0, 4, 0, 100).tobytes()
    )
    pool.memory.bump([4, 1])
    pool.memory.bump(np.array([4]))
    assert pool.memory.words(range(5)).tolist() == [0, 1, 0, 0, 2]
    with pytest.raises(IndexError):
        pool.memory.words([5])


def test_a_reader_of_a_pool_can_neither_write_nor_shrink_it() -> None:
    pool = SharedPool((4096,), 4)
    fd = pool.reader_fd()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, pool.bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError):
        os.ftruncate(fd, 0)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # who may open it anew is stopped by the seals
    with pytest.raises(PermissionError):
        os.ftruncate(again, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(again, pool.bytes, mmap.MAP_SHARED, mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.write(again, b"x")
    os.close(fd)
    os.close(again)


def test_memory_that_does_not_fit_its_layout_is_refused() -> None:
    region = Region(4096, 100, 128, 10)
    for regions in ([region], [region, Region(4096, 50, 50, 10)], [region, Region(4096, 4096, 4096, 9)]):
        with pytest.raises(ConfigError):
            Memory(layout((100, 4096)), regions, 4096)
    with pytest.raises(ConfigError, match="block_stride"):
        Region(4096, 100, 99, 10)


def test_a_gate_is_held_only_when_no_read_is_under_way() -> None:
    owner = OwnerGate()
    reader = ReaderGate(owner.reader_fd())
    with reader:
        with reader:  # reads of two threads
            pass
        owner.shut()
        assert not owner.held()
    assert owner.held()
    with pytest.raises(TransferFailed) as failed, reader:
        pass
    assert failed.value.reason == "fenced"
    assert owner.held()


def test_a_shut_gate_lets_no_read_begin_even_before_it_is_held() -> None:
    owner = OwnerGate()
    first, second = (ReaderGate(owner.reader_fd()) for _ in range(2))
    with first:
        owner.shut()
        with pytest.raises(TransferFailed), second:
            pass
        assert not owner.held()
    assert owner.held()


def test_a_dead_readers_lock_is_let_go() -> None:
    owner = OwnerGate()
    fd = owner.reader_fd()
    fcntl.flock(fd, fcntl.LOCK_SH)
    owner.shut()
    assert not owner.held()
    os.close(fd)  # as the kernel does for a dead process
    assert owner.held()


def test_endpoints_are_checked() -> None:
    with pytest.raises(HandshakeRefused, match="not a transfer endpoint"):
        Endpoint.decode(b"\xc1 nonsense")
    pool, identity = Pool(layout(), 4), Identity("a", "1")
    with pytest.raises(ConfigError, match="expected one of nixl, shared, stream"):
        open_transport("pigeon", identity, pool.memory, listen="unix:/tmp/x")
    with pytest.raises(ConfigError, match="unix:PATH"):
        open_transport("shared", identity, pool.memory, listen="localhost:1")
    bare = Memory(pool.layout, pool.memory.regions, pool.memory.generations)
    with pytest.raises(ConfigError, match="SharedPool"):
        open_transport("shared", identity, bare, listen="unix:/tmp/x")


def test_metrics_are_prometheus_samples() -> None:
    metrics = Metrics()
    metrics.moved("shared", 100, 2, 5, 0.5)
    metrics.fenced("shared", "dead")
    found = {name: samples for name, _, _, samples in metrics.samples()}
    assert found["transfer_bytes_total"] == {'transport="shared"': 100}
    assert found["transfer_fences_total"] == {'transport="shared",proof="dead"': 1}
    assert metrics.value("transfer_runs_total", 'transport="shared"') == 2
