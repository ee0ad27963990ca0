"""The mesh itself: without a fault the text is right, and nothing is left."""

from __future__ import annotations

from mesh import Mesh, prompt_of
from pretend_device import text_of


async def test_a_handover_without_a_fault() -> None:
    async with Mesh() as mesh:
        for tokens in (1, 16, 100, 100):
            prompt = prompt_of(tokens)
            relayed = await mesh.relay(prompt, 8)
            assert await mesh.right_or_error(relayed, prompt, 8)
            await mesh.settles()
        alone = mesh.decode.submit(prompt_of(50, 9), 8)
        await alone.ended()
        assert alone.token_ids == text_of(prompt_of(50, 9), 8)
