"""The worker process: loads a model and serves it to routers on a Unix socket, or in a fleet at a TCP address.

    python -m tokenrelay.cli.worker --model DIR --socket PATH [--status-fd N] [--config FILE] [--slots 64 …]
    tokenrelay prefill --kvstore kvstore:7000 --address prefill-0:7100     # the same with its role given

Every field of `WorkerConfig` is a flag. First SIGTERM: finish what runs, refuse what is new, exit 0; a second one stops
at once. An expected failure at the start ends with one sentence and exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrelay.base.config import Resolved, resolve
from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import ConfigError, TokenRelayError
from tokenrelay.base.ids import incarnation as new_incarnation
from tokenrelay.base.logging import get_logger, setup_logging
from tokenrelay.base.parent import die_with_parent
from tokenrelay.base.status import StatusPipe
from tokenrelay.base.version import version
from tokenrelay.cli.fleet_config import FleetConfig
from tokenrelay.services.chassis.security import Security, SecurityConfig
from tokenrelay.services.chassis.tracing import Tracer, TracingConfig
from tokenrelay.services.decode.config import KERNELS_FILE, WorkerConfig
from tokenrelay.services.prefill.config import PrefillConfig

if TYPE_CHECKING:
    import torch

    from tokenrelay.cli.colocated import Colocated
    from tokenrelay.proto import worker_pb2
    from tokenrelay.runtime.build import EngineSizes
    from tokenrelay.runtime.executor.memory import Pool
    from tokenrelay.runtime.handover import AllocatePool, PoolMemory
    from tokenrelay.runtime.models.decoder import Model
    from tokenrelay.runtime.spmd.ranks import LeadingModel, Ranks
    from tokenrelay.services.chassis.lifecycle import Lifecycle

log = get_logger("worker")

BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "assets" / "tokenrelay-tiny"
PROGRESS_INTERVAL_S = 0.1
STOPPED_CODE = 128 + signal.SIGTERM  # stopped at once, as a shell would report it
STOP_GRACE_S = 2.0  # for routers to read the last messages of a session


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What one worker process runs with."""

    worker: WorkerConfig
    prefill: PrefillConfig
    fleet: FleetConfig
    security: SecurityConfig
    incarnation: str
    tracing: TracingConfig = dataclasses.field(default_factory=TracingConfig)


def main(arguments: list[str] | None = None, *, role: str | None = None) -> int:
    """Entry point; the exit code. `role`: what `tokenrelay prefill` and `tokenrelay decode` say, instead of --role."""
    die_with_parent()
    parsed = _parser(role).parse_args(arguments)
    status = StatusPipe(parsed.status_fd)
    incarnation = new_incarnation()
    try:
        worker, prefill, fleet, security = settings(parsed)
        tracing = resolve(TracingConfig, "tracing", file=parsed.config)
        if parsed.print_config:
            rows = [*worker.rows(), *prefill.rows(), *fleet.rows(), *security.rows(), *tracing.rows()]
            for name, value, origin in rows:
                shown = "(set)" if name == "security.token" and value != "''" else value
                print(f"{name:28} {shown:40} {origin}")
            return 0
        setup_logging("worker", level=worker.values.log_level, incarnation=incarnation)
        worker.values.check()
        fleet.values.check()
        configs = (worker.values, prefill.values, fleet.values, security.values)
        options = WorkerSettings(*configs, incarnation, tracing.values)
        return asyncio.run(_run_to_its_end(options, status))
    except TokenRelayError as error:
        if parsed.status_fd is None:  # else the supervisor says it, once
            log.error("the worker ends", code=error.code, reason=error.message)
        status.failed(error)
        return 1
    except Exception as error:
        log.exception("the worker ends")
        status.failed(error)
        return 1


async def _run_to_its_end(options: WorkerSettings, status: StatusPipe) -> int:
    """The exit code; stopped at once the process ends here, before the loop waits for what is left to end."""
    tracer = Tracer.of(options.tracing, options.fleet.role if options.fleet.kvstore else "worker", options.incarnation)
    try:
        code, at_once = await run(options, status, tracer)
    finally:
        if tracer is not None:
            await asyncio.to_thread(tracer.close)
    if at_once:  # a step may still run or hang, or the model load, or a call: nobody waits for it
        logging.shutdown()
        os._exit(code)
    return code


def settings(
    parsed: argparse.Namespace,
) -> tuple[Resolved[WorkerConfig], Resolved[PrefillConfig], Resolved[FleetConfig], Resolved[SecurityConfig]]:
    """Flags over environment over file over defaults. Raises ConfigError."""

    def flags(config: type) -> dict[str, Any]:
        return {field.name: getattr(parsed, field.name) for field in dataclasses.fields(config)}

    return (
        resolve(WorkerConfig, "worker", file=parsed.config, flags=flags(WorkerConfig)),
        resolve(PrefillConfig, "prefill", file=parsed.config),
        resolve(FleetConfig, "fleet", file=parsed.config, flags=flags(FleetConfig)),
        resolve(SecurityConfig, "security", file=parsed.config),
    )


def _parser(role: str | None) -> argparse.ArgumentParser:
    if role is None:
        parser = argparse.ArgumentParser(prog="tokenrelay.cli.worker", description="A TokenRelay worker process.")
    else:
        parser = argparse.ArgumentParser(
            prog=f"tokenrelay {role}",
            description=f"A {role} worker of a fleet: tokenrelay {role} --kvstore HOST:PORT --address HOST:PORT. "
            "Every setting can be given by --config (tables [worker] and [fleet]) and by the environment, too "
            "(TOKENRELAY_WORKER_MODEL, TOKENRELAY_FLEET_KVSTORE).",
        )
        parser.set_defaults(role=role)
    for group, config in (("model and engine", WorkerConfig), ("the fleet", FleetConfig)):
        options = parser.add_argument_group(group)
        for field in dataclasses.fields(config):
            if role is None or field.name != "role":
                default = "" if field.default in (None, "", ()) else f" [{field.default}]"
                said = f"{field.metadata['help']}{default}".replace("%", "%%")
                flag = f"--{field.name.replace('_', '-')}"
                options.add_argument(flag, dest=field.name, help=said, metavar="VALUE")
    parser.add_argument(
        "--config", type=Path, help="TOML file with the tables [worker], [prefill], [fleet] and [security]"
    )
    parser.add_argument("--status-fd", type=int, help="report the start-up on this descriptor")
    parser.add_argument("--print-config", action="store_true", help="print every setting and where it came from")
    return parser


async def run(options: WorkerSettings, status: StatusPipe, tracer: Tracer | None = None) -> tuple[int, bool]:
    """Load, serve until drained or stopped: the exit code, and whether threads are left that nobody waits for.

    Raises TokenRelayError when it cannot start.
    """
    from tokenrelay.services.chassis.lifecycle import Lifecycle
    from tokenrelay.services.chassis.server import WorkerServer, socket_path
    from tokenrelay.services.chassis.session import WorkerServicer

    config, fleet = options.worker, options.fleet
    address = (fleet.address if fleet.kvstore else "") or (f"unix:{config.socket}" if config.socket else "")
    if not address:
        where = "fleet.address (host:port) or worker.socket" if fleet.kvstore else "worker.socket"
        raise ConfigError(f"{where} is empty: where should the worker listen?")
    socket_path(address)  # not after minutes of loading
    began_s = time.monotonic()
    lifecycle = Lifecycle()
    lifecycle.install_signals()
    if fleet.kvstore:
        return await run_fleet(options, status, lifecycle, address, began_s, tracer)
    ranks = start_ranks(config)
    model = await _load_unless_ended(config, status, lifecycle, ranks)
    if model is None:
        return 0, True
    host, pool = mount(model, options, lifecycle.fail, ranks)
    servicer = WorkerServicer(host, explain=host.explain, tracer=tracer, name=address)
    host.bind(servicer)
    server = WorkerServer(servicer, address)
    host.start()
    await server.start()
    lifecycle.ready()
    facts = _facts(host.handshake(), pool, time.monotonic() - began_s)
    log.info("ready", **facts)
    status.ready(**facts)
    await lifecycle.wait_drain()
    drained = await lifecycle.unless_stopped(servicer.drain(Deadline.after(config.drain_s)))
    if lifecycle.failure is not None:  # routers get what was said last, the failure among it
        servicer.end_sessions()
    await server.stop(STOP_GRACE_S if drained or lifecycle.failure is not None else 0.0)
    log.info("stopped", drained=drained, failure=repr(lifecycle.failure) if lifecycle.failure else None)
    if lifecycle.failure is not None:
        return 1, True
    if lifecycle.stopping:
        return STOPPED_CODE, True
    await asyncio.to_thread(host.close)
    if ranks is not None:
        await asyncio.to_thread(ranks.close)
    return 0, False


async def run_fleet(
    options: WorkerSettings,
    status: StatusPipe,
    lifecycle: Lifecycle,
    address: str,
    began_s: float,
    tracer: Tracer | None = None,
) -> tuple[int, bool]:
    """The same for a worker that is a member of a fleet: it leaves when its offered KV was read."""
    from tokenrelay.cli.fleet import FleetWorker
    from tokenrelay.runtime.build import build_engine
    from tokenrelay.services.chassis.admin import AdminServer
    from tokenrelay.services.chassis.session import WorkerServicer

    config, fleet = options.worker, options.fleet
    security = Security.of(options.security)
    ranks = start_ranks(config)
    model = await _load_unless_ended(config, status, lifecycle, ranks, shared=True)
    if model is None:
        return 0, True
    worker = FleetWorker(fleet, security, lifecycle, address)
    hash_key = await worker.join(model, handshake_of(model, options, None))
    link = worker.link
    built = build_engine(
        model,
        sizes_of(config),
        on_step=link.on_step,
        on_fatal=link.on_fatal,
        on_cache_events=link.on_cache_events,
        on_handover=worker.on_handover,
        hash_key=hash_key,
        allocate=worker.memory.allocate if ranks is None else lead(model, ranks, worker.memory.allocate, link.on_fatal),
        tokenizer_file=tokenizer_file_of(options),
    )
    handshake = handshake_of(model, options, built.pool)
    host = await worker.mount(built.engine, handshake)
    servicer = WorkerServicer(host, explain=host.explain, tracer=tracer, name=options.fleet.name or address)
    host.bind(servicer)
    server = worker.server(servicer)
    built.engine.start()
    await server.start()
    facts = _facts(handshake, built.pool, time.monotonic() - began_s)
    admin = None
    if fleet.admin_port is not None:
        admin = AdminServer(fleet.admin_host, fleet.admin_port, ready=worker.ready, metrics=worker.page)
        facts["admin_port"] = await admin.start()
    lifecycle.ready()
    log.info("ready", role=fleet.role, **facts)
    status.ready(**facts)
    await lifecycle.wait_drain()
    deadline = Deadline.after(config.drain_s)
    drained = await lifecycle.unless_stopped(servicer.drain(deadline))
    drained = drained and await lifecycle.unless_stopped(worker.drain(deadline))
    await server.stop(STOP_GRACE_S if drained else 0.0)
    log.info("stopped", drained=drained, failure=repr(lifecycle.failure) if lifecycle.failure else None)
    if lifecycle.failure is not None:
        return 1, True
    if lifecycle.stopping:
        return STOPPED_CODE, True
    await worker.leave()
    if admin is not None:
        await admin.stop()
    await asyncio.to_thread(built.engine.close)
    if ranks is not None:
        await asyncio.to_thread(ranks.close)
    link.close()
    return 0, False


def lead(model: Model | LeadingModel, ranks: Ranks, allocate: AllocatePool, on_death: Any) -> AllocatePool:
    """`allocate`, and the ranks' caches with it; from then on their death is the engine's."""
    from tokenrelay.runtime.spmd.ranks import LeadingModel

    assert isinstance(model, LeadingModel)
    ranks.on_death = on_death

    def both(block_bytes: Sequence[int], blocks: int) -> PoolMemory:
        memory = allocate(block_bytes, blocks)
        model.allocate(blocks, memory.generations)
        return memory

    return both


def start_ranks(config: WorkerConfig) -> Ranks | None:
    """The processes of the other ranks, if there are any. They die with the calling thread: use the main one."""
    if config.ranks == 1:
        return None
    from tokenrelay.runtime.executor.threads import processors
    from tokenrelay.runtime.spmd.followers import Rendezvous
    from tokenrelay.runtime.spmd.ranks import Ranks

    rendezvous = Rendezvous(config.rendezvous, config.rendezvous_key) if config.rendezvous else None
    local = min(config.local_ranks, config.ranks) if rendezvous is not None else config.ranks
    threads = max(1, (config.threads or processors()) // local)
    return Ranks(config.ranks, threads=threads, rendezvous=rendezvous, local=local)


async def _load_unless_ended(
    config: WorkerConfig,
    status: StatusPipe,
    lifecycle: Lifecycle,
    ranks: Ranks | None = None,
    *,
    shared: bool = False,
) -> Model | LeadingModel | None:
    """The model; None when asked to end meanwhile. The thread is a daemon: a load that nobody needs keeps nobody."""
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[Model | LeadingModel] = loop.create_future()

    def answer(model: Model | LeadingModel | None, error: Exception | None) -> None:
        if loaded.done():  # given up
            return
        if error is not None:
            loaded.set_exception(error)
        elif model is not None:
            loaded.set_result(model)

    def work() -> None:
        model: Model | LeadingModel | None = None
        failure: Exception | None = None
        try:
            model = load(config, status, ranks, shared=shared)
        except Exception as error:
            failure = error
        loop.call_soon_threadsafe(answer, model, failure)

    threading.Thread(target=work, name="load", daemon=True).start()
    return loaded.result() if await lifecycle.unless_ended(loaded) else None


def load(
    config: WorkerConfig, status: StatusPipe, ranks: Ranks | None = None, *, shared: bool = False
) -> Model | LeadingModel:
    """Load the model, telling `status` how far it is. `shared`: of several ranks, with a pool for peers (`Ranks.load`).

    Raises CheckpointError, ConfigError, PlacementError.
    """
    import torch

    from tokenrelay.cli.held_out import perplexity
    from tokenrelay.runtime.weights.loader import load_model
    from tokenrelay.runtime.weights.quantize import quantize_model

    told_s = 0.0

    def progress(done: int, total: int, what: str = "weights") -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= PROGRESS_INTERVAL_S or done == total:
            told_s = time.monotonic()
            status.progress(what, done=done, total=total)

    _choose_kernels(config)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("worker.device is cuda, but this torch sees no GPU")
    folder = Path(config.model) if config.model else BUNDLED_MODEL
    if ranks is not None:
        from tokenrelay.runtime.layers.moe import ExpertSplit
        from tokenrelay.runtime.placement import Mesh

        dtype = _dtype(config.dtype, device)
        sizes = {"block_tokens": config.block_tokens, "context_tokens": config.context_tokens}
        mesh = Mesh(pp=config.pp, dp=config.dp, cp=config.cp, ep=config.ep, tp=config.tp)
        experts = ExpertSplit.parse(config.experts)
        more: dict[str, Any] = {"experts": experts, "shared": shared, "device": device, **sizes}
        led = ranks.load(folder, mesh, dtype=dtype, progress=progress, **more)
        led.replace_steps = config.replace_steps
        return led
    model = load_model(
        folder,
        dtype=_dtype(config.dtype, device),
        device=device,
        progress=progress,
        block_tokens=config.block_tokens,
        context_tokens=config.context_tokens,
        # On a CPU a layer and a head more mostly cost more than they bring (docs/scheduler.md): by name only.
        prediction="off" if config.prediction == "auto" and device == "cpu" else config.prediction,
        kv_dtype=config.kv_dtype,
        keep_fp8=config.weight_dtype == "fp8",
    )
    if config.weight_dtype not in ("auto", "fp8"):
        told_s = 0.0
        exact = perplexity(model, folder) if folder == BUNDLED_MODEL else None
        quantize_model(model, config.weight_dtype, lambda done, total: progress(done, total, "matrices"))
        if exact is not None:
            found = perplexity(model, folder)
            loss = f"{found / exact - 1:+.2%}"
            log.info("perplexity on held-out dialogues", form=config.weight_dtype, exact=exact, found=found, loss=loss)
    return model


def _dtype(name: str, device: str) -> torch.dtype | None:
    """None: the checkpoint's own."""
    import torch

    from tokenrelay.kernels.isa import features

    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    computes_bf16 = device == "cuda" or not features().isdisjoint({"avx512_bf16", "amx_bf16"})
    return None if computes_bf16 else torch.float32


def sizes_of(config: WorkerConfig) -> EngineSizes:
    """What the settings say about the engine. Raises ConfigError."""
    from tokenrelay.runtime.build import EngineSizes

    return EngineSizes(
        slots=config.slots,
        step_tokens=config.step_tokens,
        chunk_tokens=min(config.chunk_tokens, config.step_tokens),
        waiting_max=config.waiting_max,
        context_tokens=config.context_tokens,
        kv_memory_bytes=config.kv_memory_bytes,
        kv_sharers=config.kv_sharers * _ranks_per_device(config),
        blocks=config.blocks,
        threads=config.threads,
        eviction=config.eviction,
        host_memory_bytes=round(config.host_cache_gib * (1 << 30)),
        tps_floor=config.tps_floor,
        tps_fraction=config.tps_fraction,
        floor_wait_s=config.floor_wait_s,
        draft_tokens=config.draft_width,
    )


def _ranks_per_device(config: WorkerConfig) -> int:
    """Ranks that share the memory by which the KV pool's default size goes: each has its own GPU, or all a host."""
    import torch

    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return 1
    return min(config.local_ranks, config.ranks) if config.rendezvous else config.ranks


def mount(
    model: Model | LeadingModel, options: WorkerSettings, on_fatal: Any, ranks: Ranks | None = None
) -> tuple[Colocated, Pool]:
    """Both roles on one engine. `on_fatal(error)` is called on the event loop when the engine fails for good."""
    from tokenrelay.cli.colocated import EngineLink, mount_roles
    from tokenrelay.runtime.build import build_engine

    config = options.worker
    sizes = sizes_of(config)
    link = EngineLink(asyncio.get_running_loop(), on_fatal)
    built = build_engine(
        model,
        sizes,
        on_step=link.on_step,
        on_fatal=link.on_fatal,
        on_cache_events=link.on_cache_events,
        tokenizer_file=tokenizer_file_of(options),
    )
    if ranks is not None:
        from tokenrelay.runtime.spmd.ranks import LeadingModel

        ranks.on_death = link.on_fatal
        assert isinstance(model, LeadingModel)
        model.allocate(built.pool.blocks)
    handshake = handshake_of(model, options, built.pool)
    host = mount_roles(
        built.engine,
        link,
        handshake,
        layers=model.config.kv_layers,
        claim_deadline_s=config.claim_deadline_s,
        prefill_config=options.prefill,
    )
    return host, built.pool


def tokenizer_file_of(options: WorkerSettings) -> Path | None:
    """The model's tokenizer.json, which grammars need; None where it has none."""
    folder = Path(options.worker.model) if options.worker.model else BUNDLED_MODEL
    file = folder / "tokenizer.json"
    return file if file.is_file() else None


def handshake_of(model: Model | LeadingModel, options: WorkerSettings, pool: Pool | None) -> worker_pb2.HandshakeReply:
    """Who this worker is, for routers; without its pool before there is one."""
    from tokenrelay.proto import worker_pb2

    config, model_config = options.worker, model.config
    folder = Path(config.model) if config.model else BUNDLED_MODEL
    return worker_pb2.HandshakeReply(
        next_turns=True,
        grammars=tokenizer_file_of(options) is not None,
        incarnation=options.incarnation,
        role=options.fleet.role,
        version=version(),
        model_name=config.served_model_name or model_config.name,
        model_path=str(folder.resolve()),
        model_identity=model_config.identity,
        context_tokens=pool.context_tokens if pool else 0,
        block_tokens=model_config.kv_layout.block_tokens,
        blocks=pool.blocks if pool else 0,
        slots=config.slots,
        waiting_max=config.waiting_max,
        dtype=str(model_config.dtype).removeprefix("torch."),
        device=str(model.cos_sin.device),
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        numerics=_numerics(str(model_config.dtype).removeprefix("torch."), config),
    )


def _choose_kernels(config: WorkerConfig) -> None:
    """What the configuration says about them. Raises ConfigError for a file that makes no sense."""
    from tokenrelay.kernels import registry, tune

    registry.deterministic(config.deterministic)
    file = Path(config.kernels_file) if config.kernels_file else KERNELS_FILE
    if config.kernels_file == "none" or (not config.kernels_file and not file.exists()):
        return
    registry.tuned(tune.load(file))


def _numerics(dtype: str, config: WorkerConfig) -> str:
    """The numerics fingerprint: what two workers must share for their sums to be comparable."""
    import torch

    from tokenrelay.kernels import registry
    from tokenrelay.kernels.isa import features, machine

    mode = ""
    if registry.is_deterministic():  # terms of several ranks are other ones than those of one
        widths = [f"{axis}{size}" for axis in ("dp", "ep", "tp") if (size := getattr(config, axis)) > 1]
        mode = ";".join(["", "deterministic", *widths, *([config.experts] if widths and config.experts else [])])
    mode += f";kv-{config.kv_dtype}" if config.kv_dtype != "auto" else ""
    mode += f";tuned-{digest}" if (digest := registry.tuned_digest()) else ""
    return f"{machine()};{','.join(sorted(features()))};{dtype};{config.weight_dtype};torch-{torch.__version__}{mode}"


def _facts(handshake: worker_pb2.HandshakeReply, pool: Pool, load_s: float) -> dict[str, Any]:
    names = ("dtype", "device", "context_tokens", "block_tokens", "blocks", "slots")
    facts: dict[str, Any] = {"model": handshake.model_name, **{name: getattr(handshake, name) for name in names}}
    return {**facts, "kv_bytes": pool.bytes, "load_s": round(load_s, 3)}


if __name__ == "__main__":
    sys.exit(main())
