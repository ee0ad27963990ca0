"""A worker without a model that speaks the gRPC protocol of SGLang's workers, for routers that tokenize. To be run by
the Python that has `smg-grpc-proto`.

    python bench/routers/sglang_worker.py --port 9000 --model DIR --tokens 32 --step-ms 5
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from smg_grpc_proto import sglang_scheduler_pb2 as pb
from smg_grpc_proto import sglang_scheduler_pb2_grpc as service

CONTEXT_TOKENS = 1 << 20
TOKEN_ID = 268  # as good as any
MESSAGE_BYTES_MAX = 64 << 20


class Worker(service.SglangSchedulerServicer):  # type: ignore[misc]
    """Answers with `max_new_tokens` tokens, one every step; without streaming, all at once."""

    def __init__(self, folder: str, tokens: int, step_s: float) -> None:
        self._folder, self._tokens, self._step_s = folder, tokens, step_s

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        prompt = len(request.tokenized.input_ids)
        count = request.sampling_params.max_new_tokens or self._tokens
        if request.stream:
            for number in range(1, count + 1):
                chunk = pb.GenerateStreamChunk(token_ids=[TOKEN_ID], prompt_tokens=prompt, completion_tokens=number)
                yield pb.GenerateResponse(request_id=request.request_id, chunk=chunk)
                await asyncio.sleep(self._step_s)
        done = pb.GenerateComplete(
            output_ids=[TOKEN_ID] * count, finish_reason="length", prompt_tokens=prompt, completion_tokens=count
        )
        yield pb.GenerateResponse(request_id=request.request_id, complete=done)

    async def HealthCheck(self, request: Any, context: Any) -> Any:
        return pb.HealthCheckResponse(healthy=True, message="ok")

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        return pb.GetModelInfoResponse(
            model_path=self._folder,
            tokenizer_path=self._folder,
            is_generation=True,
            served_model_name="mock",
            max_context_length=CONTEXT_TOKENS,
            max_req_input_len=CONTEXT_TOKENS,
            vocab_size=512,
        )

    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        return pb.GetServerInfoResponse(server_type="grpc", sglang_version="0.5.0")

    async def Abort(self, request: Any, context: Any) -> Any:
        return pb.AbortResponse(success=True)


async def main() -> None:
    """Until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=0.0)
    options = parser.parse_args()
    limits = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ]
    server = grpc.aio.server(options=limits)
    worker = Worker(options.model, options.tokens, options.step_ms / 1000)
    service.add_SglangSchedulerServicer_to_server(worker, server)
    server.add_insecure_port(f"127.0.0.1:{options.port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
