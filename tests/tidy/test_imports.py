"""Imports run one way, and heavy libraries stay where they belong."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sources import ROOT, Source, import_table, package_sources, part_of, script_sources

# part -> the parts it may import. Changing an arrow needs an ADR.
ARROWS: dict[str, set[str]] = {
    "base": set(),
    "libscheduler": set(),
    "proto": set(),
    "kernels": {"base"},
    "transfer": {"proto", "base"},
    "ledger": {"libscheduler", "proto", "base"},
    "runtime": {"kernels", "libscheduler", "base"},
    "services": set(),
    "services/chassis": {"proto", "base"},
    "services/prefill": {"runtime", "ledger", "transfer", "services/chassis", "proto", "base"},
    "services/decode": {"runtime", "ledger", "transfer", "services/chassis", "proto", "base"},
    "services/router": {"ledger", "transfer", "libscheduler", "services/chassis", "proto", "base"},
    "services/kvstore": {"ledger", "transfer", "libscheduler", "services/chassis", "proto", "base"},
    "assets": {"base", "runtime", "kernels", "libscheduler"},
}
EVERY = set(ARROWS) | {"cli"}

# Third-party libraries that only these parts may import.
HEAVY: dict[str, set[str]] = {
    "torch": {"kernels", "runtime", "services/prefill", "services/decode", "cli", "assets"},
    "transformers": {"assets"},
    "triton": {"kernels"},
    "aetcd": {"ledger"},
    "aiohttp": {"services/router", "services/chassis", "cli"},
    "grpc": {
        "services/chassis",
        "services/prefill",
        "services/decode",
        "services/kvstore",
        "transfer",
        "ledger",
        "cli",
    },
}


def ours(dotted: str) -> bool:
    return dotted == "tokenrelay" or dotted.startswith("tokenrelay.")


@pytest.mark.parametrize("source", package_sources(), ids=lambda s: str(s.path))
def test_imports_follow_the_arrows(source: Source) -> None:
    allowed = (ARROWS | {"cli": EVERY})[source.part] | {source.part}
    wrong = []
    for line, dotted in source.imports():
        assert not dotted.startswith(".."), f"{source.path}:{line}: relative import across packages"
        if ours(dotted) and part_of(dotted) not in allowed:
            wrong.append(
                f"{source.path}:{line}: {source.part} may not import {dotted} (allowed: {', '.join(sorted(allowed))})"
            )
        library = dotted.split(".")[0]
        if library in HEAVY and source.part not in HEAVY[library]:
            wrong.append(f"{source.path}:{line}: {source.part} may not import {library}")
    assert not wrong, "\n".join(wrong)


def test_no_bare_import_of_our_folders() -> None:
    """`import services` would load a second copy of the package beside `tokenrelay.services`."""
    folders = {target.split("/")[1] for target in import_table()}
    wrong = [
        f"{source.path}:{line}: import {dotted}; say tokenrelay.{dotted}"
        for source in (*package_sources(), *script_sources())
        for line, dotted in source.imports()
        if dotted.split(".")[0] in folders
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_folder_is_in_the_import_table() -> None:
    for target, folder in import_table().items():
        assert target.split("/")[-1] == folder.split("/")[-1], (
            f"{target} = {folder}: the last part must be equal on both sides"
        )
        assert (ROOT / folder).is_dir(), f"the import table names {folder}, which is not there"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "tokenrelay.services.router.service",
            ["torch", "transformers", "triton", "tokenrelay.runtime", "tokenrelay.kernels"],
        ),
        ("tokenrelay.cli.main", ["torch", "transformers", "aiohttp", "grpc", "tokenrelay.runtime"]),
        ("tokenrelay.kernels.ops", ["triton", "transformers"]),
        ("tokenrelay.services.kvstore.service", ["torch", "transformers", "tokenrelay.runtime", "tokenrelay.kernels"]),
        ("tokenrelay.services.chassis.client", ["torch", "numpy"]),
    ],
)
def test_importing_does_not_load(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]", f"importing {module} loads {loaded}"
