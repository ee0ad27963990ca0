"""Which transports a worker opens, and that a peer without the best one takes the next."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
from fleet import Fleet

from tokenrelay.base.errors import ConfigError
from tokenrelay.cli import fleet_transports
from tokenrelay.cli.fleet_config import FleetConfig
from tokenrelay.cli.fleet_transports import default_kinds, open_transports
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.security import Security
from tokenrelay.transfer.memory import Layout, Memory, SharedPool
from tokenrelay.transfer.select import available
from tokenrelay.transfer.transport import Identity, Transport

ENCRYPTED = Security(certificate=b"c", key=b"k", authority=b"a")


@pytest.fixture
async def memory() -> AsyncIterator[Memory]:
    pool = SharedPool((64,), 4)
    yield pool.memory(Layout(model_identity=b"m", dtype="f", block_tokens=16, layout="l", block_bytes=(64,)))
    pool.close()


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tr-") as name:
        yield name


def test_the_best_that_is_there_and_nothing_in_the_clear_where_the_fleet_encrypts() -> None:
    def there(*kinds: str) -> tuple[str, ...]:
        return tuple(kind for kind in kinds if kind in available())

    assert default_kinds("unix:/w.sock", Security()) == there("shared", "nixl", "stream")
    assert default_kinds("host:7000", Security()) == there("nixl", "stream")
    assert default_kinds("host:7000", ENCRYPTED) == ("stream",)


async def test_a_default_that_does_not_open_is_left_out_a_named_one_is_an_error(
    memory: Memory, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = fleet_transports.open_transport

    def without_nixl(kind: str, *given: object, **options: object) -> Transport:
        transport = opener(kind, *given, **options)  # type: ignore[arg-type]
        if kind == "nixl":

            async def refuse() -> None:
                raise ConfigError("no plugin")

            transport.open = refuse  # type: ignore[method-assign]
        return transport

    monkeypatch.setattr(fleet_transports, "open_transport", without_nixl)
    given = (f"unix:{folder}/w", Identity("w", "1"), memory, Security())
    opened = await open_transports(FleetConfig(), *given)
    assert [transport.kind for transport in opened] == ["shared", "stream"]
    for transport in opened:
        await transport.close()
    if "nixl" in available():
        with pytest.raises(ConfigError, match="no plugin"):
            await open_transports(FleetConfig(transports=("nixl",)), *given)
    with pytest.raises(ConfigError, match=r"fleet\.transports is shared: none of them"):
        await open_transports(FleetConfig(transports=("shared",)), "host:7000", *given[1:])


async def test_a_destination_takes_the_next_kind_when_the_best_one_fails(checkpoints: dict[str, Path]) -> None:
    fleet = Fleet(checkpoints["mla"], transport="shared,stream")
    try:
        await fleet.start()
        await asyncio.to_thread(Path(f"{fleet.workers['prefill'].socket}.shared").unlink)  # nobody is found there now
        relayed = await fleet.relay(list(range(3, 103)), 4)
        text = await fleet.finish(relayed)
        assert relayed.finish == worker_pb2.FINISH_LENGTH, fleet.logs(relayed)
        assert text == await fleet.alone("prefill", list(range(3, 103)), 4)
        await fleet.settles("prefill", "decode")
        assert "no connection by this transport" in fleet.workers["decode"].log.read_text()
    finally:
        await fleet.close()


async def test_idle_workers_do_not_spin(fleet: Fleet) -> None:
    """All kinds are open, and one of them was used: heartbeats are all that is left."""
    await fleet.finish(await fleet.relay(list(range(3, 103)), 4))
    await fleet.settles("prefill", "decode")
    processes = [psutil.Process(worker.process.pid) for worker in fleet.workers.values()]
    await asyncio.sleep(0.5)

    def used_s() -> list[float]:
        return [sum(process.cpu_times()[:2]) for process in processes]

    before = used_s()
    await asyncio.sleep(2.5)
    assert all(after - began < 0.25 for began, after in zip(before, used_s(), strict=True)), (before, used_s())
