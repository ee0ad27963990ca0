"""deploy/docker-compose.yml under a project of its own, as the tests use it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).resolve().parent / "inside"
COMPOSE = ROOT / "deploy/docker-compose.yml"
MODEL = "tokenrelay-tiny"
ROLES = ("router", "prefill", "decode", "kvstore", "etcd")

# What fits a small machine, and gives equal text in every batch; the environment's own values come first.
DEFAULTS = {
    "TOKENRELAY_IMAGE": "tokenrelay:test",
    "TOKENRELAY_DTYPE": "float32",
    "TOKENRELAY_DETERMINISTIC": "true",
    "TOKENRELAY_WORKER_CPUS": "1",
    "TOKENRELAY_WORKER_MEMORY": "1500m",
    "TOKENRELAY_KV_MEMORY": "64MiB",
    "TOKENRELAY_DRAIN_S": "60",
    "TOKENRELAY_WORKER_STOP": "70s",
}


class Stack:
    """One project of Docker Compose."""

    def __init__(self) -> None:
        self.project = f"tokenrelay-test-{os.getpid()}"
        self.port = _free_port()
        self.environment = {**DEFAULTS, **os.environ, "TOKENRELAY_PORT": str(self.port)}
        self.image = self.environment["TOKENRELAY_IMAGE"]
        self.url = f"http://127.0.0.1:{self.port}"

    # -- docker -------------------------------------------------------------------------------------------------------
    def docker(self, *arguments: str, check: bool = True, timeout_s: float = 120) -> str:
        """What `docker ARGUMENTS` prints. Fails with all of its output where it fails."""
        done = subprocess.run(
            ["docker", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"docker {' '.join(arguments)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def compose(self, *arguments: str, check: bool = True, timeout_s: float = 120) -> str:
        """The same of `docker compose` in this project."""
        command = ("compose", "--progress", "plain", "--project-name", self.project, "--file", str(COMPOSE))
        return self.docker(*command, *arguments, check=check, timeout_s=timeout_s)

    def scale(self, **counts: int) -> None:
        """Start or end containers until each role has so many, ready."""
        wanted = [part for role, count in counts.items() for part in ("--scale", f"{role}={count}")]
        self.compose("up", "--detach", "--no-recreate", "--wait", "--wait-timeout", "300", *wanted, timeout_s=400)

    def containers(self, role: str) -> list[str]:
        """Ids of a role's running containers."""
        return self._labelled("ps", f"com.docker.compose.service={role}")

    def left(self) -> dict[str, list[str]]:
        """What there is of this project, ended containers too."""
        return {
            "containers": self._labelled("ps", "", "--all"),
            "networks": self._labelled("network ls"),
            "volumes": self._labelled("volume ls"),
        }

    def _labelled(self, what: str, label: str = "", *more: str) -> list[str]:
        labels = [f"com.docker.compose.project={self.project}", *([label] if label else [])]
        filters = [part for one in labels for part in ("--filter", f"label={one}")]
        return self.docker(*what.split(), "--quiet", *more, *filters).split()

    def inspect(self, container: str) -> dict[str, Any]:
        """All that the engine knows about it."""
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", container))
        return found[0]

    def python(self, container: str, program: str, *arguments: str) -> str:
        """What a program of tests/compose/inside prints in this container, with the rights of its service."""
        text = (INSIDE / f"{program}.py").read_text()
        return self.docker("exec", container, "python", "-Pc", text, *arguments)

    def metrics(self, container: str, port: int) -> dict[str, float]:
        """Name with labels -> value, of a worker's or a kvstore's page; empty where there is none now."""
        program = (
            f"import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:{port}/metrics').read().decode())"
        )
        lines = self.docker("exec", container, "python", "-Pc", program, check=False).splitlines()
        rows = (line.rsplit(" ", 1) for line in lines if line.startswith("tokenrelay_"))
        return {name.removeprefix("tokenrelay_"): float(value) for name, value in rows}

    def kvstore(self, role: str) -> list[str]:
        """Containers of kvstores that are `active`, `standby` or `suspended` now."""
        name = f'kvstore_role{{role="{role}"}}'
        return [one for one in self.containers("kvstore") if self.metrics(one, 7001).get(name)]

    def hand_over(self, prompt_tokens: int = 1500) -> dict[str, Any]:
        """A request on two legs, from a prefill container to a decode container: see inside/hand_over.py."""
        containers = [self.containers(role)[0] for role in ("prefill", "decode", "router")]
        addresses = [f"{self.inspect(one)['Config']['Hostname']}:7100" for one in containers[:2]]
        found: dict[str, Any] = json.loads(self.python(containers[2], "hand_over", *addresses, str(prompt_tokens)))
        return found

    def kill(self, container: str) -> None:
        """SIGKILL for its process, from outside: `docker kill` would count as an operator's wish."""
        pid = str(self.inspect(container)["State"]["Pid"])
        program = "import os, sys; os.kill(int(sys.argv[1]), 9)"
        self.docker(
            *("run", "--rm", "--pid", "host", "--user", "0", "--network", "none", "--entrypoint", "python"),
            *(self.image, "-c", program, pid),
        )

    # -- the router ---------------------------------------------------------------------------------------------------
    def get(self, path: str) -> str:
        """A page of the router."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read(), "utf-8")

    def workers(self) -> list[dict[str, Any]]:
        """As the router sees them."""
        found: list[dict[str, Any]] = json.loads(self.get("/workers"))["workers"]
        return found

    def usable(self) -> dict[str, int]:
        """Role -> workers that the router may use."""
        ready = [worker["role"] for worker in self.workers() if worker["ready"]]
        return {role: ready.count(role) for role in set(ready)}

    def client(self) -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def async_client(self) -> openai.AsyncOpenAI:
        """The same, for many at once."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=240)


def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    """Wait for it."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.25)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
