"""Generates proto/*_pb2*.py from proto/*.proto; with --check, says which files are stale and fails."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(out: Path) -> None:
    """Run protoc for every .proto file; the imports it writes are under `tokenrelay.proto`."""
    from grpc_tools import protoc

    names = sorted(path.name for path in (ROOT / "proto").glob("*.proto"))
    args = [
        "protoc",
        f"-Itokenrelay/proto={ROOT / 'proto'}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
    ]
    status = protoc.main(args + [f"tokenrelay/proto/{name}" for name in names])
    if status:
        raise SystemExit(status)


def main() -> None:
    """Write the generated files into proto/, or compare them."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.name: path.read_text() for path in (Path(folder) / "tokenrelay" / "proto").iterdir()}
    stale = [
        name
        for name, text in fresh.items()
        if not (ROOT / "proto" / name).exists() or (ROOT / "proto" / name).read_text() != text
    ]
    if "--check" in sys.argv[1:]:
        if stale:
            raise SystemExit(f"stale generated code: {', '.join(sorted(stale))}; run `make proto`")
        return
    for name in stale:
        (ROOT / "proto" / name).write_text(fresh[name])
        print(f"wrote proto/{name}")


if __name__ == "__main__":
    main()
