"""Run by wheel_smoke.sh inside the empty environment: the installed package answers one chat request."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request


def free_port() -> int:
    """A TCP port that is free right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_ready(url: str, server: subprocess.Popen[bytes], deadline_s: float) -> None:
    """Poll /ready until it answers 200."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    raise SystemExit(f"not ready after {deadline_s} s")


def main() -> None:
    """Start `tokenrelay serve` with its defaults, ask one question, stop it with SIGTERM."""
    command = sys.argv[1]
    subprocess.run([command, "version"], check=True)
    port = free_port()
    server = subprocess.Popen([command, "serve", "--port", str(port)])
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, server, 120)
        body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer = json.load(reply)
        assert answer["choices"][0]["message"]["content"], answer
        print("answer:", answer["choices"][0]["message"]["content"])
        for path in ("/", "/page/app.js", "/mesh"):  # files of the package that are no Python
            with urllib.request.urlopen(f"{url}{path}", timeout=10) as reply:
                assert reply.status == 200 and reply.read(), path
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
    if code != 0:
        raise SystemExit(f"the server ended with {code} after SIGTERM, expected 0")


if __name__ == "__main__":
    main()
