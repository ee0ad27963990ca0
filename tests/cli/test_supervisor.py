"""The supervisor over real processes with a fake workload: transcripts of what it does and says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tokenrelay.base.errors import ConfigError
from tokenrelay.cli.config import SupervisorConfig
from tokenrelay.cli.machine import usable_cpus
from tokenrelay.cli.process import describe_exit
from tokenrelay.cli.supervisor import (
    SOCKET_PATH_BYTES_MAX,
    Backoff,
    child_environment,
    claim_port,
    private_folder,
)

FAST = {"backoff_first_s": 0.05, "backoff_max_s": 0.2, "restarts_max": 2, "stop_s": 0.5, "stall_s": 20.0}


def until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


class Run:
    """A running supervisor; `heard` fills with what its observer was told."""

    def __init__(self, folder: Path, worker: list[str], router: list[str], **limits: Any) -> None:
        script = str(Path(__file__).with_name("supervise.py"))
        arguments = [str(folder), json.dumps({**FAST, **limits}), json.dumps(worker), json.dumps(router)]
        self.folder = folder
        self.process = subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True)
        self.heard: list[list[Any]] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.heard.append(json.loads(line))
                self._news.notify_all()

    def until(self, *words: Any, count: int = 1) -> None:
        """Wait until something that begins with `words` was heard `count` times."""
        with self._news:
            matched = self._news.wait_for(
                lambda: sum(tuple(said[: len(words)]) == words for said in self.heard) >= count, timeout=30
            )
        assert matched, f"never heard {words} {count} times in {self.heard}"

    def end(self) -> int:
        """The exit code; every child that ever lived is gone by then."""
        code = self.process.wait(timeout=30)
        self._reader.join(timeout=10)
        assert not self.alive(), "orphans"
        return code

    def pids(self, name: str) -> list[int]:
        path = self.folder / f"{name}.pids"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def alive(self) -> list[int]:
        pids = self.pids("worker") + self.pids("router")
        return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]

    def verbs(self) -> list[str]:
        return [said[0] for said in self.heard if said[0] != "progress"]


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Any]:
    made: list[Run] = []

    def start(worker: list[str], router: list[str], **limits: Any) -> Run:
        made.append(Run(tmp_path, worker, router, **limits))
        return made[-1]

    yield start
    for run in made:
        run.process.kill()
        run.process.wait()


def test_starts_in_order_and_a_signal_drains_router_then_worker(runs: Any) -> None:
    run = runs(["ready"], ["drain:0.2"])
    run.until("serving")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert run.heard == [
        ["progress", "worker", "weights", 1, 2],
        ["progress", "worker", "weights", 2, 2],
        ["started", "worker", 1],
        ["progress", "router", "weights", 1, 2],
        ["progress", "router", "weights", 2, 2],
        ["started", "router", 1],
        ["serving", "worker", "router"],
        ["draining"],
        ["stopped", True],
    ]
    asked = {name: float((run.folder / f"{name}.terms").read_text().splitlines()[0]) for name in ("router", "worker")}
    assert asked["worker"] - asked["router"] >= 0.2, "the worker was asked to end before the router had drained"


def test_a_second_signal_stops_at_once(runs: Any) -> None:
    run = runs(["ready"], ["drain:60"])
    run.until("serving")
    run.process.send_signal(signal.SIGTERM)
    until(lambda: (run.folder / "router.terms").exists())  # two signals at one moment may reach a process as one
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    assert time.monotonic() - began < 5
    assert len((run.folder / "router.terms").read_text().splitlines()) == 2, "the router hears both signals"
    assert run.heard[-1] == ["stopped", False]


def test_children_that_ignore_signals_are_killed(runs: Any) -> None:
    run = runs(["stubborn"], ["stubborn"], drain_s=0.3)
    run.until("serving")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM


def test_a_start_that_fails_says_the_childs_own_words(runs: Any) -> None:
    run = runs(["fail:model.safetensors: tensor lm_head.weight is missing"], ["ready"])
    assert run.end() == 1
    assert run.heard == [["failed", "model.safetensors: tensor lm_head.weight is missing"], ["stopped", True]]
    assert run.pids("router") == [], "the router is not started for a worker that failed"


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("exit:3", "the worker ended with exit code 3 before it was ready"),
        ("silent", "the worker said nothing for 1 s while it started"),
    ],
)
def test_a_start_without_words_is_described(runs: Any, worker: str, message: str) -> None:
    run = runs([worker], ["ready"], stall_s=1.0)
    assert run.end() == 1
    assert run.heard[0] == ["failed", message]


def test_lines_that_are_no_status_are_ignored(runs: Any) -> None:
    run = runs(["noise"], ["ready"])
    run.until("serving")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_a_router_that_fails_ends_the_worker_too(runs: Any) -> None:
    run = runs(["ready"], ["fail:port 8000 is in use"])
    assert run.end() == 1
    assert run.heard[-2:] == [["failed", "port 8000 is in use"], ["stopped", True]]


def test_children_that_do_not_find_each_other_end_the_start(runs: Any) -> None:
    run = runs(["ready"], ["ready"], joined="fail")
    assert run.end() == 1
    assert run.heard[-2:] == [["failed", "they do not fit"], ["stopped", True]]


def test_a_death_while_they_find_each_other_ends_the_start(runs: Any) -> None:
    run = runs(["ready"], ["die:0.1"], joined="hang")
    assert run.end() == 1
    assert run.heard[-2] == ["failed", "the router was killed by SIGKILL (out of memory?) before it served"]


def test_a_signal_while_they_find_each_other_stops(runs: Any) -> None:
    run = runs(["ready"], ["ready"], joined="hang")
    run.until("started", "router")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert "serving" not in run.verbs()


def test_a_dead_worker_is_started_again_and_the_router_stays(runs: Any) -> None:
    run = runs(["ready"], ["ready"])
    run.until("serving")
    os.kill(run.pids("worker")[0], signal.SIGKILL)
    run.until("started", "worker", 2)
    assert ["died", "worker", "the worker was killed by SIGKILL (out of memory?)", 0.05] in run.heard
    assert len(run.pids("router")) == 1
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_a_dead_router_is_started_again(runs: Any) -> None:
    run = runs(["ready"], ["ready"])
    run.until("serving")
    os.kill(run.pids("router")[0], signal.SIGKILL)
    run.until("started", "router", 2)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_backoff_grows_to_its_bound_and_gives_up(runs: Any) -> None:
    run = runs(["die:0.05"], ["ready"], restarts_max=4)
    assert run.end() == 1
    waits = [said[3] for said in run.heard if said[0] == "died"]
    assert waits == [0.05, 0.1, 0.2, 0.2]
    assert run.heard[-2][0] == "failed"
    assert "5 times in a row" in run.heard[-2][1]


def test_a_restart_that_fails_counts_and_is_tried_again(runs: Any) -> None:
    run = runs(["die:0.05", "fail:disk is away", "ready"], ["ready"])
    run.until("started", "worker", 3)
    assert ["died", "worker", "disk is away", 0.1] in run.heard
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_a_signal_while_starting_stops(runs: Any) -> None:
    run = runs(["silent"], ["ready"])
    until(lambda: run.pids("worker"))
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT


def test_a_signal_while_waiting_to_restart_drains(runs: Any) -> None:
    run = runs(["die:0.01", "ready"], ["ready"], backoff_first_s=20.0, backoff_max_s=20.0)
    run.until("died")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_children_die_with_a_killed_supervisor(runs: Any) -> None:
    run = runs(["stubborn"], ["stubborn"])
    run.until("serving")
    assert len(run.alive()) == 2
    run.process.kill()
    run.process.wait()
    until(lambda: not run.alive())


def test_nothing_runs_when_idle(runs: Any) -> None:
    """No polling: the supervisor's process uses next to no CPU and wakes next to never while nothing happens."""
    run = runs(["ready"], ["ready"])
    run.until("serving")
    process = psutil.Process(run.process.pid)
    time.sleep(0.2)
    before = process.num_ctx_switches().voluntary
    time.sleep(1.0)
    assert process.num_ctx_switches().voluntary - before <= 3


def test_a_rolling_restart_replaces_each_child_once(runs: Any) -> None:
    run = runs(["ready"], ["drain:0.3"])
    run.until("serving")
    run.process.send_signal(signal.SIGUSR2)
    run.until("started", "router", 2)
    until(lambda: len(run.alive()) == 2)
    worker, router = run.pids("worker"), run.pids("router")
    assert (len(worker), len(router)) == (2, 2)
    assert sorted(run.alive()) == sorted([worker[-1], router[-1]])
    said = [words for words in run.heard if words[0] not in ("progress", "serving")][2:]
    assert said == [
        ["replacing", "worker"],
        ["started", "worker", 2],
        ["replacing", "router"],
        ["started", "router", 2],
    ]
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_a_router_that_cannot_be_replaced_goes_on(runs: Any) -> None:
    run = runs(["ready"], ["ready", "exit:3", "ready"])
    run.until("serving")
    run.process.send_signal(signal.SIGUSR2)
    run.until("died", "router")
    assert psutil.pid_exists(run.pids("router")[0]), "its former life serves on"
    run.process.send_signal(signal.SIGUSR2)
    run.until("started", "router", 3)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_a_worker_that_does_not_come_back_is_kept_trying(runs: Any) -> None:
    run = runs(["ready", "exit:3", "ready"], ["ready"])
    run.until("serving")
    run.process.send_signal(signal.SIGUSR2)
    run.until("started", "worker", 3)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_backoff_forgets_after_a_healthy_life() -> None:
    backoff = Backoff(SupervisorConfig(backoff_first_s=1.0, backoff_max_s=8.0, healthy_s=60.0, restarts_max=5))
    assert [backoff.next_s(1.0) for _ in range(5)] == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert backoff.next_s(61.0) == 1.0
    assert [backoff.next_s(0.0) for _ in range(5)] == [2.0, 4.0, 8.0, 8.0, None]


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127\.0\.0\.1 is in use .* --port"):
            claim_port("127.0.0.1", port)
    with claim_port("127.0.0.1", port) as claimed:
        assert claimed.getsockname()[1] == port
        with socket.create_connection(("127.0.0.1", port)):  # waits for a router, and is not refused
            pass
    with claim_port("127.0.0.1", 0) as claimed:
        assert claimed.getsockname()[1] > 0


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--host no\.such\.host\.invalid is no address"):
        claim_port("no.such.host.invalid", 8000)
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        claim_port("192.0.2.1", 0)


def test_environment_sizes_thread_pools_and_leaves_the_users_choice() -> None:
    assert child_environment({"PATH": "/bin"}, 2, light=False)["OMP_NUM_THREADS"] == "2"
    assert child_environment({}, 16, light=False)["OMP_NUM_THREADS"] == "15"
    assert child_environment({}, 2, light=False)["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"
    assert child_environment({"THP_MEM_ALLOC_ENABLE": "0"}, 2, light=False)["THP_MEM_ALLOC_ENABLE"] == "0"
    assert child_environment({}, 2, light=False)["THP_MEM_ALLOC_ENABLE"] == "1"
    assert "THP_MEM_ALLOC_ENABLE" not in child_environment({}, 2, light=True)
    assert child_environment({}, 16, light=True)["OMP_NUM_THREADS"] == "1"
    kept = child_environment({"OMP_NUM_THREADS": "7", "PATH": "/bin"}, 2, light=False)
    assert kept["OMP_NUM_THREADS"] == "7"
    assert kept["PATH"] == "/bin"


def test_private_folder_is_private_short_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with private_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(str(folder / "worker.sock")) <= SOCKET_PATH_BYTES_MAX
        (folder / "worker.sock").touch()
    assert not folder.exists()
    assert list(deep.iterdir()) == []


def test_cpus_respect_a_cgroup_quota(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert usable_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cpus(tmp_path) == usable_cpus(tmp_path / "absent") >= 1


def test_exit_codes_in_words() -> None:
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-signal.SIGSEGV) == "was killed by SIGSEGV"
    assert describe_exit(-250) == "was killed by signal 250"
