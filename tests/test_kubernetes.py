"""The manifests of ``deploy/kubernetes``: kustomize builds them, Kubernetes' schemas accept them, and they agree with the service.

The last test runs the containers' commands, with their variables and files, as processes against real servers.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx2
import kubernetes_validate
import pytest
import yaml
from sqlalchemy import text
from typer.main import get_group

import secateur
from app.config import SECRETS_DIR, Settings
from app.db.migrate import downgrade, newest_revision, upgrade
from scripts.test_image import PORT, read_dockerfile
from secateur.cli.service import COMMANDS, HOME
from tests.engine.models import english, make_model, make_tokenizer, save
from tests.hub import TOKEN, FakeHub
from tests.patience import PATIENCE, patient_engine, wait_for
from tests.workers.conftest import ROOT, hub  # noqa: F401
from workers.__main__ import cli
from workers.embedded import free_port

Manifest = dict[str, Any]

KUBERNETES = ROOT / "deploy" / "kubernetes"
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
VERSIONS = ("1.30", "1.37")
"""The oldest Kubernetes that docs/kubernetes.md names, and the newest whose schemas are known here."""
LABEL = "app.kubernetes.io/component"
FOREIGN = {
    "FORWARDED_ALLOW_IPS": "uvicorn's",
    "HOME": "the system's",
    HOME: "the command line's",
    SECRETS_DIR: "read before the settings",
}
"""Variables that are no settings."""


def kustomize(folder: Path) -> list[Manifest]:
    """The objects that ``kubectl apply -k`` would send."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@lru_cache
def _built(overlay: str) -> str:
    return json.dumps(kustomize(KUBERNETES / "overlays" / overlay))


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    objects: list[Manifest] = json.loads(_built(request.param))
    return objects


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [each for each in manifests if each["kind"] in kinds]


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [each for each in of_kind(manifests, kind) if each["metadata"]["name"] == name]
    return found


def workloads(manifests: list[Manifest]) -> list[Manifest]:
    return of_kind(manifests, "Deployment", "Job")


def pod(workload: Manifest) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def containers(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Each container beside the specification of its pod."""
    for workload in workloads(manifests):
        for container in (*pod(workload).get("initContainers", ()), *pod(workload)["containers"]):
            yield pod(workload), container


def role(workload: Manifest) -> str:
    return str(workload["spec"]["template"]["metadata"]["labels"][LABEL])


def command_of(container: Manifest) -> list[str]:
    """The container's command line; the image's own if the container names none."""
    _, image = read_dockerfile()
    return [*container.get("command", image.command), *container.get("args", ())]


def projected(spec: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Secret, key and whether the key may be missing, of each file that a pod mounts."""
    for volume in spec["volumes"]:
        for source in volume.get("projected", {}).get("sources", ()):
            for item in source["secret"]["items"]:
                assert item["key"] == item["path"]
                yield source["secret"]["name"], item["key"], source["secret"].get("optional", False)


def validate(manifest: Manifest, version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schemas_of_kubernetes_accept_every_object(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        if manifest["kind"] != "ScaledObject":
            validate(manifest, version)
    validate(yaml.safe_load((KUBERNETES / "secret.example.yaml").read_text()), version)


def test_the_schemas_find_a_field_that_does_not_exist(manifests: list[Manifest]) -> None:
    deployment = named(manifests, "Deployment", "secateur-api")
    pod(deployment)["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        validate(deployment, VERSIONS[-1])


def test_what_scales_is_there_and_has_no_replicas_of_its_own(manifests: list[Manifest]) -> None:
    scaled = []
    for scaler in of_kind(manifests, "ScaledObject", "HorizontalPodAutoscaler"):
        target = named(manifests, "Deployment", scaler["spec"]["scaleTargetRef"]["name"])
        assert "replicas" not in target["spec"], "`kubectl apply` would undo what the scaler did"
        scaled.append(target["metadata"]["name"])
    workers = [each["metadata"]["name"] for each in of_kind(manifests, "Deployment") if role(each) == "worker"]
    assert sorted(scaled) == sorted(["secateur-api", *workers])
    assert named(manifests, "Deployment", "secateur-scheduler")["spec"]["replicas"] == 2


def test_workers_scale_by_metrics_that_the_service_has(manifests: list[Manifest]) -> None:
    source = (ROOT / "app" / "metrics.py").read_text()
    for scaler in of_kind(manifests, "ScaledObject"):
        spec = scaler["spec"]
        behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        like = {"minReplicas": spec["minReplicaCount"], "maxReplicas": spec["maxReplicaCount"], "behavior": behaviour}
        target = {"apiVersion": "apps/v1", "kind": "Deployment", **spec["scaleTargetRef"]}
        hpa = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "x"}}
        validate({**hpa, "spec": {"scaleTargetRef": target, **like}}, VERSIONS[-1])
        (trigger,) = spec["triggers"]
        used = set(re.findall(r"secateur_\w+", trigger["metadata"]["query"]))
        assert "secateur_queue_oldest_seconds" in used
        assert all(f'"{name}"' in source for name in used)


def test_selectors_find_the_pods_they_are_for(manifests: list[Manifest]) -> None:
    labels = {each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in workloads(manifests)}

    def selected(selector: dict[str, Any]) -> set[str]:
        def fits(own: dict[str, str]) -> bool:
            return selector.get("matchLabels", {}).items() <= own.items() and all(
                own.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ())
            )

        return {name for name, own in labels.items() if fits(own)}

    for deployment in of_kind(manifests, "Deployment"):
        name = deployment["metadata"]["name"]
        assert selected(deployment["spec"]["selector"]) == {name}
        for constraint in pod(deployment)["topologySpreadConstraints"]:
            assert selected(constraint["labelSelector"]) == {name}
        budget = named(manifests, "PodDisruptionBudget", name)["spec"]
        assert selected(budget["selector"]) == {name} and budget["maxUnavailable"] == 1
    (service,) = of_kind(manifests, "Service")
    assert selected({"matchLabels": service["spec"]["selector"]}) == {"secateur-api"}

    policies = of_kind(manifests, "NetworkPolicy")
    for policy in policies:
        assert selected(policy["spec"]["podSelector"]), policy["metadata"]["name"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in [each["spec"] for each in policies]
    entered = [each["spec"]["podSelector"] for each in policies if "ingress" in each["spec"]]
    assert [selected(selector) for selector in entered] == [{"secateur-api"}]
    ports = {5432: "secateur_database_url", 6379: "secateur_broker_url"}
    for workload in workloads(manifests):
        name, files = workload["metadata"]["name"], {key for _, key, _ in projected(pod(workload))}
        rules = [
            rule
            for each in policies
            if name in selected(each["spec"]["podSelector"])
            for rule in each["spec"].get("egress", ())
        ]
        allowed = {port["port"] for rule in rules for port in rule["ports"]}
        assert {key for port, key in ports.items() if port in allowed} == files & set(ports.values())


def test_ports_agree(manifests: list[Manifest]) -> None:
    (container,) = pod(named(manifests, "Deployment", "secateur-api"))["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert PORT in command_of(container) and ports == {"http": int(PORT)}
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "liveness", "readiness")} == {"http"}
    (service,) = of_kind(manifests, "Service")
    assert [each["targetPort"] for each in service["spec"]["ports"]] == ["http"]
    annotations = named(manifests, "Deployment", "secateur-api")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == PORT
    for policy in of_kind(manifests, "NetworkPolicy"):
        assert all(port["port"] == "http" for rule in policy["spec"].get("ingress", ()) for port in rule["ports"])


def test_variables_and_files_are_settings(manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_fields.keys()
    example = yaml.safe_load((KUBERNETES / "secret.example.yaml").read_text())
    mounted = set()
    for spec, container in containers(manifests):
        variables = {each["name"]: each.get("value", "1") for each in container["env"]}
        for source in container.get("envFrom", ()):
            variables |= named(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
        for name in variables.keys() - FOREIGN.keys():
            assert name.startswith("SECATEUR_") and name.removeprefix("SECATEUR_").lower() in settings, name
        mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        assert mounts.keys() >= {variables[SECRETS_DIR]} and mounts[variables[SECRETS_DIR]] == "secrets"
        for secret, key, _ in projected(spec):
            assert secret == example["metadata"]["name"] and key.removeprefix("secateur_") in settings
            mounted.add(key)
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            Settings()
    assert mounted == example["stringData"].keys()
    assert example["metadata"]["namespace"] == "secateur"


def test_every_pod_gets_the_secrets_that_its_role_needs(manifests: list[Manifest]) -> None:
    needed = {
        role(each): {key.removeprefix("secateur_") for _, key, _ in projected(pod(each))}
        for each in workloads(manifests)
    }
    database, servers = {"database_url"}, {"database_url", "broker_url", "storage_options"}
    assert needed == {
        "migrate": database,
        "api": servers | {"secret_keys", "webhook_secret", "hf_token"},
        "scheduler": servers | {"webhook_secret"},
        "worker": servers | {"secret_keys", "hf_token"},
    }
    for workload in workloads(manifests):
        required = {key for _, key, optional in projected(pod(workload)) if not optional}
        assert required <= {"secateur_database_url", "secateur_broker_url"}


def parse(name: str, *arguments: str) -> None:
    """Have the service's own command line parse a command, without running it."""
    group = get_group(cli)
    context = group.make_context("secateur", [name, *arguments])
    command = group.get_command(context, name)
    assert command is not None, name
    command.make_context(name, [*arguments], parent=context)


def test_commands_exist(manifests: list[Manifest]) -> None:
    for _, container in containers(manifests):
        probes = [
            container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness") if f"{kind}Probe" in container
        ]
        for argv in (command_of(container), *(probe["exec"]["command"] for probe in probes if "exec" in probe)):
            match argv:
                case ["secateur", name, *rest]:
                    assert name in COMMANDS
                    parse(name, *rest)
                case ["python", "-m", "workers", *rest]:
                    parse(*rest)
                case ["python", "-c", program]:
                    compile(program, "args", "exec")
                case _:
                    assert argv == read_dockerfile()[1].command
    with pytest.raises(Exception, match="'database' is not one of"):
        parse("health", "database")


def test_probes_tell_the_roles_and_outlast_an_outage(manifests: list[Manifest]) -> None:
    for deployment in of_kind(manifests, "Deployment"):
        (container,) = pod(deployment)["containers"]
        startup, liveness = container["startupProbe"], container["livenessProbe"]
        if role(deployment) == "api":
            assert startup["httpGet"]["path"] == liveness["httpGet"]["path"] == "/healthz"
            assert container["readinessProbe"]["httpGet"]["path"].partition("?")[0] == "/readyz"
        else:
            health = ["python", "-m", "workers", "health", role(deployment)]
            assert startup["exec"]["command"] == liveness["exec"]["command"] == health
            assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 900
        (waiting,) = pod(deployment)["initContainers"]
        assert waiting["name"] == "wait-for-schema"


def test_workers_have_time_to_return_their_job(manifests: list[Manifest]) -> None:
    worker = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["worker"]
    for deployment in of_kind(manifests, "Deployment"):
        if role(deployment) == "worker":
            assert pod(deployment)["terminationGracePeriodSeconds"] >= int(
                worker["stop_grace_period"].removesuffix("s")
            )


def test_pods_are_restricted(manifests: list[Manifest]) -> None:
    """Every pod keeps the Pod Security Standard ``restricted``, which the namespace enforces, and stricter rules."""
    (namespace,) = of_kind(manifests, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    _, image = read_dockerfile()
    (user,) = re.findall(r"useradd .*--uid (\d+)", " ".join(image.all("RUN")))
    for spec, container in containers(manifests):
        own = spec["securityContext"]
        assert own["runAsNonRoot"] is True and own["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["runAsUser"] == own["runAsGroup"] == own["fsGroup"] == int(user)
        assert spec["automountServiceAccountToken"] is False
        assert named(manifests, "ServiceAccount", spec["serviceAccountName"])["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        volumes = {each["name"]: each for each in spec["volumes"]}
        for mount in container["volumeMounts"]:
            assert mount.get("readOnly") or "emptyDir" in volumes[mount["name"]]
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        repository, _, tag = container["image"].rpartition(":")
        assert tag == secateur.__version__ and repository.endswith("/secateur")


def test_a_type_of_gpu_has_its_own_workers() -> None:
    manifests: list[Manifest] = json.loads(_built("gpu"))
    gpu = pod(named(manifests, "Deployment", "secateur-worker-nvidia-l4"))
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert gpu["nodeSelector"] and gpu["tolerations"]
    cpu = pod(named(manifests, "Deployment", "secateur-worker-cpu"))
    assert "nvidia.com/gpu" not in cpu["containers"][0]["resources"]["limits"] and "nodeSelector" not in cpu
    labels = [
        variable["value"]
        for spec in (gpu, cpu)
        for variable in spec["containers"][0]["env"]
        if variable["name"] == "SECATEUR_WORKER_LABELS"
    ]
    assert len(set(labels)) == 2


class Node:
    """Runs containers of the manifests as processes: what a pod would mount and read is in folders of ``folder``.

    Only what two pods on one host would share differs from the manifest: paths of volumes, and the API's port.
    """

    def __init__(self, manifests: list[Manifest], folder: Path, secrets: dict[str, str]) -> None:
        self.manifests = manifests
        self.folder = folder
        self.secrets = secrets
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self, workload: Manifest, container: Manifest, argv: list[str] | None = None) -> subprocess.Popen[bytes]:
        """Start a container, or ``argv`` in it; the output is in the file :meth:`log`."""
        volumes = self._volumes(workload)
        mounts = {each["mountPath"]: str(volumes[each["name"]]) for each in container["volumeMounts"]}

        def here(value: str) -> str:
            for path, folder in mounts.items():
                if value == path or value.startswith(f"{path}/"):
                    return folder + value.removeprefix(path)
            return value

        _, image = read_dockerfile()
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SECATEUR_", "HF_"))}
        variables = dict(image.variables)
        for source in container.get("envFrom", ()):
            variables |= named(self.manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container["env"]:
            if "valueFrom" in variable:
                kind, _, resource = variable["valueFrom"]["resourceFieldRef"]["resource"].partition(".")
                variables[variable["name"]] = container["resources"][kind][resource]
            else:
                variables[variable["name"]] = variable["value"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = own | {name: here(value) for name, value in variables.items()} | {"PATH": path, HOME: str(ROOT)}
        addresses = {PORT: str(self.port), "0.0.0.0": "127.0.0.1"}
        command = [addresses.get(argument, argument) for argument in argv or command_of(container)]
        with self.log(workload, container).open("ab") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        self.processes.append(process)
        return process

    def log(self, workload: Manifest, container: Manifest) -> Path:
        return self.folder / f"{workload['metadata']['name']}.{container['name']}.log"

    def _volumes(self, workload: Manifest) -> dict[str, Path]:
        """The folder of each volume of the pod; that of the secrets has a file for each key."""
        folders = {}
        for volume in pod(workload)["volumes"]:
            folders[volume["name"]] = folder = self.folder / workload["metadata"]["name"] / volume["name"]
            folder.mkdir(parents=True, exist_ok=True)
        for _, key, optional in projected(pod(workload)):
            if key in self.secrets or not optional:
                (folders["secrets"] / key).write_text(self.secrets[key])
        return folders

    def succeeds(self, workload: Manifest, container: Manifest, probe: Manifest) -> bool:
        """Whether a probe of the container passes."""
        if "exec" in probe:
            return self.run(workload, container, probe["exec"]["command"]).wait() == 0
        try:
            return (
                httpx2.get(f"http://127.0.0.1:{self.port}{probe['httpGet']['path']}", trust_env=False).status_code
                == 200
            )
        except httpx2.TransportError:
            return False

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(PATIENCE)


@contextmanager
def node(manifests: list[Manifest], folder: Path, secrets: dict[str, str]) -> Iterator[Node]:
    running = Node(manifests, folder, secrets)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def wait_for_schema(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[bytes], Path]]]:
    """Start the container that waits, on a database, and return it with the file of its output."""
    manifests: list[Manifest] = json.loads(_built("cpu"))
    api = named(manifests, "Deployment", "secateur-api")
    (waiting,) = pod(api)["initContainers"]
    nodes: list[Node] = []

    def begin(database_url: str) -> tuple[subprocess.Popen[bytes], Path]:
        servers = {"secateur_database_url": database_url, "secateur_broker_url": "redis://127.0.0.1:9/0"}
        folder = tmp_path / str(len(nodes))
        folder.mkdir()
        nodes.append(Node(manifests, folder, servers))
        return nodes[-1].run(api, waiting), nodes[-1].log(api, waiting)

    yield begin
    for each in nodes:
        each.stop()


def test_pods_wait_for_the_schema_and_accept_a_newer_one(
    empty_database_url: str, wait_for_schema: Callable[[str], tuple[subprocess.Popen[bytes], Path]]
) -> None:
    upgrade(empty_database_url)
    downgrade(empty_database_url, "-1")
    waiting, log = wait_for_schema(empty_database_url)
    wait_for(lambda: f"this version needs {newest_revision()}." in log.read_text())
    assert waiting.poll() is None
    upgrade(empty_database_url)
    assert waiting.wait(PATIENCE) == 0, log.read_text()
    engine = patient_engine(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'of_a_newer_version'"))
    engine.dispose()
    newer, log = wait_for_schema(empty_database_url)
    assert newer.wait(PATIENCE) == 0, log.read_text()


@pytest.fixture
def installation(tmp_path: Path, hub: FakeHub) -> list[Manifest]:  # noqa: F811
    """An overlay such as an operator makes: the Hub and the object store of this installation."""
    folder = tmp_path / "installation"
    folder.mkdir()
    store = tmp_path / "store"
    store.mkdir()
    settings = {
        "SECATEUR_HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "SECATEUR_STORAGE_URL": store.as_uri(),
    }
    kustomization = {
        "namespace": "secateur",
        "resources": [os.path.relpath(KUBERNETES / "overlays" / "cpu", folder.resolve())],
        "configMapGenerator": [
            {
                "name": "secateur",
                "behavior": "merge",
                "literals": [f"{name}={value}" for name, value in settings.items()],
            }
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(folder)


@pytest.mark.slow
def test_the_containers_do_a_job(
    installation: list[Manifest],
    empty_database_url: str,
    broker_url: str,
    hub: FakeHub,  # noqa: F811
    tmp_path: Path,
) -> None:
    save(make_model("llama"), make_tokenizer(), tmp_path / "model")
    hub.create("org/tiny", files={file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()})
    secrets = {
        "secateur_database_url": empty_database_url,
        "secateur_broker_url": broker_url,
        "secateur_hf_token": TOKEN,
    }
    deployments = of_kind(installation, "Deployment")
    (migration,) = of_kind(installation, "Job")
    with node(installation, tmp_path, secrets) as running:
        waiting = [(each, pod(each)["initContainers"][0]) for each in deployments]
        started = [running.run(*each) for each in waiting]
        wait_for(lambda: all("The schema is at nothing" in running.log(*each).read_text() for each in waiting))
        assert running.run(migration, pod(migration)["containers"][0]).wait(PATIENCE) == 0
        assert [process.wait(PATIENCE) for process in started] == [0] * len(started)

        mains = [(each, pod(each)["containers"][0]) for each in deployments]
        for each in mains:
            running.run(*each)
        for workload, container in mains:
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                if kind in container:
                    wait_for(lambda: running.succeeds(workload, container, container[kind]))  # noqa: B023

        (api,) = [each for each in mains if role(each[0]) == "api"]
        created = running.run(*api, argv=["secateur", "keys", "create", "test", "--json"])
        assert created.wait(PATIENCE) == 0
        (secret,) = re.findall(r'"secret": ?"([^"]+)"', running.log(*api).read_text())
        texts = {"samples": 2, "sequence_length": 32}
        request = {
            "model_id": "org/tiny",
            "target_ratio": 0.3,
            "method": "magnitude",
            "rounds": 1,
            "calibration": {"texts": english("calibration")[:1], **texts},
            "evaluation": {"texts": english("evaluation")[:1], "latency": False, **texts},
            "publish": {"repo_id": "org/small"},
        }
        with httpx2.Client(
            base_url=f"http://127.0.0.1:{running.port}",
            headers={"Authorization": f"Bearer {secret}", "Prefer": "wait=30"},
            trust_env=False,
        ) as client:
            answer = client.post("/v1/jobs", json=request)
            assert answer.status_code == 202, answer.text
            job = answer.headers["location"]
            wait_for(lambda: client.get(job).json()["state"] in ("succeeded", "failed"))
            assert client.get(job).json()["error"] is None
    assert "secateur.json" in hub.repositories["org/small"].head.files
