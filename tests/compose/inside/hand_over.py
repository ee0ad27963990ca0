"""Hand a request over by hand, as a router with two legs: SOURCE computes the prompt, DESTINATION goes on.

Usage: hand_over SOURCE DESTINATION PROMPT_TOKENS. Prints JSON: the ids that came over both legs, and those of the same
request on the destination alone.
"""

import asyncio
import json
import struct
import sys
from pathlib import Path

from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.client import WorkerClient
from tokenrelay.services.chassis.security import Security

TOKEN = Path("/run/tokenrelay/token").read_text().strip()
TOKENS = 24
WAIT_S = 60.0


class Leg:
    """One submitted sequence, and what came of it."""

    def __init__(self, client: WorkerClient, message: worker_pb2.Submit) -> None:
        self.token_ids: list[int] = []
        self.offer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        client.submit(message, self.take)

    def take(self, output: worker_pb2.SequenceOutput) -> None:
        self.token_ids += struct.unpack(f"<{len(output.token_ids) // 4}I", output.token_ids)
        if output.offer:
            self.offer.set_result(output.offer)
        if output.finish:
            self.ended.set_result(worker_pb2.FinishReason.Name(output.finish))


def message(prompt: list[int], **fields: object) -> worker_pb2.Submit:
    return worker_pb2.Submit(
        token_ids=struct.pack(f"<{len(prompt)}I", *prompt),
        output_start=len(prompt),
        tokens_max=TOKENS,
        sampling=worker_pb2.Sampling(ignore_eos=True),
        **fields,
    )


async def main() -> None:
    security = Security(token=TOKEN)
    source, destination = (WorkerClient(address, security=security) for address in sys.argv[1:3])
    for client in (source, destination):
        await client.start()
        await client.wait_ready(WAIT_S)
    prompt = [100 + (7 * i) % 501 for i in range(int(sys.argv[3]))]
    role = worker_pb2.Handover
    first = Leg(source, message(prompt, handover=role(role=role.ROLE_SOURCE)))
    offer = await asyncio.wait_for(first.offer, WAIT_S)
    second = Leg(destination, message(prompt, handover=role(role=role.ROLE_DESTINATION, offer=offer)))
    ends = [await asyncio.wait_for(leg.ended, WAIT_S) for leg in (first, second)]
    alone = Leg(destination, message(prompt))
    await asyncio.wait_for(alone.ended, WAIT_S)
    print(json.dumps({"ends": ends, "both": first.token_ids + second.token_ids, "alone": alone.token_ids}))
    for client in (source, destination):
        await client.close()


asyncio.run(main())
