"""The command line itself: help that teaches and is fast, errors in one sentence, what each command prints."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.version import version
from tokenrelay.cli.introspect import explain_kernel, print_kernels
from tokenrelay.ledger.states import TERMINAL
from tokenrelay.libscheduler import fsm_tables
from tokenrelay.libscheduler.diagram import document, mermaid


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tokenrelay.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "120", **environment},
    )


COMMANDS = [
    [],
    ["serve"],
    ["chat"],
    ["kernels"],
    ["kernels", "explain"],
    ["fsm"],
    ["fsm", "show"],
    ["explain"],
    ["version"],
    ["config"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_each_command(command: list[str]) -> None:
    done = run(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: tokenrelay {' '.join(command)}".rstrip() in done.stdout
    assert "\\[" not in done.stdout, "markup shows"


def test_help_is_fast_and_light() -> None:
    seconds = []  # of CPU, so that a busy machine does not count
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5, seconds
    code = (
        "import sys, contextlib, io, tokenrelay.cli.main as m\n"
        "sys.argv = ['tokenrelay', 'serve', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): m.main()\n"
        "print([n for n in ('torch', 'aiohttp', 'grpc', 'numpy', 'transformers') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_help_gives_examples_and_defaults() -> None:
    serve = run("serve", "--help").stdout
    for text in (
        "Examples",
        "tokenrelay serve --config relay.toml --print-config",
        "Default: 8000",
        "[router]",
        "429",
        "--tps-floor",
        "--drafts",
        "--draft-tokens",
    ):
        assert text in serve, text
    chat = run("chat", "--help").stdout
    assert 'tokenrelay chat "What is 17 * 23?"' in chat


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["serve", "--prot", "1"], 2, r"No such option: --prot.*\(see: tokenrelay serve --help\)"),
        (["serve", "--dtype", "fp8"], 2, r"Invalid value for '--dtype'.*"),
        (["serve", "--eviction", "fifo"], 2, r"Invalid value for '--eviction'.*'reuse', 'lru'.*"),
        (["serv"], 2, r"No such command 'serv'.*"),
        (["serve", "/no/such/folder"], 1, r"there is no model folder /no/such/folder"),
        (["serve", "deepseek-ai/DeepSeek-V3"], 1, r"there is no model folder .*hf download deepseek-ai/DeepSeek-V3\)"),
        (["serve", "."], 1, r".* holds no config.json, so it is not a model folder .*"),
        (["serve", "--port", "70000"], 1, r"router\.port \(flag --port\) is 70000, expected at most 65535"),
        (["serve", "--config", "/no/file"], 1, r"cannot read the configuration file /no/file: No such file .*"),
        (["kernels", "explain", "nothing"], 1, r"no operation is called 'nothing'; there are .*mla_decode.*"),
        (["kernels", "explain", "rms_norm", "width"], 1, r"'width' is not of the form key=value.*"),
        (["kernels", "explain", "rms_norm", "width=a"], 1, r"width is 'a', expected a whole number"),
        (["fsm", "show", "nothing"], 1, r"no state machine is called 'nothing'; there are .*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_sentence(arguments: list[str], code: int, sentence: str) -> None:
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert re.fullmatch(f"tokenrelay: {sentence}\n", done.stderr), done.stderr


def test_version_names_the_parts() -> None:
    done = run("version")
    assert done.returncode == 0
    for name in ("tokenrelay", "python", "torch", "cpu features", "gpu"):
        assert re.search(rf"^{name} +\S", done.stdout, re.MULTILINE), name


def test_version_as_an_option() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"tokenrelay {version()}\n")


def test_config_shows_value_and_origin(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text("[router]\nport = 8123\n[worker]\nslots = 7\n[supervisor]\ndrain_s = 5\n")
    shown = run(
        "serve", "--config", str(file), "--print-config", "--host", "0.0.0.0", TOKENRELAY_WORKER_DTYPE="float32"
    )
    assert shown.returncode == 0, shown.stderr
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.stdout.splitlines() if line.strip()}
    assert re.match(r"8123 file", rows["router.port"])
    assert rows["router.host"] == "'0.0.0.0' flag --host"
    assert re.match(r"7 file", rows["worker.slots"])
    assert rows["worker.dtype"] == "'float32' environment TOKENRELAY_WORKER_DTYPE"
    assert rows["worker.block_tokens"] == "64 default"
    assert re.match(r"5(\.0)? file", rows["supervisor.drain_s"])
    assert rows["worker.model"].endswith("tokenrelay-tiny' default: the bundled one")
    assert rows["router.worker"] == "the worker's socket set by serve"
    assert run("config", "--config", str(file)).stdout.count("\n") == shown.stdout.count("\n")


def test_kernels_are_listed_and_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, as loading the kernels takes seconds."""
    monkeypatch.setenv("COLUMNS", "60")  # names stay whole on any terminal
    print_kernels("mla_decode")
    assert "ref/torch" in capsys.readouterr().out
    explain_kernel("mla_decode", ["device=cpu", "dtype=float32", "heads=16", "rank=512", "rope=64"])
    assert re.search(r"\* \S+ +chosen: priority \d+", capsys.readouterr().out)
    with pytest.raises(ConfigError, match="rms_norm has no dimension rank; it has width"):
        explain_kernel("rms_norm", ["rank=4"])


def test_state_machines_as_mermaid() -> None:
    tables = fsm_tables()
    assert set(tables) >= {"block", "request", "kv_handle"}
    shown = run("fsm", "show")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == "\n".join(document(tables[name]) for name in sorted(tables))
    assert run("fsm", "show", "kv_handle").stdout == document(tables["kv_handle"])
    for table in tables.values():
        diagram = document(table)
        assert mermaid(table) in diagram, "what docs/ shows"
        assert f"[*] --> {table.initial}\n" in diagram
        arrows = [line for line in diagram.splitlines() if re.match(r"    \w+ --> \w+: ", line)]
        pairs = sum(len(line.split(": ")[1].split(", ")) for line in arrows)
        assert pairs == sum(row.next is not None for row in table.rows) > 0
        assert diagram.count("%% rejected: ") == sum(row.next is None for row in table.rows)


def test_a_handles_life_as_mermaid() -> None:
    diagram = mermaid(fsm_tables()["kv_handle"])
    assert "[*] --> Unused\n    Unused --> Reserved: Reserve\n" in diagram
    assert {state.value.capitalize() for state in TERMINAL} == set(re.findall(r"(\w+) --> \[\*\]", diagram))
