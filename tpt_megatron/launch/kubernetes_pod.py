"""The pod of one node or task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpt_megatron.launch.job import Job
from tpt_megatron.launch.rendezvous import GOODBYE_S

CONTAINER = "tpt"
CONFIG_FILE = "config.yaml"
LAST_S = 30
"""What ending takes besides saving."""


def name_of(job: Job) -> str:
    """Return the name of what is made."""
    return f"{job.options.name}-{job.stage}"


def labels(job: Job) -> dict[str, str]:
    """Return the labels of what is made, pods among it."""
    return {"app.kubernetes.io/name": "tpt-megatron", "app.kubernetes.io/instance": name_of(job), **job.options.kubernetes.labels}


def literal(word: str) -> str:
    """Return a word of a command as Kubernetes takes it for itself: `$(NAME)` would become a variable's value."""
    return word.replace("$", "$$")


def pod_template(job: Job, command: Sequence[str], environment: Sequence[dict[str, Any]] = (), container: str = CONTAINER) -> dict[str, Any]:
    """Return the template of pods that run `command`, in which `literal` has been applied to all that is not for Kubernetes."""
    options, kubernetes = job.options, job.options.kubernetes
    claims = list(kubernetes.claims.items())
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}, {"name": "config", "mountPath": "/etc/tpt", "readOnly": True}]
    mounts += [{"name": f"claim-{i}", "mountPath": path} for i, (_, path) in enumerate(claims)]
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{kubernetes.shared_memory_gb}Gi"}},
        {"name": "config", "configMap": {"name": f"{name_of(job)}-config"}},
    ]
    volumes += [{"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}} for i, (claim, _) in enumerate(claims)]
    variables = [{"name": name, "value": literal(value)} for name, value in options.environment.items()]
    main = {
        "name": container,
        "image": options.container.image,
        "command": list(command),
        **({"workingDir": options.container.workdir} if options.container.workdir else {}),
        "env": [*environment, *variables],
        **({"envFrom": [{"secretRef": {"name": name}} for name in kubernetes.secrets]} if kubernetes.secrets else {}),
        "resources": _resources(job),
        "volumeMounts": mounts,
    }
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.stop_s + GOODBYE_S + LAST_S,
        **({"serviceAccountName": kubernetes.service_account} if kubernetes.service_account else {}),
        **({"nodeSelector": dict(kubernetes.node_selector)} if kubernetes.node_selector else {}),
        "containers": [main],
        "volumes": volumes,
    }
    return {"metadata": {"labels": labels(job)}, "spec": spec}


def _resources(job: Job) -> dict[str, Any]:
    """Return what a pod asks for, all of which it gets and no more."""
    options, kubernetes = job.options, job.options.kubernetes
    asked = {
        "cpu": str(kubernetes.cpus) if kubernetes.cpus else None,
        "memory": f"{kubernetes.memory_gb}Gi" if kubernetes.memory_gb else None,
        "nvidia.com/gpu": str(options.gpus_per_node) if job.asks_for_gpus else None,
        **kubernetes.resources,
    }
    limits = {name: value for name, value in asked.items() if value is not None}
    return {"requests": dict(limits), "limits": limits}
