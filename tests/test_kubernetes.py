"""Kubernetes without a cluster: every manifest against the API's schemas and the restricted profile of pod security,
and the job as prefect-kubernetes itself renders it from the pool's template.

Docs of the profile: kubernetes.io/docs/concepts/security/pod-security-standards.
"""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from prefect.client.schemas import FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "docker" / "kubernetes"
POD = REPOSITORY / "flows" / "pools" / "kubernetes.json"
DEPLOYMENTS = [
    each
    for each in yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    if each["work_pool"]["name"] == "kubernetes"
]
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS = [
    manifest for name in KUSTOMIZATION["resources"] for manifest in yaml.safe_load_all((FOLDER / name).read_text())
]
VERSION = "1.33"


DEPLOYED = [each for each in MANIFESTS if each["kind"] == "Deployment"]
CRON = [each for each in MANIFESTS if each["kind"] == "CronJob"]
NAMES = [each["metadata"]["name"] for each in DEPLOYED]
JOBS = {each["name"]: each for each in DEPLOYMENTS}


@functools.cache
def job(name: str) -> dict[str, Any]:
    """The job of a deployment's flow run, as the worker would send it to the cluster."""

    async def render() -> KubernetesWorkerJobConfiguration:
        template, values = json.loads(POD.read_text()), JOBS[name]["work_pool"]["job_variables"]
        # The client would look up blocks, of which the template names none.
        return await KubernetesWorkerJobConfiguration.from_template_and_values(template, values, client=object())

    made = asyncio.run(render())
    made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="quick-fox"))
    return dict(made.job_manifest)


def pod_of(name: str) -> dict[str, Any]:
    """What a deployment of the manifests, or a job, says about its pods."""
    found = job(name) if name in JOBS else next(each for each in DEPLOYED + CRON if each["metadata"]["name"] == name)
    spec = found["spec"]["jobTemplate"]["spec"] if found["kind"] == "CronJob" else found["spec"]
    return dict(spec["template"]["spec"])


def strict(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, VERSION, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_the_api_knows_every_field(manifest: dict[str, Any]) -> None:
    strict(manifest)


@pytest.mark.parametrize("name", JOBS)
def test_the_api_knows_every_field_of_the_job(name: str) -> None:
    strict(job(name))
    wrong = json.loads(json.dumps(job(name)))
    wrong["spec"]["template"]["spec"]["securityContext"]["runAsNotRoot"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        strict(wrong)


@pytest.mark.parametrize("name", [*NAMES, *JOBS, "recover"])
def test_pods_keep_to_the_restricted_profile(name: str) -> None:
    pod = pod_of(name)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for container in pod["containers"]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False and rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
        mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert mounted["scratch"] == "/tmp" and set(mounted) == {each["name"] for each in pod["volumes"]}
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "ephemeral", "secret"}, "something would have to be shared, or outlive its pod"


def test_servers_are_probed_and_reached_by_their_names() -> None:
    services = {each["metadata"]["name"]: each["spec"] for each in MANIFESTS if each["kind"] == "Service"}
    assert set(services) == {"mlflow", "prefect", "models", "search"}
    for each in DEPLOYED:
        name, spec = each["metadata"]["name"], each["spec"]["template"]
        (container,) = spec["spec"]["containers"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert each["spec"]["selector"]["matchLabels"].items() <= spec["metadata"]["labels"].items()
        if name in services:
            assert services[name]["selector"].items() <= spec["metadata"]["labels"].items()
            assert services[name]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    images = {pod_of(name)["containers"][0]["image"] for name in (*NAMES, "recover")}
    assert {each["name"] for each in KUSTOMIZATION["images"]} == images
    # The addresses that pods are told are those of the services.
    told = {each["value"] for name in NAMES for each in pod_of(name)["containers"][0]["env"] if "value" in each}
    for name in ("mlflow", "prefect"):
        assert any(value.startswith(f"http://{name}:{services[name]['ports'][0]['port']}") for value in told)


def test_no_secret_is_written_down() -> None:
    assert not any(each["kind"] == "Secret" for each in MANIFESTS)
    for name in ("mlflow", "prefect"):
        (container,) = pod_of(name)["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "fuselip"}}]
        assert not any("PASSWORD" in each["name"] or "SECRET" in each["name"] for each in container["env"])
    # The search server, which strangers talk to, gets what it needs and no other key of the secret.
    given = {each["name"]: each for each in pod_of("search")["containers"][0]["env"] if "valueFrom" in each}
    assert "envFrom" not in pod_of("search")["containers"][0] and "AWS_SECRET_ACCESS_KEY" in given
    assert all(each["valueFrom"]["secretKeyRef"] == {"name": "fuselip", "key": name} for name, each in given.items())


def test_whatever_a_pod_needs_of_the_secret_is_asked_for() -> None:
    head = (FOLDER / "kustomization.yaml").read_text()
    used = {each["name"] for each in pod_of("search")["containers"][0]["env"] if "valueFrom" in each}
    assert all(f"{name}=" in head for name in (*used, "FUSELIP_STORE", "FUSELIP_GIT", "FUSELIP_API_KEY"))
    script = DEPLOYMENTS[0]["pull"][0]["prefect.deployments.steps.run_shell_script"]["script"]
    assert "${FUSELIP_GIT:?" in script and script.endswith("/work/fuselip")


@pytest.mark.parametrize("name", JOBS)
def test_the_job_runs_the_flow_with_what_it_needs(name: str) -> None:
    made, values = job(name), JOBS[name]["work_pool"]["job_variables"]
    assert (made["spec"]["backoffLimit"], made["spec"]["completions"], made["spec"]["parallelism"]) == (0, 1, 1)
    assert made["metadata"]["labels"]["prefect.io/flow-run-name"] == "quick-fox"
    pod = made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["prefect", "flow-run", "execute"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert environment.items() >= values["env"].items() and environment["PREFECT__FLOW_RUN_ID"]
    # A pod that is evicted puts its run back, which goes on from its checkpoint.
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert container["envFrom"] == [{"secretRef": {"name": "fuselip", "optional": True}}]
    assert container["image"] == values["image"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == values["gpus"]
    assert container["resources"]["limits"]["memory"] == values["memory"]
    volumes = {each["name"]: each for each in pod["volumes"]}
    claim = volumes["work"]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": values["disk"]}}}
    assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
    assert json.loads(POD.read_text())["variables"]["properties"]["pod_watch_timeout_seconds"]["default"] >= 1800
