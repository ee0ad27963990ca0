"""The Dockerfile and the scripts of the image, without building it: tests/compose builds it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path

from stack import DEPLOY, ROOT

from tokenrelay.services.chassis.admin import AdminServer

BIN = DEPLOY / "bin"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def stages() -> dict[str, str]:
    """Name of each stage -> its text."""
    parts = re.split(r"^FROM \S+ AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of the image on this machine."""
    path = f"{environment.pop('path', '')}:{os.environ['PATH']}"
    variables = {key: value for key, value in os.environ.items() if not key.startswith("TOKENRELAY_")}
    return subprocess.run(
        [str(BIN / script), *arguments],
        env={**variables, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_the_image_runs_as_nobody_special() -> None:
    runtime = stages()["runtime"]
    (user,) = re.findall(r"^USER (\d+):(\d+)$", runtime, re.MULTILINE)
    assert int(user[0]) > 0 and int(user[1]) > 0
    assert list(stages())[-1] == "runtime"
    assert runtime.index("USER ") < runtime.index("ENTRYPOINT ")


def test_no_compiler_and_no_etcd_in_what_runs() -> None:
    assert "g++" in stages()["build"]
    for name in ("install", "runtime"):
        assert "apt-get" not in stages()[name]
    assert not re.search(r"install.*\betcd(ctl|-server)?\b(?!$)", re.sub(r"/\S*etcd", "", stages()["runtime"]))


def test_the_build_takes_every_package_of_the_wheel() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines, "nothing is taken that is not named"
    taken = {line[1:] for line in lines if line.startswith("!")}
    assert {path.split("/")[0] for path in packages.values()} <= taken
    assert {"pyproject.toml", "README.md", "CMakeLists.txt", "deploy/bin"} <= taken
    assert all((ROOT / path).exists() for path in taken)
    left_out = [line for line in lines if line and line[0] not in "!#*"]
    assert all((ROOT / path).is_dir() for path in left_out)
    assert not [path for path in left_out if "assets/tokenrelay-tiny".startswith(path)], (
        "the image has the bundled model"
    )


def test_every_script_is_there_and_may_run() -> None:
    copied = set(re.findall(r"deploy/bin/([\w-]+)", DOCKERFILE))
    assert copied == {path.name for path in BIN.iterdir()}
    for path in BIN.iterdir():
        assert path.stat().st_mode & stat.S_IXUSR, f"{path} is not executable"


def test_a_token_is_made_once(tmp_path: Path) -> None:
    file = tmp_path / "token"
    assert run("tokenrelay-token", str(file)).returncode == 0
    token = file.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run("tokenrelay-token", str(file)).returncode == 0
    assert file.read_text() == token, "kept over restarts"
    other = tmp_path / "other"
    run("tokenrelay-token", str(other))
    assert other.read_text() != token
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "token"]


def test_a_token_of_ones_own_is_written_down(tmp_path: Path) -> None:
    file = tmp_path / "token"
    run("tokenrelay-token", str(file))
    done = run("tokenrelay-token", str(file), TOKENRELAY_TOKEN="an-operators-own-token")
    assert done.returncode == 0
    assert file.read_text().strip() == "an-operators-own-token"
    assert "an-operators-own-token" not in done.stdout + done.stderr
    missing = run("tokenrelay-token", str(tmp_path / "no" / "folder"))
    assert missing.returncode != 0


async def test_the_health_check_follows_ready() -> None:
    import asyncio

    answer = [(True, "")]
    admin = AdminServer("127.0.0.1", 0, ready=lambda: answer[0], metrics=lambda: "")
    port = str(await admin.start())
    ready = await asyncio.to_thread(run, "tokenrelay-ready", port)
    answer[0] = (False, "draining")
    draining = await asyncio.to_thread(run, "tokenrelay-ready", port)
    await admin.stop()
    gone = await asyncio.to_thread(run, "tokenrelay-ready", port)
    assert (ready.returncode, ready.stdout.strip()) == (0, "ready")
    assert (draining.returncode, draining.stdout.strip()) == (1, "draining")
    assert gone.returncode == 1 and "no answer" in gone.stderr


def _environment_of(role: str, tmp_path: Path, **environment: str) -> dict[str, str]:
    """What the role's program would find in its environment."""
    program = tmp_path / "tokenrelay"
    program.write_text('#!/bin/sh\necho "ARGUMENTS=$*"; env\n')
    program.chmod(0o755)
    done = run("tokenrelay-service", role, "--flag", path=str(tmp_path), **environment)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_a_service_tells_others_its_containers_own_name(tmp_path: Path) -> None:
    name = os.uname().nodename
    for role in ("prefill", "decode"):
        found = _environment_of(role, tmp_path)
        assert found["TOKENRELAY_FLEET_ADDRESS"] == f"{name}:7100"
        assert found["ARGUMENTS"] == f"{role} --flag"
    assert _environment_of("kvstore", tmp_path)["TOKENRELAY_KVSTORE_ADVERTISE"] == f"{name}:7000"
    assert _environment_of("router", tmp_path)["ARGUMENTS"] == "router --flag"
    given = _environment_of("decode", tmp_path, TOKENRELAY_FLEET_ADDRESS="10.0.0.7:7100")
    assert given["TOKENRELAY_FLEET_ADDRESS"] == "10.0.0.7:7100"
