"""Compose and Kubernetes files against the schemas of Compose and of Kubernetes, and what they start."""

import json
import re
from importlib.resources import files

import jsonschema
import kubernetes_validate
import pytest
import yaml

import qwen_vram as qv
from tests.fleet.fleets import SEVEN, fleet

# The schema of the Compose specification, as the package check-jsonschema has it (Apache-2.0).
COMPOSE = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())
SCHEMA = jsonschema.validators.validator_for(COMPOSE)(COMPOSE)
KUBERNETES = "1.30"
SECRETS = re.compile(r"hf_[A-Za-z]{8}|password|api[-_]?key", re.I)


@pytest.fixture(scope="module")
def several():
    """Nine replicas of two GPUs: on machines with four GPUs, two on each."""
    return fleet("L4", concurrent_users=450, weights="bf16", tensor_parallel=2, gpus_per_node=4)


@pytest.fixture(scope="module")
def alone():
    return fleet("A100-80GB", concurrent_users=4)


def of_kubernetes(text):
    deployment, service = yaml.safe_load_all(text)
    for one in (deployment, service):
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    return deployment, service


@pytest.mark.parametrize("node", [0, 1])
def test_a_compose_file_starts_the_servers_of_one_machine(several, node):
    text = several.compose(node=node)
    file = yaml.safe_load(text)
    SCHEMA.validate(file)
    servers = {name: one for name, one in file["services"].items() if name != "balancer"}
    assert list(servers) == [f"server-{2 * node}", f"server-{2 * node + 1}"]
    devices = [one["deploy"]["resources"]["reservations"]["devices"][0] for one in servers.values()]
    assert [one["device_ids"] for one in devices] == [["0", "1"], ["2", "3"]]
    for one in servers.values():
        assert one["image"] == "vllm/vllm-openai:v0.33.0"
        assert one["ipc"] == "host"
        assert "/health" in one["healthcheck"]["test"][-1]
        assert one["entrypoint"] == ["vllm", "serve"]
        assert one["command"][0] == "Qwen/Qwen2.5-7B-Instruct"
        assert one["environment"] == ["HF_TOKEN"]  # by name: its value is not in the file
        assert "ports" not in one
    balancer = file["services"]["balancer"]
    assert balancer["ports"] == ["127.0.0.1:8000:8000"]
    assert set(balancer["depends_on"]) == set(servers)
    assert all(f"server {name}:8000;" in file["configs"]["balancer"]["content"] for name in servers)
    assert not SECRETS.search(text)


def test_a_single_server_is_published_without_a_balancer(alone):
    file = yaml.safe_load(alone.compose(image="registry.local:5000/vllm@sha256:" + 64 * "0"))
    SCHEMA.validate(file)
    assert list(file["services"]) == ["server-0"]
    assert file["services"]["server-0"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "configs" not in file


def test_kubernetes_gets_a_deployment_and_a_service(several):
    text = several.kubernetes(name="qwen")
    deployment, service = of_kubernetes(text)
    assert deployment["spec"]["replicas"] == several.best.replicas
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"nvidia.com/gpu": "2"}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    selected = service["spec"]["selector"]
    assert selected.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"] == selected
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert container["env"][0]["valueFrom"]["secretKeyRef"]["optional"] is True
    assert "&id" not in text
    assert not SECRETS.search(text)


def test_the_schemas_would_notice(several):
    file = yaml.safe_load(several.compose())
    file["services"]["server-0"]["helthcheck"] = {}
    with pytest.raises(jsonschema.ValidationError, match="helthcheck"):
        SCHEMA.validate(file)
    deployment, _ = yaml.safe_load_all(several.kubernetes())
    deployment["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "8000"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)


def test_a_folder_is_mounted(demo):
    plan = fleet("L4", model=demo, prompt_len=100, max_new_tokens=50)
    file = yaml.safe_load(plan.compose())
    SCHEMA.validate(file)
    server = file["services"]["server-0"]
    assert server["volumes"] == [f"{demo}:/model:ro"]
    assert server["command"][0] == "/model"
    assert "volumes" not in file
    deployment, _ = of_kubernetes(plan.kubernetes())
    pod = deployment["spec"]["template"]["spec"]
    assert pod["volumes"][0]["hostPath"] == {"path": str(demo), "type": "Directory"}
    assert pod["containers"][0]["volumeMounts"][0] == {"name": "models", "mountPath": "/model", "readOnly": True}


def test_names_are_those_that_kubernetes_allows(alone):
    assert yaml.safe_load(alone.compose())["name"] == "qwen2-5-7b-instruct"
    for name in ("Qwen", "-a", "a" * 64, "a.b", "1a", ""):
        with pytest.raises(qv.WorkloadError, match="name must be at most 63 small letters"):
            alone.kubernetes(name=name)


def test_an_image_needs_a_tag_and_a_machine_must_exist(alone):
    with pytest.raises(qv.WorkloadError, match="image must have a tag or a digest, such as 'vllm/vllm-openai:v0.33.0'"):
        alone.compose(image="registry.local:5000/vllm")
    with pytest.raises(qv.WorkloadError, match="node must be from 0 to 0, got 1"):
        alone.compose(node=1)


def test_transformers_has_no_image_of_its_own():
    plan = fleet("RTX 4090", engine="transformers", concurrent_users=2, tokens_per_second=5, weights="nf4")
    with pytest.raises(
        qv.WorkloadError, match="no image with a server of engine 'transformers' is published; pass image="
    ):
        plan.compose()
    command = yaml.safe_load(plan.compose(image="own/transformers:1"))["services"]["server-0"]
    assert command["entrypoint"] == ["transformers", "serve"]
    assert command["command"][:2] == [f"Qwen/{SEVEN}", "--continuous-batching"]


def test_without_pyyaml_the_install_line_is_given(alone, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(
        qv.BackendUnavailableError, match="need PyYAML, which is not installed; run: pip install pyyaml"
    ):
        alone.compose()
