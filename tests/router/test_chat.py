"""Chat completions, unary and streamed, through real HTTP."""

from __future__ import annotations

from router_stack import Stack


async def test_hello(stack: Stack) -> None:
    reply = await stack.chat()
    assert reply["choices"][0]["message"]["content"] == "Hello world!"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == len(stack.worker.ids("Hello world!")) + 1
