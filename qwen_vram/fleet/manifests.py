"""Files that start a fleet: for Docker Compose, and for Kubernetes.

They hold no secret: a token of the hub is taken from the environment, or from a Kubernetes secret.
"""

from __future__ import annotations

import re
from typing import Any

from qwen_vram.checkpoints.files.place import place_of
from qwen_vram.errors import BackendUnavailableError, WorkloadError
from qwen_vram.fleet.command import PORT, check_node, opened, server_arguments
from qwen_vram.fleet.data import Fleet, FleetOption

# The image of vLLM's release whose options this library knows. No image of transformers is published with a server.
_IMAGES = {"vllm": "vllm/vllm-openai:v0.33.0"}
_BALANCER = "nginx:1.28"
_CACHE, _MODEL = "/root/.cache/huggingface", "/model"
# Shared memory between the processes of a replica, and seconds that a server may take to load.
# Source: https://docs.vllm.ai/en/latest/deployment/k8s.html (2Gi, /health); the seconds are an hour.
_SHARED_MEMORY, _PROBE_SECONDS, _LOADING_SECONDS = "2Gi", 10, 3600
_HEALTH = f"http://localhost:{PORT}/health"
_SECRET, _TOKEN = "hf-token", "HF_TOKEN"


def compose(plan: Fleet, option: FleetOption, *, node: int, image: str | None) -> str:
    """Return a Compose file for the servers of one machine; `FleetPlan.compose` describes the arguments and errors."""
    servers = check_node(plan, option, node)
    mount, inside = _mounted(plan)
    arguments = server_arguments(plan, option, inside, host="0.0.0.0", port=PORT)
    services: dict[str, Any] = {}
    for server in servers:
        services[f"server-{server.replica}"] = {
            "image": _image(plan, image),
            "entrypoint": arguments[:2],
            "command": arguments[2:],
            "environment": [_TOKEN],
            "ipc": "host",
            "volumes": [mount],
            "deploy": {
                "resources": {
                    "reservations": {
                        "devices": [
                            {
                                "driver": "nvidia",
                                "device_ids": [str(gpu) for gpu in server.gpus],
                                "capabilities": ["gpu"],
                            }
                        ]
                    }
                }
            },
            "healthcheck": {
                "test": ["CMD", "python3", "-c", f"import urllib.request as u; u.urlopen('{_HEALTH}', timeout=5)"],
                "interval": f"{_PROBE_SECONDS}s",
                "timeout": "10s",
                "retries": 3,
                "start_period": f"{_LOADING_SECONDS}s",
            },
            "restart": "unless-stopped",
        }
    file: dict[str, Any] = {"name": _name(plan, None), "services": services}
    published = [f"127.0.0.1:{PORT}:{PORT}"]
    if len(services) == 1:
        next(iter(services.values()))["ports"] = published
    else:
        file["configs"] = {"balancer": {"content": _balancer(list(services))}}
        services["balancer"] = {
            "image": _BALANCER,
            "ports": published,
            "configs": [{"source": "balancer", "target": "/etc/nginx/conf.d/default.conf"}],
            "depends_on": {name: {"condition": "service_healthy"} for name in list(services)},
            "restart": "unless-stopped",
        }
    if not mount.startswith("/"):
        file["volumes"] = {mount.partition(":")[0]: {}}
    return _yaml([file])


def kubernetes(plan: Fleet, option: FleetOption, *, image: str | None, name: str | None) -> str:
    """Return a Deployment and a Service; `FleetPlan.kubernetes` describes the arguments and errors."""
    name = _name(plan, name)
    labels = {"app.kubernetes.io/name": name}
    folder = place_of(plan.model).folder if plan.model is not None else None
    mount, inside = _mounted(plan)
    arguments = server_arguments(plan, option, inside, host="0.0.0.0", port=PORT)
    health = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": _PROBE_SECONDS, "timeoutSeconds": 5}
    gpus = {"nvidia.com/gpu": str(option.tensor_parallel)}
    models: dict[str, Any] = {"name": "models"}
    if folder is None:
        models["emptyDir"] = {}
    else:
        models["hostPath"] = {"path": str(folder.absolute()), "type": "Directory"}
    container = {
        "name": "server",
        "image": _image(plan, image),
        "command": arguments[:2],
        "args": arguments[2:],
        "env": [{"name": _TOKEN, "valueFrom": {"secretKeyRef": {"name": _SECRET, "key": "token", "optional": True}}}],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"limits": gpus, "requests": dict(gpus)},
        "volumeMounts": [
            {"name": "models", "mountPath": mount.split(":")[1], **({"readOnly": True} if folder else {})},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
        "startupProbe": {**health, "failureThreshold": _LOADING_SECONDS // _PROBE_SECONDS},
        "readinessProbe": {**health, "failureThreshold": 3},
        "livenessProbe": {**health, "failureThreshold": 6},
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {
            "replicas": option.replicas,
            "selector": {"matchLabels": dict(labels)},
            # An update replaces a server on its own GPUs, because no others are free.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": {
                "metadata": {"labels": dict(labels)},
                "spec": {
                    "containers": [container],
                    "volumes": [
                        models,
                        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}},
                    ],
                },
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {
            "type": "ClusterIP",
            "selector": dict(labels),
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    }
    return _yaml([deployment, service])


def _mounted(plan: Fleet) -> tuple[str, str]:
    """Return the volume of the model, and the name that a server in a container opens."""
    model = opened(plan)
    if model.startswith("/"):
        return f"{model}:{_MODEL}:ro", _MODEL
    return f"models:{_CACHE}", model


def _image(plan: Fleet, image: str | None) -> str:
    """Return the image, which must have a tag or a digest.

    Raises:
        WorkloadError: there is no image for the engine, or it has no tag.
    """
    chosen = image or _IMAGES.get(plan.engine.name)
    if chosen is None:
        raise WorkloadError(
            f"no image with a server of engine {plan.engine.name!r} is published; pass image= with one of your own",
            name="image",
            got=None,
        )
    if ":" not in chosen.rpartition("/")[2]:
        raise WorkloadError(
            f"image must have a tag or a digest, such as {_IMAGES['vllm']!r}, got {chosen!r}", name="image", got=chosen
        )
    return chosen


def _name(plan: Fleet, name: str | None) -> str:
    """Return a name that Compose and Kubernetes allow (RFC 1123).

    Raises:
        WorkloadError: the caller's name is not such a name.
    """
    if name is None:
        plain = re.sub(r"[^a-z0-9]+", "-", plan.label.rpartition("/")[2].lower()).strip("-")[:50].strip("-")
        return plain if plain[:1].isalpha() else f"model-{plain}".strip("-")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise WorkloadError(
            f"name must be at most 63 small letters, digits and hyphens, and begin with a letter, got {name!r}",
            name="name",
            got=name,
        )
    return name


def _balancer(names: list[str]) -> str:
    """Return nginx's configuration: each request to the server with the fewest, answers as they are streamed."""
    servers = "".join(f"  server {name}:{PORT};\n" for name in names)
    return (
        f"upstream servers {{\n  least_conn;\n{servers}}}\n"
        f"server {{\n  listen {PORT};\n  location / {{\n    proxy_pass http://servers;\n    proxy_buffering off;\n"
        "    proxy_read_timeout 1h;\n  }\n}\n"
    )


def _yaml(documents: list[dict[str, Any]]) -> str:
    try:
        import yaml
    except ImportError as error:
        install = "pip install pyyaml"
        raise BackendUnavailableError(
            f"Compose and Kubernetes files need PyYAML, which is not installed; run: {install}",
            backend="yaml",
            install=install,
        ) from error

    class Dumper(yaml.SafeDumper):  # type: ignore[misc] # its types are not followed
        """YAML without anchors, and with texts of several lines as they are."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    def lines(dumper: Dumper, text: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, lines)
    result: str = yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=100)
    return result
