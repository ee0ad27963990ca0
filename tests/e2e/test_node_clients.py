"""Both vendors' clients for Node hold conversations, colocated and with prompt and answer at two workers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import Server

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "tests/node"
CASES = 21


@pytest.fixture(scope="module")
def node_suite() -> Path:
    """The suite beside its installed clients, in build/node."""
    for program in ("node", "npm"):
        assert shutil.which(program), f"no {program} found. On Debian: apt-get install nodejs npm"
    folder = ROOT / "build/node"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "suite.mjs"):
        shutil.copyfile(SUITE / name, folder / name)
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "suite.mjs"


def converse(suite: Path, server: Server) -> None:
    done = subprocess.run(
        ["node", str(suite), server.url, server.model], cwd=suite.parent, capture_output=True, text=True, timeout=400
    )
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = [f"{case['case']}: {case['error']}" for case in cases if case["error"]]
    assert done.returncode == 0 and not failed, "\n\n".join([*failed, done.stderr[-2000:]])
    assert len(cases) == CASES


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_colocated(node_suite: Path, bundled: Server) -> None:
    converse(node_suite, bundled)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_legs(node_suite: Path, start: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> None:
    config = tmp_path_factory.mktemp("config") / "relay.toml"
    config.write_text('[router]\nremote_prefill = "always"\n')
    converse(node_suite, start("--prefill", 1, "--decode", 1, "--dtype", "float32", "--config", config, command="up"))
