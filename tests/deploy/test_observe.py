"""Dashboard and alert rules ask for metrics that exist: names and labels, as a running router writes them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import promql_parser
import pytest
import yaml
from stack import DEPLOY, ROOT

from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.gate import Caller, Gate
from tokenrelay.services.router.keys import new_key, write_keys
from tokenrelay.services.router.metrics import Metrics, gate_page

OBSERVE = DEPLOY / "observe"
METRIC = re.compile(r"tokenrelay_\w+")
SELECTOR = re.compile(r"(tokenrelay_\w+)\{([^}]*)\}")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Everything that a router can say, once."""
    metrics = Metrics()
    metrics.requests["/v1/chat/completions", 200] += 1
    metrics.aborts["stop"] += 1
    metrics.moves["lost"] += 1
    metrics.decisions["remote", "pays"] += 1
    metrics.handovers["failed"] += 1
    metrics.ceiling_tokens = 1
    metrics.integrity_failures["w0"] = 1
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    write_keys(path, [new_key("one")[1]])
    gate = Gate(path)
    caller: Caller = next(iter(gate.callers.values()))
    caller.counts["requests"] += 1
    caller.refused["tokens"] += 1
    gate.refused["wrong"] += 1
    return metrics.render({"w0": (True, worker_pb2.Stats())}) + gate_page(gate)


def expressions() -> Iterator[str]:
    for rule in yaml.safe_load((OBSERVE / "alerts.yml").read_text())["groups"][0]["rules"]:
        yield rule["expr"]
    board = json.loads((OBSERVE / "grafana/dashboards/tokenrelay.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def test_every_metric_exists(page: str) -> None:
    known = {line.split("{")[0].split()[0] for line in page.splitlines() if not line.startswith("#")}
    asked = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(asked) > 25
    assert not asked - known, f"nobody writes {sorted(asked - known)}"


def test_every_expression_is_one_that_prometheus_reads() -> None:
    found = [expression.replace("$__rate_interval", "5m") for expression in expressions()]
    assert len(found) > 30
    for expression in found:
        promql_parser.parse(expression)
    with pytest.raises(ValueError):
        promql_parser.parse(found[0] + ")")


def test_every_label_exists(page: str) -> None:
    for expression in expressions():
        for name, selector in SELECTOR.findall(expression):
            for label in re.findall(r"(\w+)!?=", selector):
                assert re.search(rf'^{name}\{{[^}}]*{label}="', page, re.MULTILINE), f"{name} has no label {label}"


def test_counters_are_rated_and_gauges_are_not(page: str) -> None:
    kinds = dict(re.findall(r"# TYPE (\w+) (\w+)", page))
    for expression in expressions():
        for name in METRIC.findall(expression):
            rated = re.search(rf"(rate|increase)\({name}[^)]*\[", expression) is not None
            kind = kinds.get(name) or kinds[name.removesuffix("_bucket")]
            assert rated == (kind in ("counter", "histogram")), f"{name} is a {kind}: {expression}"


def test_alerts_say_what_to_do() -> None:
    rules = yaml.safe_load((OBSERVE / "alerts.yml").read_text())["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 8
    for rule in rules:
        assert set(rule["annotations"]) == {"summary", "first"} and rule["labels"]["severity"] in ("page", "warn")


def test_the_dashboard_is_what_the_tool_writes() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "dashboard.py", "--check"], check=False, timeout=60)
    assert done.returncode == 0, "run tools/dashboard.py"


def test_mounted_files_are_there() -> None:
    stack = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    for name in ("prometheus", "grafana"):
        for mount in stack["services"][name]["volumes"]:
            source = mount.split(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).exists(), mount
    jobs = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())["scrape_configs"]
    asked = {target for job in jobs for one in job["dns_sd_configs"] for target in one["names"]}
    assert asked == {"router", "prefill", "decode", "kvstore"}
