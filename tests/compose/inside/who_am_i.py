"""What this service may do, as JSON: its ids and capabilities, where it can write, whom it can reach."""

import json
import socket
from pathlib import Path

PLACES = ("/", "/etc", "/opt/tokenrelay", "/models", "/run/tokenrelay", "/var/lib/tokenrelay", "/usr/local/bin")
STATUS = dict(line.split(":", 1) for line in Path("/proc/1/status").read_text().splitlines() if ":" in line)


def writes(folder: str) -> bool:
    try:
        Path(folder, "probe").write_text("x")
    except OSError:
        return False
    return True


def reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 2).close()
    except OSError:
        return False
    return True


print(
    json.dumps(
        {
            "uids": STATUS["Uid"].split(),
            "gids": STATUS["Gid"].split(),
            "capabilities": int(STATUS["CapEff"], 16),
            "no_new_privileges": STATUS["NoNewPrivs"].strip(),
            "writes": [folder for folder in PLACES if writes(folder)],
            "tmp": writes("/tmp"),
            "reaches_etcd": reaches("etcd", 2379),
            "reaches_kvstore": reaches("kvstore", 7000),
            "token_mode": oct(Path("/run/tokenrelay/token").stat().st_mode & 0o777),
        }
    )
)
