"""`tokenrelay serve` with keys and HTTPS, and a client of each vendor through it."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
import trustme
from serving import Server


def new_key(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "tokenrelay.cli.main", "keys", "create", *arguments, "--quiet"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_keys_and_https(start: Callable[..., Server], tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "certificate.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    one, other = new_key(tmp_path, "one"), new_key(tmp_path, "other")
    server = start(
        *("--keys", tmp_path / "keys.json", "--port", "0"),
        *("--tls-certificate", tmp_path / "certificate.pem", "--tls-key", tmp_path / "key.pem"),
    )
    assert server.url.startswith("https://")
    question = [{"role": "user", "content": "Which files do you see here? " + "Look closely. " * 40}]

    def cached(key: str) -> int:
        with (
            httpx.Client(verify=context) as http,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, http_client=http, max_retries=0) as client,
        ):
            reply = client.chat.completions.create(model=server.model, messages=question, max_tokens=4, temperature=0)
            return reply.usage.prompt_tokens_details.cached_tokens

    assert cached(one) == 0
    assert cached(one) > 0
    assert cached(other) == 0, "a tenant finds nothing of another in the cache"
    late = new_key(tmp_path, "late")
    with httpx.Client(verify=context) as http:
        client = anthropic.Anthropic(base_url=server.url, api_key=late, http_client=http, max_retries=5)
        reply = client.messages.create(model=server.model, max_tokens=4, messages=question)
        assert reply.usage.output_tokens == 4 and reply.usage.cache_read_input_tokens == 0
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(api_key="no", max_retries=0).messages.create(
                model=server.model, max_tokens=4, messages=question
            )
