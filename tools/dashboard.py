"""Write deploy/observe/grafana/dashboards/tokenrelay.json, from the rows and queries below.

python tools/dashboard.py            # writes it
python tools/dashboard.py --check    # exit code 1 if it is not what would be written
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "deploy/observe/grafana/dashboards/tokenrelay.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
Query = tuple[str, str]  # legend, expression


def _quantiles(name: str) -> list[Query]:
    rate = f"sum by (le) (rate(tokenrelay_{name}_bucket[$__rate_interval]))"
    return [(f"p{q * 100:g}", f"histogram_quantile({q}, {rate})") for q in (0.5, 0.95, 0.99)]


def _rate(name: str, by: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate(tokenrelay_{name}[$__rate_interval]))"


PANELS: list[tuple[str, str, list[Query]]] = [  # title, unit, queries
    ("Time to first token", "s", _quantiles("ttft_seconds")),
    ("Time between tokens", "s", _quantiles("inter_token_seconds")),
    ("Time in the queue", "s", _quantiles("queue_seconds")),
    ("Output tokens per minute", "short", [("tokens", f"60 * {_rate('output_tokens_total')}")]),
    ("Requests by status", "reqps", [("{{status}}", _rate("requests_total", "status"))]),
    (
        "Requests in work",
        "short",
        [
            ("requests", "sum(tokenrelay_requests_open)"),
            ("{{state}} sequences", "sum by (state) (tokenrelay_sequences)"),
        ],
    ),
    (
        "Prefix hit rate, and the ceiling of an infinite cache (router.prefix_ceiling)",
        "percentunit",
        [
            ("hit rate", f"{_rate('cached_tokens_total')} / {_rate('prompt_tokens_total')}"),
            ("ceiling", f"{_rate('prefix_ceiling_tokens_total')} / {_rate('prompt_tokens_total')}"),
        ],
    ),
    ("KV blocks by state", "short", [("{{state}}", "sum by (state) (tokenrelay_kv_blocks)")]),
    (
        "TPS floor: tokens late, users below",
        "percentunit",
        [
            ("late", f"{_rate('tps_floor_tokens_late_total')} / {_rate('tps_floor_tokens_total')}"),
            ("users below it", "sum(tokenrelay_tps_floor_users_below)"),
        ],
    ),
    ("TPS floor in force, by worker", "short", [("{{worker}}", "tokenrelay_tps_floor_in_force")]),
    ("Handovers by their end", "ops", [("{{end}}", _rate("handovers_total", "end"))]),
    (
        "Prompts by where they are computed",
        "ops",
        [("{{where}}: {{reason}}", _rate("prefills_total", "where, reason"))],
    ),
    ("Sequences that moved, by cause", "ops", [("{{cause}}", _rate("moves_total", "cause"))]),
    (
        "Drafts: share of tokens that came true",
        "percentunit",
        [
            (
                "accepted",
                f"{_rate('spec_decode_num_accepted_tokens_total')} / {_rate('spec_decode_num_draft_tokens_total')}",
            )
        ],
    ),
    (
        "Pressure",
        "ops",
        [
            ("preemptions", _rate("worker_preemptions_total")),
            ("breakers opened", _rate("breakers_opened_total")),
            ("retries refused", _rate("retries_refused_total")),
        ],
    ),
    ("Aborts by reason", "ops", [("{{reason}}", _rate("aborts_total", "reason"))]),
    ("Tokens by key", "short", [("{{key}} {{kind}}", _rate("key_tokens_total", "key, kind"))]),
    (
        "Keys over a limit, and refused",
        "ops",
        [
            ("{{key}} {{limit}}", _rate("key_limited_total", "key, limit")),
            ("{{reason}}", _rate("gate_refused_total", "reason")),
        ],
    ),
    (
        "Host tier of KV, bytes per second",
        "Bps",
        [("{{direction}}", _rate("host_tier_bytes_total", "direction"))],
    ),
    ("Workers that take requests", "short", [("{{worker}}", "tokenrelay_worker_ready")]),
]
WIDTH, HEIGHT = 8, 8  # three beside each other


def _panel(number: int, title: str, unit: str, queries: list[Query]) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": number % 3 * WIDTH, "y": number // 3 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0, "custom": {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for index, (legend, expression) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """Grafana's model of it."""
    return {
        "uid": "tokenrelay",
        "title": "TokenRelay",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "tags": ["tokenrelay"],
        "templating": {"list": []},
        "panels": [_panel(number, *panel) for number, panel in enumerate(PANELS)],
    }


def main(arguments: list[str]) -> int:
    """The exit code."""
    text = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" in arguments:
        return 0 if FILE.exists() and FILE.read_text() == text else 1
    FILE.write_text(text)
    print(f"wrote {FILE.relative_to(Path.cwd()) if FILE.is_relative_to(Path.cwd()) else FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
