"""The manifests of deploy/kubernetes as `kubectl kustomize` renders them, against schemas, policy and the code.

No cluster is asked. What only one can show (admission, scheduling, the autoscaler at work) is not shown here.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import get_options
from image_classifier.cli.serve import build_serve_parser
from image_classifier.cli.train import build_trainer_parser
from image_classifier.errors import SettingsError
from image_classifier.serving.settings import ServerSettings
from tests.conftest import PROJECT, wait_until
from tests.kubernetes import FOLDER, Document, find, list_containers, list_pods, read_options, render
from tests.prometheus import list_metrics, list_names

COMPONENTS = sorted(path.name for path in (FOLDER / "components").iterdir())
TARGETS = (
    *("base", "overlays/local", "overlays/production", "overlays/gpu", "kserve"),
    *("training/job", "training/indexed", "training/kubeflow"),
    *(f"components/{name}" for name in COMPONENTS),
)
SERVERS = ("base", "overlays/local", "overlays/production", *(f"components/{name}" for name in COMPONENTS))
OLDEST = "1.33"
"""The first Kubernetes that mounts images without a feature gate."""

OTHERS = {"InferenceService", "ScaledObject", "TrainJob", "Kustomization", "Component"}
"""Kinds whose schemas Kubernetes does not have."""


def set_options(monkeypatch: pytest.MonkeyPatch, options: Mapping[str, str]) -> None:
    for name in list(os.environ):
        if name.startswith("IMAGE_CLASSIFIER_"):
            monkeypatch.delenv(name)
    for name, value in options.items():
        monkeypatch.setenv(name, value)


def load_server_settings(monkeypatch: pytest.MonkeyPatch, options: Mapping[str, str]) -> ServerSettings:
    """Load the settings that `image_classifier serve` makes of variables."""
    set_options(monkeypatch, options)
    arguments = parse_arguments(build_serve_parser(), [])
    return ServerSettings(**get_options(arguments, list(ServerSettings.__dataclass_fields__)))


# What they are


@pytest.mark.parametrize(
    ("target", "version"),
    [
        *((target, kubernetes_validate.latest_version()) for target in TARGETS),
        *((target, OLDEST) for target in ("overlays/production", "training/indexed", "training/job")),
    ],
)
def test_every_object_fits_the_schema_of_kubernetes(target: str, version: str) -> None:
    kinds = set()
    for document in render(target):
        kinds.add(document["kind"])
        if document["kind"] not in OTHERS:
            kubernetes_validate.validate(document, version, strict=True)
    assert kinds


def test_every_manifest_belongs_to_a_target() -> None:
    named = set()
    for path in FOLDER.rglob("kustomization.yaml"):
        document = yaml.safe_load(path.read_text())
        names = [*document.get("resources", ()), *document.get("configurations", ())]
        names += [patch["path"] for patch in document.get("patches", ()) if "path" in patch]
        for generator in document.get("configMapGenerator", ()):
            names += [*generator.get("files", ()), *generator.get("envs", ())]
        named |= {(path.parent / name).resolve() for name in names} | {path}
    files = {path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    apart = {
        FOLDER / "argocd" / "application.yaml",
        FOLDER / "components" / "pending-images" / "prometheus-adapter.yaml",
    }
    assert files - named == apart


def test_argo_cd_is_told_a_folder_that_is_there() -> None:
    application = yaml.safe_load((FOLDER / "argocd" / "application.yaml").read_text())
    assert (PROJECT / application["spec"]["source"]["path"] / "kustomization.yaml").is_file()
    namespace = find("overlays/production", "Namespace")["metadata"]["name"]
    assert application["spec"]["destination"]["namespace"] == namespace


# The pod security standard


def find_violations(pod: Mapping[str, Any]) -> list[str]:
    """Find what the pod security standard "restricted" refuses, and what we refuse beyond it."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC", "hostUsers") if pod.get(name)]
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim"}
    allowed |= {"projected", "secret"}
    found += [f"volume {each['name']}" for each in pod.get("volumes", ()) if not set(each) - {"name"} <= allowed]
    own = pod.get("securityContext", {})
    if pod.get("automountServiceAccountToken"):
        found.append("token")
    for container in list_containers(pod):
        name, context = container["name"], container.get("securityContext", {})
        both = {**own, **context}
        added = context.get("capabilities", {}).get("add", [])
        checks = {
            "privileged": context.get("privileged", False) is False,
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
            "capabilities": context.get("capabilities", {}).get("drop") == ["ALL"]
            and set(added) <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": both.get("runAsNonRoot") is True and both.get("runAsUser") != 0,
            "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "procMount": context.get("procMount", "Default") == "Default",
            "hostPort": not any("hostPort" in port for port in container.get("ports", ())),
            "sysctls": not own.get("sysctls"),
            "readOnlyRootFilesystem": context.get("readOnlyRootFilesystem") is True,
            "limits": {"cpu", "memory"} <= container.get("resources", {}).get("limits", {}).keys(),
            "requests": {"cpu", "memory"} <= container.get("resources", {}).get("requests", {}).keys(),
        }
        found += [f"{name}: {what}" for what, is_good in checks.items() if not is_good]
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_pod_is_restricted(target: str) -> None:
    pods = list(list_pods(target))
    assert pods
    for pod in pods:
        assert find_violations(pod) == []


def break_container(name: str, value: Any) -> Callable[[Document], None]:
    def change(pod: Document) -> None:
        pod["containers"][0]["securityContext"][name] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda pod: pod.update(hostNetwork=True),
        lambda pod: pod.update(hostPID=True),
        lambda pod: pod["volumes"].append({"name": "root", "hostPath": {"path": "/"}}),
        lambda pod: pod["securityContext"].pop("runAsNonRoot"),
        lambda pod: pod["securityContext"].update(runAsUser=0),
        lambda pod: pod["securityContext"].pop("seccompProfile"),
        lambda pod: pod["securityContext"].update(sysctls=[{"name": "kernel.msgmax", "value": "1"}]),
        lambda pod: pod["containers"][0].pop("securityContext"),
        lambda pod: pod["containers"][0]["ports"][0].update(hostPort=80),
        lambda pod: pod["containers"][0]["resources"].pop("limits"),
        lambda pod: pod.update(automountServiceAccountToken=True),
        lambda pod: pod.update(initContainers=[{"name": "other", "image": "x"}]),
        break_container("privileged", True),
        break_container("allowPrivilegeEscalation", True),
        break_container("readOnlyRootFilesystem", False),
        break_container("capabilities", {"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
        break_container("capabilities", {"drop": ["NET_RAW"]}),
        break_container("procMount", "Unmasked"),
    ],
)
def test_the_check_finds_each_violation(change: Callable[[Document], object]) -> None:
    (pod,) = list_pods("base")
    pod = copy.deepcopy(pod)
    change(pod)
    assert find_violations(pod)


def test_the_namespace_enforces_the_standard() -> None:
    for target in TARGETS:
        if target == "base" or target.startswith("components/"):
            continue
        namespace = find(target, "Namespace")["metadata"]["name"]
        assert {each["metadata"].get("namespace", namespace) for each in render(target)} == {namespace}
        labels = find(target, "Namespace")["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


# The server


def get_server(target: str) -> Document:
    (container,) = find(target, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("target", (*SERVERS, "kserve"))
def test_the_options_are_the_servers(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (pod,) = list_pods(target)
    (container,) = pod["containers"]
    options = read_options(target, container)
    options.pop("STORAGE_URI", None)
    settings = load_server_settings(monkeypatch, options)
    assert settings.num_threads == 1 and settings.log_format == "ecs"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]} | {"/mnt/models"}
    assert settings.model in mounts or options["IMAGE_CLASSIFIER_CACHE"] in mounts
    assert settings.has_auth == (target == "overlays/production")
    if settings.api_keys_file:
        assert str(settings.api_keys_file.parent) in mounts
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert list(ports.values()) == [settings.port]
    paths = json.loads((PROJECT / "docs" / "openapi.json").read_text())["paths"]
    probes = [probe["httpGet"] for name, probe in container.items() if name.endswith("Probe")]
    assert len(probes) >= 2
    for probe in probes:
        assert paths[probe["path"]]["get"]["security"] == []  # whom kubelet asks without a key
        assert ports.get(probe["port"], probe["port"]) == settings.port


@pytest.mark.parametrize("target", SERVERS)
def test_a_pod_has_the_time_to_end(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = find(target, "Deployment")["spec"]["template"]["spec"]
    container = get_server(target)
    settings = load_server_settings(monkeypatch, read_options(target, container))
    before_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before_s + settings.drain_s + settings.grace_s + 5 <= pod["terminationGracePeriodSeconds"]
    assert min(before_s, settings.drain_s, settings.grace_s) >= 5


@pytest.mark.parametrize("target", SERVERS)
def test_selectors_find_the_pods_and_names_the_objects(target: str) -> None:
    labels = find(target, "Deployment")["spec"]["template"]["metadata"]["labels"]
    for kind, path in (
        ("Service", ("selector",)),
        ("PodDisruptionBudget", ("selector", "matchLabels")),
        ("NetworkPolicy", ("podSelector", "matchLabels")),
        ("Deployment", ("selector", "matchLabels")),
    ):
        selector = find(target, kind)["spec"]
        for name in path:
            selector = selector[name]
        assert selector and selector.items() <= labels.items(), kind
    (port,) = find(target, "Service")["spec"]["ports"]
    assert port["targetPort"] in {each["name"] for each in get_server(target)["ports"]}
    pod = find(target, "Deployment")["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == find(target, "ServiceAccount")["metadata"]["name"]
    for container in list_containers(pod):
        assert {mount["name"] for mount in container["volumeMounts"]} <= {each["name"] for each in pod["volumes"]}
    scalers = [each for each in render(target) if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    assert len(scalers) == (target != "overlays/local")
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"]["name"] == find(target, "Deployment")["metadata"]["name"]


def test_nobody_but_those_named_reaches_the_server() -> None:
    for target in SERVERS:
        policy = find(target, "NetworkPolicy")["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        (rule,) = policy["ingress"]
        assert all(each for each in rule["from"]) and [port["port"] for port in rule["ports"]] == ["http"]
        is_fetching = target in ("components/model-url", "components/model-registry")
        assert bool(policy["egress"]) == is_fetching


def test_the_autoscaler_follows_the_servers_queue_and_falls_back_to_the_processor() -> None:
    base = find("base", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert [each["type"] for each in base] == ["Resource"]
    pods, resource = find("overlays/production", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert resource == base[0]
    metric = pods["pods"]["metric"]["name"]
    batch = str(ServerSettings(model="x").max_batch)
    assert metric in list_metrics() and pods["pods"]["target"]["averageValue"] == batch
    path = FOLDER / "components" / "pending-images" / "prometheus-adapter.yaml"
    (rule,) = yaml.safe_load(path.read_text())["rules"]["custom"]
    assert rule["seriesQuery"].partition("{")[0] == rule["name"]["as"] == metric
    queue, processor = find("components/keda", "ScaledObject")["spec"]["triggers"]
    assert list_names(queue["metadata"]["query"]) - {"avg_over_time"} == {metric}
    assert queue["metadata"]["threshold"] == batch
    assert processor["metadata"]["value"] == str(resource["resource"]["target"]["averageUtilization"])


def test_memory_is_more_than_was_measured() -> None:
    """The most that a server took under hostile load, or that the larger network took, and 160 MB of decoding."""
    results = PROJECT / "benchmarks" / "results"
    hostile = json.loads((results / "hostile.json").read_text())["memory_most_mb"]
    networks = json.loads((results / "serving.json").read_text())["networks"]
    measured = max(hostile, *(each["servers"]["own"]["memory_mb"] for each in networks.values()))
    for target in (*SERVERS, "kserve"):
        (pod,) = list_pods(target)
        resources = pod["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"] == {"cpu": "1", "memory": "512Mi"}
        assert measured + 160 < 512


def test_the_ingress_takes_what_the_server_takes() -> None:
    ingress = find("overlays/production", "Ingress")
    size = ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert int(size.removesuffix("m")) * 2**20 == ServerSettings(model="x").max_body_bytes
    (rule,), (tls,) = ingress["spec"]["rules"], ingress["spec"]["tls"]
    assert tls["hosts"] == [rule["host"]]
    (path,) = rule["http"]["paths"]
    service = find("overlays/production", "Service")
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    assert path["backend"]["service"]["port"]["name"] == service["spec"]["ports"][0]["name"]


def test_prometheus_is_told_where_the_metrics_are() -> None:
    for target in SERVERS:
        notes = find(target, "Deployment")["spec"]["template"]["metadata"]["annotations"]
        assert notes["prometheus.io/path"] in json.loads((PROJECT / "docs" / "openapi.json").read_text())["paths"]
        assert int(notes["prometheus.io/port"]) == get_server(target)["ports"][0]["containerPort"]


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "training/kubeflow"])
def test_variables_of_services_do_not_reach_a_pod(target: str) -> None:
    """A TrainJob cannot say so: train.sh takes them out, as the test of it shows."""
    for pod in list_pods(target):
        assert pod["enableServiceLinks"] is False


def test_the_variable_of_a_service_would_stop_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError):
        load_server_settings(monkeypatch, {"IMAGE_CLASSIFIER_PORT": "tcp://10.0.0.1:80"})


# A model that is fetched

FETCH = FOLDER / "components" / "model-url" / "fetch_model.py"


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which its files are served."""
    folder = tmp_path / "files"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield folder, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def fetch(address: str, target: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-I", str(FETCH), str(target)]
    return subprocess.run(words, env={"MODEL_URL": address}, capture_output=True, text=True, timeout=60)


def test_a_model_is_fetched_whole(files: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = files
    source = tmp_path / "published"
    source.mkdir()
    (source / "model.onnx").write_bytes(os.urandom(100_000))
    with tarfile.open(folder / "model.tar.gz", "w:gz") as archive:
        archive.add(source, arcname=".")
    target = tmp_path / "model"
    target.mkdir()
    result = fetch(f"{address}/model.tar.gz?signature=hunter2", target)
    assert result.returncode == 0, result.stderr
    assert (target / "model.onnx").read_bytes() == (source / "model.onnx").read_bytes()


@pytest.mark.parametrize("name", ["missing", "no archive", "outside", "file"])
def test_what_is_no_model_is_refused_and_its_address_kept_secret(
    name: str, files: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = files
    (folder / "no archive").write_bytes(b"<html>" * 1000)
    with tarfile.open(folder / "outside", "w") as archive:
        archive.add(folder / "no archive", arcname="../evil")
    target = tmp_path / "model"
    target.mkdir()
    place = (folder / "outside").as_uri() if name == "file" else f"{address}/{name.replace(' ', '%20')}"
    result = fetch(f"{place}?signature=hunter2", target)
    assert result.returncode in (1, 2) and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr and not list(target.iterdir()) and not (tmp_path / "evil").exists()


# Training


@pytest.mark.parametrize("target", ["training/job", "training/indexed", "training/kubeflow", "overlays/gpu"])
def test_the_options_are_the_trainers(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (pod,) = list_pods(target)
    (container,) = pod["containers"]
    options = read_options(target, container)
    set_options(monkeypatch, options)
    parsed = parse_arguments(build_trainer_parser(), [])
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(parsed["experiments_folder"]), str(parsed["dataset_folder"].parent)} <= mounts
    assert (parsed["experiment_name"], parsed["run_name"], parsed["recipe"]) == ("cifar10", "first", "fast")
    is_gpu = target == "overlays/gpu"
    assert parsed["instruction_set"] == ("native" if is_gpu else "portable")
    assert parsed["device"] == ("cuda" if is_gpu else "auto")
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == is_gpu
    assert container["command"][0] == "/scripts/train.sh" and "/scripts" in mounts
    (volume,) = (each for each in pod["volumes"] if each["name"] == "scripts")
    name = volume["configMap"]["name"]
    (files,) = (each["data"] for each in render(target) if each["metadata"]["name"] == name)
    assert files.keys() == {"train.sh"} and volume["configMap"]["defaultMode"] & 0o111
    claims = {each["metadata"]["name"] for each in render(target) if each["kind"] == "PersistentVolumeClaim"}
    assert claims == {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}


def test_the_prepared_data_are_those_that_are_trained_on() -> None:
    (pod,) = list_pods("training/job")
    (prepare,), (trainer,) = pod["initContainers"], pod["containers"]
    options = read_options("training/job", trainer)
    assert prepare["command"][-2:] == ["--dataset_folder", options["IMAGE_CLASSIFIER_DATASET_FOLDER"]]


def test_torchrun_is_told_what_it_takes_and_where_the_first_pod_is() -> None:
    from torch.distributed.run import parse_args

    job, service = find("training/indexed", "Job"), find("training/indexed", "Service")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    program, name, *words = container["command"]
    assert (program, name) == ("/scripts/train.sh", "torchrun")
    parsed = parse_args(words)  # type: ignore[no-untyped-call]
    assert (parsed.nnodes, parsed.training_script, parsed.module) == ("2", "image_classifier.main", True)
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    subdomain = job["spec"]["template"]["spec"]["subdomain"]
    host, _, port = parsed.rdzv_endpoint.partition(":")
    assert host == f"{job['metadata']['name']}-0.{subdomain}" and subdomain == service["metadata"]["name"]
    assert int(port) in {each["containerPort"] for each in container["ports"]}
    selector = {"job-name": job["metadata"]["name"]}
    assert service["spec"]["selector"] == selector
    assert find("training/indexed", "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == selector


def test_a_pod_that_has_to_go_saves_and_the_next_one_goes_on(sample_dataset: Path, tmp_path: Path) -> None:
    """The command of the Job, without its container: by SIGTERM, as Kubernetes ends a pod."""
    (pod,) = list_pods("training/job")
    (container,) = pod["containers"]
    options = read_options("training/job", container)
    places = {"EXPERIMENTS_FOLDER": tmp_path / "experiments", "DATASET_FOLDER": sample_dataset}
    options |= {f"IMAGE_CLASSIFIER_{name}": str(path) for name, path in places.items()}
    options |= {"IMAGE_CLASSIFIER_RECIPE": "notebook", "IMAGE_CLASSIFIER_BATCH_SIZE": "50"}
    options |= {"IMAGE_CLASSIFIER_NUM_EPOCHS": "100000", "IMAGE_CLASSIFIER_DIGEST_EVERY": "1"}
    options |= {"IMAGE_CLASSIFIER_PORT": "tcp://10.0.0.1:80", "IMAGE_CLASSIFIER_SERVICE_HOST": "10.0.0.1"}
    options |= {"IMAGE_CLASSIFIER_PORT_80_TCP_ADDR": "10.0.0.1", "IMAGE_CLASSIFIER_SERVICE_PORT_HTTP": "80"}
    script, program = container["command"]
    assert (script, program) == ("/scripts/train.sh", "image_classifier_trainer")
    folder = FOLDER / "training" / "common"
    words = [str(folder / "train.sh"), sys.executable, "-m", "image_classifier.main"]
    run = tmp_path / "experiments" / "cifar10" / "first"
    environment = os.environ | options
    for attempt in range(2):
        with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as trainer:
            digests = run / "digests.jsonl"
            before = digests.stat().st_size if attempt else 0
            wait_until(lambda: digests.exists() and digests.stat().st_size > before, trainer)
            trainer.send_signal(signal.SIGTERM)
            _, errors = trainer.communicate(timeout=pod["terminationGracePeriodSeconds"])
        assert trainer.returncode == 143, errors
    steps = [int(step) for step in re.findall(r'"step": (\d+)', digests.read_text())]
    assert steps == sorted(set(steps)) and len(steps) >= 2
