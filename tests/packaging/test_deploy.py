"""What ``examples/payments/deploy`` says is what the demo does: ports, paths, settings, and the arithmetic of grace.

No image is built here, and no cluster asked.
"""

import json
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from examples.payments.__main__ import GRACE
from examples.payments.grpc_door import SERVICE
from examples.payments.settings import PaymentsSettings
from grpc_interceptors import health_server
from http_middleware.health import is_probe
from resilience import HealthChecker
from resilience.probe.arguments import parse

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "payments" / "deploy"
SETTINGS = {name.upper() for name in PaymentsSettings.model_fields}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
TIMING = {"initialDelaySeconds", "periodSeconds", "timeoutSeconds", "successThreshold", "failureThreshold"}

yaml = import_module("yaml")  # it comes without types


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def only(items: list[Any]) -> Any:
    (item,) = items
    return item


@pytest.fixture(scope="module")
def manifests() -> list[Any]:
    base = DEPLOY / "kubernetes" / "base"
    listed = only(documents("kubernetes/base/kustomization.yaml"))["resources"]
    assert {*listed, "kustomization.yaml"} == {file.name for file in base.iterdir()}
    return [document for name in listed for document in documents(f"kubernetes/base/{name}")]


@pytest.fixture(scope="module")
def deployment(manifests: list[Any]) -> Any:
    return only([each for each in manifests if each["kind"] == "Deployment"])


@pytest.fixture(scope="module")
def pod(deployment: Any) -> Any:
    return deployment["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: Any) -> Any:
    return only(pod["containers"])


@pytest.fixture(scope="module")
def stages() -> list[list[tuple[str, str]]]:
    """The Dockerfile's instructions, by stage."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: list[list[tuple[str, str]]] = []
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            found.append([])
        if word:
            found[-1].append((word, rest.strip()))
    return found


def told(stage: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for found, rest in stage if found == word]


def variables(stage: list[tuple[str, str]]) -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in told(stage, "ENV") for pair in shlex.split(rest))


def environment(container: Any) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def seconds(text: str) -> float:
    return parse(["http://host/", f"-rpc-timeout={text}"]).rpc_timeout


def asks_for_health(path: str) -> bool:
    return is_probe({"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []})


# The image


def test_the_image_runs_as_nobody_in_particular(stages: list[list[tuple[str, str]]]) -> None:
    user = told(stages[-1], "USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_the_images_health_check_is_a_probe_that_our_parser_takes(stages: list[list[tuple[str, str]]]) -> None:
    check = only(told(stages[-1], "HEALTHCHECK"))
    flags, _, command = check.partition("CMD ")
    words = json.loads(command)
    assert words[:4] == ["python", "-m", "resilience", "probe"]
    options = parse(words[4:])
    assert options.http
    assert asks_for_health(options.path)
    assert str(options.port) == variables(stages[-1])["HTTP_PORT"]
    given = dict(flag.removeprefix("--").split("=") for flag in flags.split())
    assert seconds(given["timeout"]) >= options.connect_timeout + options.rpc_timeout


def test_the_image_names_settings_that_exist_and_exposes_their_ports(
    stages: list[list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {name: value for name, value in variables(stages[-1]).items() if not name.startswith(("PATH", "PYTHON"))}
    assert given.keys() <= SETTINGS
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = PaymentsSettings.load()
    exposed = {int(port) for rest in told(stages[-1], "EXPOSE") for port in rest.split()}
    assert exposed == {settings.http_port, settings.grpc_port, settings.health_port}


def test_the_image_copies_what_there_is_and_what_is_not_ignored(stages: list[list[tuple[str, str]]]) -> None:
    copied = {
        source
        for stage in stages
        for rest in told(stage, "COPY")
        if not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied


def test_the_image_has_all_that_the_wheel_is_built_from(stages: list[list[tuple[str, str]]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel.get("force-include", {}), project["project"]["readme"]}
    copied = {source for rest in told(stages[0], "COPY") for source in rest.split()[:-1]}
    assert {Path(path).parts[0] for path in needed} <= copied
    install = only([rest for rest in told(stages[0], "RUN") if "install" in rest])
    extras = re.findall(r"\.\[([\w,]+)\]", install)
    assert set(only(extras).split(",")) <= project["project"]["optional-dependencies"].keys()
    assert set(re.findall(r"--group (\w+)", install)) <= project["dependency-groups"].keys()


def test_the_images_process_is_the_demo_and_hears_signals(stages: list[list[tuple[str, str]]]) -> None:
    # A list: a shell in between would be process 1, and keep SIGTERM to itself.
    assert json.loads(only(told(stages[-1], "CMD"))) == ["python", "-m", "examples.payments"]
    assert not told(stages[-1], "ENTRYPOINT")


# Compose


def test_compose_runs_two_replicas_with_settings_that_exist() -> None:
    services = only(documents("compose.yaml"))["services"]
    payments = services["payments"]
    assert payments["deploy"]["replicas"] == 2
    assert payments["environment"].keys() <= SETTINGS
    assert payments["environment"]["RATE_LIMIT_REPLICAS"] == "2"
    assert payments["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert "healthcheck" in services["redis"]
    assert (DEPLOY / payments["build"]["context"]).resolve() == ROOT
    assert (ROOT / payments["build"]["dockerfile"]).exists()
    drain = float(payments["environment"]["HEALTH_DRAIN_SECONDS"])
    assert seconds(payments["stop_grace_period"]) > drain + 2 * GRACE


def test_composes_ports_are_the_images_and_there_is_one_for_each_replica(
    stages: list[list[tuple[str, str]]],
) -> None:
    payments = only(documents("compose.yaml"))["services"]["payments"]
    inside = set()
    for ports in payments["ports"]:
        _, span, port = ports.split(":")
        first, last = map(int, span.split("-"))
        assert last - first + 1 == payments["deploy"]["replicas"]
        inside.add(port)
    given = variables(stages[-1])
    assert inside == {given["HTTP_PORT"], given["GRPC_PORT"]}


def test_composes_redis_never_evicts_a_key() -> None:
    command = only(documents("compose.yaml"))["services"]["redis"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


# Kubernetes


def test_the_pods_settings_exist_and_its_ports_are_theirs(container: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {each["name"] for each in container["env"]} <= SETTINGS
    for name, value in environment(container).items():
        assert isinstance(value, str)  # what is no string is no environment
        monkeypatch.setenv(name, value)
    settings = PaymentsSettings.load()
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"http": settings.http_port, "grpc": settings.grpc_port, "health": settings.health_port}
    assert settings.host == "0.0.0.0"  # noqa: S104 - a pod's address is not known before


def test_the_address_of_redis_comes_from_a_secret(container: Any) -> None:
    url = only([each for each in container["env"] if each["name"] == "REDIS_URL"])
    assert url["valueFrom"].keys() == {"secretKeyRef"}
    assert "value" not in url


def test_kubernetes_waits_longer_than_the_drain_and_two_times_the_grace(pod: Any, container: Any) -> None:
    drain = float(environment(container)["HEALTH_DRAIN_SECONDS"])
    assert pod["terminationGracePeriodSeconds"] > drain + 2 * GRACE


def test_probes_over_http_ask_for_pages_of_health_on_the_http_port(container: Any) -> None:
    asked = {}
    for name in PROBES:
        probe = container[name]
        assert probe.keys() - {"httpGet"} <= TIMING
        assert probe["httpGet"]["port"] == "http"
        assert asks_for_health(probe["httpGet"]["path"])
        asked[name] = probe["httpGet"]["path"].rpartition("/")[2]
    assert asked == {"startupProbe": "startup", "readinessProbe": "ready", "livenessProbe": "live"}


async def test_probes_over_grpc_ask_the_health_port_for_services_that_it_knows(container: Any) -> None:
    patch = only(documents("kubernetes/grpc-probes/probes.yaml"))
    asked = only(patch["spec"]["template"]["spec"]["containers"])
    assert asked["name"] == container["name"]
    assert only(documents("kubernetes/grpc-probes/kustomization.yaml"))["resources"] == ["../base"]
    server = health_server(HealthChecker(), [SERVICE])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in PROBES:
                probe = asked[name]
                assert probe.keys() == {"httpGet", "grpc"}
                assert probe["httpGet"] is None  # takes the base's away: a probe has one way
                assert str(probe["grpc"]["port"]) == environment(container)["HEALTH_PORT"]
                reply = await health.Check(health_pb2.HealthCheckRequest(service=probe["grpc"]["service"]))
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        await server.stop(None)


def test_services_and_the_budget_select_the_pods(manifests: list[Any], deployment: Any, container: Any) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    names = {each["name"] for each in container["ports"]}
    services = [each["spec"] for each in manifests if each["kind"] == "Service"]
    assert {port["targetPort"] for service in services for port in service["ports"]} == {"http", "grpc"}
    assert {port["targetPort"] for service in services for port in service["ports"]} <= names
    budget = only([each["spec"] for each in manifests if each["kind"] == "PodDisruptionBudget"])
    selectors = [*(service["selector"] for service in services), budget["selector"]["matchLabels"]]
    assert all(selector == labels for selector in [*selectors, deployment["spec"]["selector"]["matchLabels"]])
    assert 1 <= budget["minAvailable"] < deployment["spec"]["replicas"]


def test_grpc_is_balanced_by_clients_that_see_every_pod(manifests: list[Any]) -> None:
    headless = only([each for each in manifests if each["kind"] == "Service" and "clusterIP" in each["spec"]])
    assert headless["spec"]["clusterIP"] == "None"
    assert only(headless["spec"]["ports"])["name"] == "grpc"


def test_a_rollout_takes_no_replica_away_before_another_is_ready(deployment: Any, container: Any) -> None:
    assert deployment["spec"]["replicas"] == 2
    assert environment(container)["RATE_LIMIT_REPLICAS"] == "2"
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_pod_is_no_root_and_can_write_nowhere(
    pod: Any, container: Any, stages: list[list[tuple[str, str]]]
) -> None:
    rights = pod["securityContext"]
    assert rights["runAsNonRoot"] is True
    assert f"{rights['runAsUser']}:{rights['runAsGroup']}" == told(stages[-1], "USER")[-1]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"].keys() == {"memory"}
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}


def test_manifests_compose_and_the_image_have_one_name(container: Any) -> None:
    image = only(documents("compose.yaml"))["services"]["payments"]["image"]
    assert container["image"] == image
    assert f"-t {image} ." in (DEPLOY / "Dockerfile").read_text()


def test_no_file_holds_a_secret() -> None:
    for file in DEPLOY.rglob("*"):
        if file.is_file():
            assert not re.search(r"(?i)(password|_token)\s*[=:]\s*\S|://[^/\s]+:[^/\s]+@", file.read_text()), file
