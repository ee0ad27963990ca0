"""OpenTelemetry traces: spans that are made from instants, when a part of a request is over.

    tracer = Tracer.of(resolve(TracingConfig, "tracing").values, "router", incarnation)     # None: tracing is off
    root = tracer.begin("POST /v1/chat/completions", headers.get("traceparent", ""), began_s)
    submit.traceparent = root.traceparent                     # to the workers; empty where it is not sampled
    tracer.span("prefill", submit.traceparent, from_s, to_s, {"tokenrelay.prompt_tokens": 812}, wall_offset_ns())
    root.end({...}); tracer.close()

The libraries (`pip install 'tokenrelay[otel]'`) are loaded when an endpoint is set, and by nothing else: off costs a
comparison with None a request. Instants are of the monotonic clock; the wall clock is read once per span, as spans are
told in its time. Context travels as W3C's traceparent (https://www.w3.org/TR/trace-context/).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenrelay.base.config import setting
from tokenrelay.base.errors import ConfigError
from tokenrelay.base.version import version

Attributes = Mapping[str, str | int | float | bool]
CLOSE_MS = 3000  # for what waits to be sent
_MISSING = "traces need OpenTelemetry's SDK and its OTLP exporter: pip install 'tokenrelay[otel]'"


@dataclass(frozen=True, kw_only=True)
class TracingConfig:
    """The table `[tracing]`, the same for every service of a fleet (`TOKENRELAY_TRACING_…`)."""

    endpoint: str = setting(
        "", "collector that takes OTLP over HTTP, such as http://localhost:4318; empty: no traces are made"
    )
    sample: float = setting(
        1.0, "share of requests that are traced when nobody before us has decided that", minimum=0.0, maximum=1.0
    )


class OpenSpan:
    """A span that has begun; `end` must follow."""

    def __init__(self, span: Any, offset_ns: int) -> None:
        self._span = span
        self._offset_ns = offset_ns
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}"
        sampled = context.trace_flags.sampled
        self.traceparent = f"00-{self.trace_id}-{context.span_id:016x}-01" if sampled else ""

    def event(self, name: str, at_s: float, attributes: Attributes) -> None:
        """Something happened, at an instant of the monotonic clock."""
        self._span.add_event(name, attributes, timestamp=int(at_s * 1e9) + self._offset_ns)

    def end(self, attributes: Attributes, error: str = "") -> None:
        """It is over, now. `error`: how it failed."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(attributes)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(time.monotonic_ns() + self._offset_ns)


def wall_offset_ns() -> int:
    """How far the wall clock is ahead of the monotonic one."""
    return time.time_ns() - time.monotonic_ns()


class Tracer:
    """Makes spans of one process. Any thread."""

    def __init__(self, provider: Any) -> None:
        """`provider`: an opentelemetry.sdk.trace.TracerProvider, which this object closes."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("tokenrelay", version())
        self._extract = TraceContextTextMapPropagator().extract

    @staticmethod
    def of(config: TracingConfig, service: str, instance: str) -> Tracer | None:
        """One that sends to the endpoint; None where there is none. Raises ConfigError."""
        if not config.endpoint:
            return None
        if not config.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"tracing.endpoint is {config.endpoint!r}, expected a URL such as http://localhost:4318")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise ConfigError(f"tracing.endpoint is set: {_MISSING}") from error
        resource = Resource.create(
            {"service.name": f"tokenrelay-{service}", "service.instance.id": instance, "service.version": version()}
        )
        provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(config.sample)), resource=resource)
        exporter = OTLPSpanExporter(endpoint=f"{config.endpoint.rstrip('/')}/v1/traces", timeout=5)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return Tracer(provider)

    def begin(self, name: str, traceparent: str, began_s: float, tracestate: str = "") -> OpenSpan:
        """A request of a client, who may name the span that it is a part of."""
        from opentelemetry.trace import SpanKind

        offset_ns = wall_offset_ns()
        start_ns = int(began_s * 1e9) + offset_ns
        context = self._context(traceparent, tracestate)
        return OpenSpan(
            self._tracer.start_span(name, context=context, kind=SpanKind.SERVER, start_time=start_ns), offset_ns
        )

    def span(
        self, name: str, traceparent: str, from_s: float, to_s: float, attributes: Attributes, offset_ns: int
    ) -> None:
        """A part of what `traceparent` names that is over; instants of the monotonic clock, and how far the wall clock
        is from it: the same for parts that shall meet.
        """
        start_ns = int(from_s * 1e9) + offset_ns
        context = self._context(traceparent, "")
        span = self._tracer.start_span(name, context=context, attributes=attributes, start_time=start_ns)
        span.end(max(start_ns, int(to_s * 1e9) + offset_ns))

    def _context(self, traceparent: str, tracestate: str) -> Any:
        from opentelemetry.context import Context

        return self._extract({"traceparent": traceparent, "tracestate": tracestate}, context=Context())

    def close(self) -> None:
        """Send what waits, within a bound, and end."""
        self._provider.force_flush(CLOSE_MS)
        self._provider.shutdown()
