"""Transports of this process and peers in others, which end with the test."""

from __future__ import annotations

from typing import Any

from pools import Pool
from processes import PeerProcess

from tokenrelay.base.ids import incarnation
from tokenrelay.transfer.select import open_transport
from tokenrelay.transfer.transport import Identity, Transport


class Stage:
    """Makes transports here and peers there, and ends them with the test."""

    def __init__(self, kind: str, folder: str) -> None:
        self.kind = kind
        self._folder = folder
        self._sockets = 0
        self._transports: list[Transport] = []
        self._peers: list[PeerProcess] = []

    def listen(self) -> str:
        """A fresh socket."""
        self._sockets += 1
        return f"unix:{self._folder}/{self._sockets}"

    async def transport(self, pool: Pool, name: str = "decode-0", **options: Any) -> Transport:
        """Open, in this process."""
        options.setdefault("listen", self.listen())
        transport = open_transport(self.kind, Identity(name, incarnation()), pool.memory, **options)
        await transport.open()
        self._transports.append(transport)
        return transport

    async def peer(self, blocks: int = 64, name: str = "prefill-0", **given: Any) -> PeerProcess:
        """Another process with a pool."""
        given.setdefault("listen", self.listen())
        peer = await PeerProcess.start(kind=self.kind, name=name, blocks=blocks, **given)
        self._peers.append(peer)
        return peer

    async def close(self) -> None:
        """End everything."""
        for transport in self._transports:
            await transport.close()
        for peer in self._peers:
            await peer.stop()
