"""Connections: TLS, slow and too many ones; pages of other origins."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

import openai
import pytest
import trustme
from router_stack import Stack, StartStack, until

from tokenrelay.base.errors import ConfigError
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.cors import Cors
from tokenrelay.services.router.door import tls_context


def port_of(stack: Stack) -> int:
    return int(stack.url.rsplit(":", 1)[1])


async def connect(stack: Stack) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port_of(stack))


# -- slow clients ----------------------------------------------------------------------------------------------------
async def test_a_connection_that_says_nothing_is_closed(start_stack: StartStack) -> None:
    stack = await start_stack(head_timeout_s=0.1)
    reader, writer = await connect(stack)
    began_s = time.monotonic()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    assert time.monotonic() - began_s >= 0.09
    writer.close()


async def test_headers_that_trickle_are_answered_408(start_stack: StartStack) -> None:
    stack = await start_stack(head_timeout_s=0.2)
    reader, writer = await connect(stack)

    async def trickle() -> None:
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        for number in range(1000):
            writer.write(b"X-%d: y\r\n" % number)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(trickle())
    reply = await asyncio.wait_for(reader.read(), 5)
    task.cancel()
    assert reply.startswith(b"HTTP/1.1 408 ")
    await until(lambda: stack.service._runner.connections_open == 0)


async def test_a_head_in_pieces_is_served_and_stays(start_stack: StartStack) -> None:
    """However it is cut, the guard steps aside when it is whole; the connection outlives the bound."""
    stack = await start_stack(head_timeout_s=2.0)
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    for cut in range(1, len(head)):
        reader, writer = await connect(stack)
        writer.write(head[:cut])
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(head[cut:])
        assert await reader.readuntil(b"\r\n\r\n")
        if cut == len(head) - 1:
            await reader.readexactly(15)
            await asyncio.sleep(2.1)
            writer.write(head)
            assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_body_that_trickles_is_given_up(start_stack: StartStack) -> None:
    stack = await start_stack(body_timeout_s=0.2)
    reader, writer = await connect(stack)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 504")
    writer.close()


async def test_connections_have_a_bound(start_stack: StartStack) -> None:
    stack = await start_stack(connections_max=3)
    held = [await connect(stack) for _ in range(3)]
    await until(lambda: stack.service._runner.connections_open == 3)
    reader, writer = await connect(stack)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(reader.readexactly(1), 5)
    held[0][1].close()
    await until(lambda: stack.service._runner.connections_open == 2)
    reader, writer = await connect(stack)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_headers_have_a_bound(stack: Stack) -> None:
    for head in (b"X: " + b"y" * 20_000, b"\r\n".join(b"X-%d: y" % number for number in range(300))):
        reader, writer = await connect(stack)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        assert (await asyncio.wait_for(reader.readline(), 5)).split()[1] == b"400"
        writer.close()


MALFORMED = [
    b"nonsense\r\n\r\n",
    b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # somebody speaks TLS to us
    b"GET /\xff\x00 HTTP/1.1\r\n\x01: \x02\r\n\r\n",
]


async def test_what_is_no_http_is_a_400_and_one_line_in_the_log(
    stack: Stack, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for head in MALFORMED:
        reader, writer = await connect(stack)
        writer.write(head)
        assert (await asyncio.wait_for(reader.read(), 5)).split()[1] == b"400", head
        writer.close()
    lines = [record for record in caplog.records if record.name.startswith(("aiohttp", "tokenrelay"))]
    assert [record.message for record in lines if record.levelname != "DEBUG"] == ["a head that is no HTTP"]
    assert not any(record.exc_info for record in lines if record.levelname != "DEBUG")
    said = capfd.readouterr().err
    assert "Error handling request" not in said and "http_exceptions" not in said, "no traceback of aiohttp's"
    assert stack.service._runner.log.malformed >= len(MALFORMED) - 2  # two are a method that is none: aiohttp's debug
    assert (await stack.chat())["choices"]


# -- TLS -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path, ssl.SSLContext]:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(tmp_path / "certificate.pem"), append=True)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return tmp_path / "certificate.pem", tmp_path / "key.pem", context


async def test_https(start_stack: StartStack, certificate: tuple[Path, Path, ssl.SSLContext]) -> None:
    chain, key, context = certificate
    stack = await start_stack(tls_certificate=str(chain), tls_key=str(key), head_timeout_s=5.0)
    import httpx

    url = f"https://localhost:{port_of(stack)}/v1"
    async with (
        httpx.AsyncClient(verify=context) as http,
        openai.AsyncOpenAI(base_url=url, api_key="x", http_client=http, max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model="mock", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "Hello world!"
    reader, writer = await connect(stack)  # plain HTTP is no use there
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert not (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200")


def test_what_is_wrong_with_tls_files_is_said(tmp_path: Path, certificate: tuple[Path, Path, ssl.SSLContext]) -> None:
    chain, key, _ = certificate
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("x").private_key_pem.write_to_path(str(other))
    for given, said in (
        ({"tls_certificate": str(chain)}, "router.tls_key is missing"),
        ({"tls_key": str(key)}, "router.tls_certificate is missing"),
        ({"tls_certificate": str(tmp_path / "none.pem"), "tls_key": str(key)}, "No such file"),
        ({"tls_certificate": str(chain), "tls_key": str(other)}, "do not make a pair"),
    ):
        with pytest.raises(ConfigError, match=said):
            tls_context(RouterConfig(**given))
    assert tls_context(RouterConfig()) is None


# -- CORS ------------------------------------------------------------------------------------------------------------
PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


async def test_cors_is_off(stack: Stack) -> None:
    async with stack.http.options(stack.url + "/v1/chat/completions", headers=PREFLIGHT) as response:
        assert response.status == 405 and "Access-Control-Allow-Origin" not in response.headers
    async with stack.http.get(stack.url + "/v1/models", headers={"Origin": "https://page.example"}) as response:
        assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("origins", [("https://page.example",), ("*",)])
async def test_cors_for_named_origins(start_stack: StartStack, tmp_path: Path, origins: tuple[str, ...]) -> None:
    from tokenrelay.services.router.keys import new_key, write_keys

    key, record = new_key("one")
    write_keys(tmp_path / "keys.json", [record])
    stack = await start_stack(cors_origins=origins, keys=str(tmp_path / "keys.json"))
    allowed = "*" if origins == ("*",) else "https://page.example"
    async with stack.http.options(stack.url + "/v1/chat/completions", headers=PREFLIGHT) as response:
        assert response.status == 204, "a browser sends no key with a preflight"
        assert response.headers["Access-Control-Allow-Origin"] == allowed
        assert response.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        assert "Access-Control-Allow-Credentials" not in response.headers
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    for authorization, expected in ((f"Bearer {key}", 200), ("Bearer no", 401)):
        headers = {"Origin": "https://page.example", "Authorization": authorization}
        async with stack.http.post(stack.url + "/v1/chat/completions", json=body, headers=headers) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (expected, allowed)
    async with stack.http.get(stack.url + "/health", headers={"Origin": "https://evil.example"}) as response:
        assert response.headers.get("Access-Control-Allow-Origin") == ("*" if allowed == "*" else None)


@pytest.mark.parametrize("origin", ["page.example", "https://page.example/", "https://", "null"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins"):
        Cors((origin,))
