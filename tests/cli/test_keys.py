"""`tokenrelay keys`, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tokenrelay.services.router.keys import KeyBook, read_keys


def keys(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenrelay.cli.main", "keys", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, check=False)


def test_create_list_revoke(tmp_path: Path) -> None:
    made = keys(
        tmp_path,
        "create",
        "ci",
        "--tenant",
        "build",
        "--requests-per-minute",
        "60",
        "--concurrency",
        "4",
        "--tps-floor",
        "120",
    )
    assert made.returncode == 0, made.stderr
    key = next(word for word in made.stdout.split() if word.startswith("tr-"))
    record = KeyBook(read_keys(tmp_path / "keys.json")).find(key)
    assert record is not None
    assert (record.name, record.tenant, record.requests_per_minute, record.concurrency) == ("ci", "build", 60, 4)
    assert record.tps_floor == 120
    quiet = keys(tmp_path, "create", "boss", "--admin", "--quiet").stdout.strip()
    assert KeyBook(read_keys(tmp_path / "keys.json")).find(quiet).admin
    listed = keys(tmp_path, "list")
    assert "ci" in listed.stdout and "build" in listed.stdout and "admin" in listed.stdout
    assert key not in listed.stdout and record.sha256 not in listed.stdout
    rows = json.loads(keys(tmp_path, "list", "--json").stdout)
    assert [row["name"] for row in rows] == ["ci", "boss"] and all("sha256" not in row for row in rows)
    assert keys(tmp_path, "revoke", "ci").returncode == 0
    assert KeyBook(read_keys(tmp_path / "keys.json")).find(key) is None


def test_what_goes_wrong_is_one_sentence(tmp_path: Path) -> None:
    keys(tmp_path, "create", "ci", "-q")
    for arguments, said in (
        (("create", "ci"), "already"),
        (("create", "two words"), "name is 'two words'"),
        (("revoke", "nobody"), "has no key 'nobody'; it has: ci"),
        (("list", "--file", "none.json"), "cannot read the keys file none.json"),
        (("create", "x", "--file", "none/keys.json"), "cannot write beside the keys file"),
    ):
        done = keys(tmp_path, *arguments)
        assert done.returncode == 1 and said in done.stderr, (arguments, done.stderr)
        assert len(done.stderr.splitlines()) == 1
