"""What every service of the compose stack must have, read from the file: no Docker is needed here."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from typing import Any

import pytest
from stack import COMPOSE, DEPLOY, load, seconds, variables

from tokenrelay.cli.fleet_config import FleetConfig
from tokenrelay.services.chassis.security import SecurityConfig
from tokenrelay.services.chassis.tracing import TracingConfig
from tokenrelay.services.decode.config import WorkerConfig
from tokenrelay.services.kvstore.config import KvstoreConfig
from tokenrelay.services.prefill.config import PrefillConfig
from tokenrelay.services.router.config import RouterConfig

STACK = load()
EVERY: dict[str, dict[str, Any]] = STACK["services"]
SERVICES = {name: service for name, service in EVERY.items() if "profiles" not in service}
LASTING = sorted(set(EVERY) - {"init"})  # all but the step before them
OURS = ["router", "prefill", "decode", "kvstore"]
TABLES = {
    "FLEET": FleetConfig,
    "SECURITY": SecurityConfig,
    "WORKER": WorkerConfig,
    "KVSTORE": KvstoreConfig,
    "PREFILL": PrefillConfig,
    "ROUTER": RouterConfig,
    "TRACING": TracingConfig,
}


def test_the_roles_are_there() -> None:
    assert sorted(SERVICES) == sorted([*OURS, "etcd", "init"])
    assert sorted(set(EVERY) - set(SERVICES)) == ["grafana", "prometheus"]
    assert all(EVERY[name]["profiles"] == ["observe"] for name in set(EVERY) - set(SERVICES))


@pytest.mark.parametrize("name", sorted(EVERY))
def test_no_service_has_more_rights_than_it_needs(name: str) -> None:
    service = EVERY[name]
    user, _, group = service["user"].partition(":")
    assert int(user) > 0 and (int(group) > 0 or name == "grafana")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "pid", "ipc", "userns_mode", "devices"} & set(service)
    assert not [mount for mount in service.get("volumes", []) if "docker.sock" in str(mount)]


@pytest.mark.parametrize("name", sorted(EVERY))
def test_every_service_has_limits(name: str) -> None:
    limits = EVERY[name]["deploy"]["resources"]["limits"]
    assert 0 < float(limits["cpus"]) <= 2, "Docker refuses more CPUs than the machine has"
    assert re.fullmatch(r"\d+[mg]", limits["memory"])
    assert 0 < limits["pids"] <= 512
    assert seconds(EVERY[name]["stop_grace_period"]) > 0


@pytest.mark.parametrize("name", LASTING)
def test_every_lasting_service_is_watched_and_comes_back(name: str) -> None:
    service = EVERY[name]
    assert service["restart"] == "unless-stopped"
    check = service["healthcheck"]
    assert check["test"][0] == "CMD", "no shell: etcd's image has none"
    assert {"interval", "timeout", "retries", "start_period"} <= set(check)


@pytest.mark.parametrize("name", OURS)
def test_health_is_asked_where_the_role_answers(name: str) -> None:
    service = SERVICES[name]
    environment = service["environment"]
    port = {
        "router": environment.get("TOKENRELAY_ROUTER_PORT"),
        "kvstore": environment.get("TOKENRELAY_KVSTORE_ADMIN_PORT"),
    }.get(name, environment.get("TOKENRELAY_FLEET_ADMIN_PORT"))
    assert service["healthcheck"]["test"] == ["CMD", "tokenrelay-ready", port]


def test_any_number_of_workers_may_run() -> None:
    for name in ("prefill", "decode"):
        assert not {"container_name", "hostname", "ports"} & set(SERVICES[name])
        assert "TOKENRELAY_FLEET_ADDRESS" not in SERVICES[name]["environment"], "each has its own: tokenrelay-service"
    assert not [name for name in SERVICES if "container_name" in SERVICES[name]]


def test_only_the_router_is_reached_from_outside_and_only_from_this_machine() -> None:
    assert [name for name in SERVICES if "ports" in SERVICES[name]] == ["router"]
    assert SERVICES["router"]["ports"] == ["127.0.0.1:8000:8000"]
    networks = STACK["networks"]
    assert {name for name, network in networks.items() if not network.get("internal")} == {"edge"}
    members = {network: {n for n in SERVICES if network in SERVICES[n].get("networks", [])} for network in networks}
    assert members == {"edge": {"router"}, "fleet": set(OURS), "state": {"kvstore", "etcd"}}
    assert SERVICES["init"]["network_mode"] == "none"


@pytest.mark.parametrize("name", OURS)
def test_services_show_each_other_a_token_that_stands_in_no_file_here(name: str) -> None:
    service = SERVICES[name]
    environment = service["environment"]
    assert environment["TOKENRELAY_SECURITY_TOKEN_FILE"] == "/run/tokenrelay/token"
    assert "TOKENRELAY_SECURITY_TOKEN" not in environment
    assert "token:/run/tokenrelay:ro" in service["volumes"]
    assert service["depends_on"]["init"] == {"condition": "service_completed_successfully"}
    assert SERVICES["init"]["entrypoint"] == ["tokenrelay-token", "/run/tokenrelay/token"]
    assert variables()["TOKENRELAY_TOKEN"] == {""}


@pytest.mark.parametrize("name", OURS)
def test_settings_exist(name: str) -> None:
    for variable in SERVICES[name]["environment"]:
        _, table, setting = variable.split("_", 2)
        fields = {field.name for field in dataclasses.fields(TABLES[table])}
        assert setting.lower() in fields, f"{variable} sets nothing: {table.lower()} has no {setting.lower()}"


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("router", "TOKENRELAY_ROUTER_DRAIN_S"),
        ("prefill", "TOKENRELAY_WORKER_DRAIN_S"),
        ("decode", "TOKENRELAY_WORKER_DRAIN_S"),
        ("kvstore", ""),
    ],
)
def test_docker_waits_until_a_service_has_drained(name: str, setting: str) -> None:
    drain_s = float(SERVICES[name]["environment"][setting]) if setting else KvstoreConfig().drain_s
    assert seconds(SERVICES[name]["stop_grace_period"]) >= drain_s + 5


def test_what_is_started_first() -> None:
    assert set(SERVICES["kvstore"]["depends_on"]) == {"init", "etcd"}
    for name in ("router", "prefill", "decode"):
        assert SERVICES[name]["depends_on"]["kvstore"] == {"condition": "service_healthy"}


def test_the_bundled_model_serves_where_none_is_named() -> None:
    for name in ("router", "prefill", "decode"):
        assert "models:/models:ro" in SERVICES[name]["volumes"], "one path everywhere: the router reads the tokenizer"
    assert SERVICES["decode"]["environment"]["TOKENRELAY_WORKER_MODEL"] == ""


def test_the_example_of_settings_lists_every_variable_with_its_default() -> None:
    listed = dict(re.findall(r"^#(TOKENRELAY_[A-Z_]+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    found = variables()
    assert {name for name, defaults in found.items() if len(defaults) > 1} == set(), "one default a variable"
    assert listed == {name: next(iter(defaults)) for name, defaults in found.items()}


def test_with_a_gpu_only_workers_get_one() -> None:
    services = load(DEPLOY / "docker-compose.cuda.yml")["services"]
    assert set(services) == {"prefill", "decode"}
    for service in services.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_docker_compose_accepts_the_files() -> None:
    """By Compose itself where it is installed; what it would say of a wrong key needs its schema."""
    for files in ([COMPOSE], [COMPOSE, DEPLOY / "docker-compose.cuda.yml"]):
        names = {name for file in files for name in load(file)["services"]}
        assert names == set(EVERY)
        if (
            shutil.which("docker")
            and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
        ):
            command = [
                "docker",
                "compose",
                *(part for file in files for part in ("-f", str(file))),
                "config",
                "--services",
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            assert set(done.stdout.split()) == set(SERVICES), "profiles are asked for"
