"""Explore the handover of KV with SPIN (spinroot.com).

    python tools/model_check.py small          # what CI runs: seconds
    python tools/model_check.py large          # what `make test-full` runs: minutes, up to 6 GiB
    python tools/model_check.py whole          # one of each, and every kind of fault once: 30 million states
    python tools/model_check.py NO_QUARANTINE  # without that guard: prints the steps of the counter-example

The model is libscheduler/model/handover.pml; its transitions are generated from the constexpr tables
(tokenrelay/libscheduler/promela.py). SPIN turns it into a C program, which is compiled with `cc` and run. A search that
is not exhaustive is labelled so. docs/model-checking.md explains what is modelled and what was found.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokenrelay.libscheduler import promela

MODEL = Path(__file__).resolve().parents[1] / "libscheduler" / "model" / "handover.pml"
DEPTH_MAX = 100_000
MEMORY_MIB = 6144


class ModelError(Exception):
    """SPIN or the compiler is missing, or a search ended in no way that is foreseen."""


@dataclass(frozen=True)
class Fleet:
    """How many of each; what a compiled model is for."""

    prefills: int = 1
    decodes: int = 1
    extents: int = 2  # of a block
    bitstate: bool = False  # remember hashes of the states, not the states: not exhaustive
    ltl: bool = False  # what must happen, instead of what must not

    def __str__(self) -> str:
        return f"{self.prefills} prefill, {self.decodes} decode, 1 kvstore, {self.extents} extents"


@dataclass(frozen=True)
class Search:
    """What one search goes through: so many requests and faults in all, each kind of fault once at most."""

    fleet: Fleet
    requests: int = 2
    faults: int = 1
    mutation: promela.Mutation | None = None
    claim: str | None = None  # the name of an LTL property of the model
    never: tuple[int, int] | None = None  # assert that this transition of a handle is not taken, by states' numbers
    minutes_max: int = 60
    hash_bits: int = 33  # of a bitstate search: 2^bits places of one bit

    def __str__(self) -> str:
        text = f"{self.fleet}; {self.requests} requests, {self.faults} faults"
        if self.claim:
            text += f"; LTL {self.claim}"
        return text + (f"; WITHOUT {self.mutation.without}" if self.mutation else "")


@dataclass(frozen=True)
class Result:
    """What it found."""

    search: Search
    error: str | None  # the law that is broken, or None
    complete: bool  # every state was visited
    states: int
    transitions: int
    depth: int
    seconds: float
    memory_mib: float

    def __str__(self) -> str:
        if self.error:
            kind = "stopped at the first error"
        elif self.complete:
            kind = "exhaustive"
        else:
            kind = "bitstate, NOT exhaustive" if self.search.fleet.bitstate else "NOT exhaustive"
        return (
            f"{self.search}: {self.error or 'no error'} ({kind}); {self.states:,} states, {self.transitions:,} "
            f"transitions, depth {self.depth:,}, {self.seconds:.1f} s, {self.memory_mib:,.0f} MiB"
        )


def need(program: str, package: str) -> str:
    """The program's path. ModelError: says how to install it."""
    found = shutil.which(program)
    if found is None:
        raise ModelError(f"`{program}` is not installed. On Debian and Ubuntu: apt-get install {package}")
    return found


class Model:
    """A compiled fleet; `run` searches it, with or without a guard."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        """Generates and compiles in `folder`, which the caller owns."""
        self.fleet = fleet
        self._folder = folder
        spin, compiler = need("spin", "spin"), need("cc", "gcc")
        text = promela.preamble() + MODEL.read_text(encoding="utf-8")
        (folder / "handover.pml").write_text(text, encoding="utf-8")
        sizes = [f"-DPREFILLS={fleet.prefills}", f"-DDECODES={fleet.decodes}", f"-DEXTENTS={fleet.extents}"]
        self._must([spin, *sizes, *(["-DLIVENESS"] if fleet.ltl else []), "-a", "handover.pml"])
        flags = ["-O1", "-w", f"-DMEMLIM={MEMORY_MIB}", "-DVECTORSZ=2048"]
        flags += ["-DBITSTATE"] if fleet.bitstate else ["-DCOLLAPSE"]
        flags += [] if fleet.ltl else ["-DNOCLAIM", "-DSAFETY"]
        self._must([compiler, *flags, "-o", "pan", "pan.c"])

    def run(self, search: Search) -> Result:
        """Search until the first error, to the end, or until its time is over."""
        arguments = [f"-m{DEPTH_MAX}", "-n", f"-Q{search.minutes_max}"]
        arguments += [f"-w{search.hash_bits}"] if self.fleet.bitstate else []
        arguments += ["-a", "-N", search.claim] if search.claim else []
        said = self._pan(arguments, search)

        def find(pattern: str) -> float:
            match = re.search(pattern, said)
            if match is None:
                raise ModelError(f"the search of {search} ended unexpectedly:\n{said[-2000:]}")
            return float(match[1])

        error = re.search(r"law_\w+", said) or re.search(r"(?<=pan:1: ).*?(?= \(at depth)", said)
        cut_short = re.search(r"Search not completed|search depth too small|memory", said.split("State-vector")[0])
        failed = find(r"errors: (\d+)") > 0
        return Result(
            search=search,
            error=(error[0].strip() if error else "an error") if failed else None,
            complete=not failed and not cut_short and not self.fleet.bitstate,
            states=int(find(r"([\d.e+]+) states, stored")),
            transitions=int(find(r"([\d.e+]+) transitions")),
            depth=int(find(r"depth reached (\d+)")),
            seconds=find(r"elapsed time ([\d.e+]+) seconds"),
            memory_mib=find(r"([\d.]+)\s+total actual memory usage"),
        )

    def trace(self, search: Search) -> list[str]:
        """The steps of the counter-example that the last `run` found."""
        lines = self._pan(["-r", "-n", "-S"], search).splitlines()
        return [line.strip() for line in lines if re.match(r"\s*(prefill|decode|ledger|kvstore|the former)\b", line)]

    def _pan(self, arguments: list[str], search: Search) -> str:
        settings = {
            "MODEL_REQUESTS": str(search.requests),
            "MODEL_FAULTS": str(search.faults),
            "MODEL_NEVER": str(16 * search.never[0] + search.never[1] if search.never else 0),
            "MODEL_MUTATION": str(promela.number(search.mutation) if search.mutation else 0),
        }
        done = subprocess.run(
            ["./pan", *arguments],
            cwd=self._folder,
            env=dict(os.environ, **settings),
            capture_output=True,
            text=True,
            timeout=60 * (search.minutes_max + 1),
            check=False,
        )
        return done.stdout + done.stderr

    def _must(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ModelError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")


PAIR = Fleet()
PAIR_LTL = Fleet(ltl=True)
CLAIMS = ("handles_end", "quarantines_end", "sources_come_back", "landings_come_back")
SMALL = (Search(PAIR, faults=2), *(Search(PAIR_LTL, faults=1, claim=claim) for claim in CLAIMS))
LARGE = (
    Search(PAIR, faults=3),
    Search(PAIR, requests=3, faults=1),
    Search(Fleet(decodes=2), faults=1),
    Search(Fleet(prefills=2, extents=1), faults=0),
    Search(Fleet(prefills=2, decodes=2, extents=1), faults=0),
    Search(Fleet(prefills=2, decodes=2, bitstate=True), requests=3, faults=2, minutes_max=5),
)


WHOLE = (Search(PAIR, faults=5),)  # the death of each, both ways for the kvstore, and a false suspicion


def without(mutation: promela.Mutation) -> Search:
    """The search that must find the counter-example."""
    return Search(
        Fleet(decodes=mutation.decodes), requests=mutation.requests, faults=mutation.faults, mutation=mutation
    )


def main() -> int:
    """Command line: 0 when every search found what it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["small", "large", "whole", *(mutation.name for mutation in promela.MUTATIONS)])
    what = parser.parse_args().what
    searches = {"small": SMALL, "large": LARGE, "whole": WHOLE}.get(what)
    if searches is None:
        searches = tuple(without(mutation) for mutation in promela.MUTATIONS if mutation.name == what)
    failed = False
    for search in searches:
        with tempfile.TemporaryDirectory(prefix="model-") as folder:
            model = Model(search.fleet, Path(folder))
            result = model.run(search)
            print(result, flush=True)
            if result.error:
                print("\n".join(f"    {line}" for line in model.trace(search)))
            failed = failed or (result.error is None) == (search.mutation is not None)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
