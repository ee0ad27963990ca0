"""What a group of ranks cannot serve: one clear error before anything is served, no hang, no process left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from spmd_processes import wait_gone
from worker_process import WorkerProcess

from tokenrelay.base.errors import PlacementError, Unavailable
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd.comm import Comm
from tokenrelay.runtime.spmd.load import code_identity
from tokenrelay.runtime.spmd.ranks import Ranks, refuse_devices


def children_of(pid: int) -> list[int]:
    """Of any age: started by whichever thread."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def refused(folder: Path, *flags: str) -> str:
    """The worker's one error; its processes are gone."""
    worker = WorkerProcess("--slots", "4", "--blocks", "20", *flags, model=folder)
    try:
        followers: list[int] = []
        settled = worker.wait_settled()
        followers += children_of(worker.process.pid)
        assert settled["event"] != "ready", settled
        assert worker.wait() != 0
        wait_gone([worker.process.pid, *followers])
        return str(settled)
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tp", "3"), "cannot be dealt out evenly to 3 ranks"),  # heads
        (("--ep", "3"), "w_gate_up: a dimension of 8 cannot be dealt out evenly to 3 ranks"),  # experts
        (("--pp", "4"), "4 pipeline stages, and the model has 3 layers"),
        (("--dp", "2", "--experts", "send,cut"), "leave dp among the axes"),
        (("--tp", "16", "--dp", "16"), "256 ranks; a worker has 1 to 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_meshes_that_do_not_fit(checkpoint: Callable[..., Path], flags: tuple[str, ...], said: str) -> None:
    assert said in refused(checkpoint("v3-worker", "deepseek_v3", num_hidden_layers=3), *flags)


def test_a_missing_shard(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    whole = checkpoint("qwen3-files", "qwen3", max_shard_size="60KB")
    folder = tmp_path / "part"
    shutil.copytree(whole, folder)
    lost = sorted(folder.glob("*.safetensors"))[2]
    lost.unlink()
    assert lost.name in refused(folder, "--tp", "2")


@pytest.mark.parametrize(
    ("what", "said"),
    [("weights", "other weights"), ("code", "it runs other code than the leader")],
)
def test_a_rank_that_differs(checkpoint: Callable[..., Path], tmp_path: Path, what: str, said: str) -> None:
    folder = checkpoint("qwen3-small", "qwen3")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    file = next(other.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    swap = {"weights": (str(folder), str(other)), "code": (code_identity(), "0" * 32)}[what]
    with Ranks(2, step_max_s=5) as ranks:
        original = ranks._send

        def misdirect(followers: object, kind: bytes, payload: bytes) -> None:
            original(followers, kind, payload.replace(swap[0].encode(), swap[1].encode()))  # type: ignore[arg-type]

        ranks._send = misdirect  # type: ignore[assignment, method-assign]
        with pytest.raises(Unavailable, match=f"rank 1 does not fit rank 0: .*{said}"):
            ranks.load(folder, Mesh(tp=2), dtype=torch.float32)
        wait_gone(ranks.pids)


def test_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs a rank has one of its own; NCCL moves what lies there, gloo the rest."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refuse_devices(2, shared=False)
    with pytest.raises(PlacementError, match="4 ranks on this host, and it has 2 GPUs"):
        refuse_devices(4, shared=False)
    with pytest.raises(PlacementError, match="on GPUs ranks are no members of a fleet"):
        refuse_devices(2, shared=True)
    made: list[str] = []
    for kind in ("_gloo", "_nccl"):
        monkeypatch.setattr(Comm, kind, lambda *_, kind=kind: made.append(kind))
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        Comm(torch.distributed.HashStore(), "t", Mesh(tp=2), 0, 1.0, device=device).connect(("tp",))
    assert made == ["_gloo", "_nccl"]
