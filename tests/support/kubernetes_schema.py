"""Whether a manifest is one that Kubernetes takes, as far as that can be known without a cluster.

Checked are, of every document, names, types and required fields against the OpenAPI models of the package kubeflow-trainer-api, which are made from
the schemas of Kubernetes (core/v1, batch/v1) and of JobSet (v1alpha2): a field that they do not know, a value of another type and a missing field
fail. Of a PyTorchJob, which no light package has, the few fields around its pods are held against those that kubeflow.org/v1 documents, and its
pods against the models. Besides, some rules that no schema has and an API server enforces; see `_rules_of_pods`.

Not checked: admission by a real API server, and what the operators do.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from kubeflow_trainer_api import models

MODELS: dict[tuple[str, str], Any] = {
    ("v1", "ConfigMap"): models.IoK8sApiCoreV1ConfigMap,
    ("batch/v1", "Job"): models.IoK8sApiBatchV1Job,
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): models.JobsetV1alpha2JobSet,
}
ACTIONS = {
    "job": {"FailJob", "FailIndex", "Ignore", "Count"},
    "jobset": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"},
}
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def check_manifest(text: str) -> list[dict[str, Any]]:
    """Return the documents of a manifest; AssertionError, or the models' ValidationError, for what is wrong."""
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        assert NAME.fullmatch(document["metadata"]["name"])
        if document["kind"] == "PyTorchJob":
            _check_pytorchjob(document)
        else:
            _check_model(MODELS[document["apiVersion"], document["kind"]], document)
        if document["kind"] == "Job":
            _rules_of_jobs(document["spec"])
        if document["kind"] == "JobSet":
            _rules_of_jobsets(document["spec"])
    return documents


def _check_model(model: Any, document: dict[str, Any]) -> None:
    """Read a document and write it again: what is of the wrong type is refused, what is unknown is lost, what is required and missing appears."""
    again = model.from_dict(document).to_dict()
    assert again == document


def _check_pytorchjob(document: dict[str, Any]) -> None:
    _known(document, {"apiVersion": str, "kind": str, "metadata": dict, "spec": dict})
    assert document["apiVersion"] == "kubeflow.org/v1"
    spec = document["spec"]
    _known(spec, {"runPolicy": dict, "pytorchReplicaSpecs": dict, "elasticPolicy": dict, "nprocPerNode": str})
    _known(
        spec["runPolicy"],
        {"cleanPodPolicy": str, "backoffLimit": int, "activeDeadlineSeconds": int, "ttlSecondsAfterFinished": int, "suspend": bool, "schedulingPolicy": dict},
    )
    assert spec["runPolicy"]["cleanPodPolicy"] in {"None", "Running", "All"}
    assert spec["pytorchReplicaSpecs"].keys() <= {"Master", "Worker"}
    assert spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    for replica in spec["pytorchReplicaSpecs"].values():
        _known(replica, {"replicas": int, "restartPolicy": str, "template": dict})
        assert replica["restartPolicy"] in {"Always", "OnFailure", "Never", "ExitCode"}
        _check_model(models.IoK8sApiCoreV1PodTemplateSpec, replica["template"])
        _rules_of_pods(replica["template"]["spec"])
        assert "pytorch" in [container["name"] for container in replica["template"]["spec"]["containers"]], "the operator asks for this name"


def _known(found: dict[str, Any], fields: dict[str, type]) -> None:
    assert found.keys() <= fields.keys()
    assert {name: type(value) for name, value in found.items()} == {name: fields[name] for name in found}


def _rules_of_jobsets(spec: dict[str, Any]) -> None:
    for rule in spec["failurePolicy"]["rules"]:
        assert rule["action"] in ACTIONS["jobset"]
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        for pattern in rule.get("onJobFailureMessagePatterns", []):
            re.compile(pattern)
    for replicated in spec["replicatedJobs"]:
        assert NAME.fullmatch(replicated["name"])
        _rules_of_jobs(replicated["template"]["spec"])


def _rules_of_jobs(spec: dict[str, Any]) -> None:
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy and a backoffLimitPerIndex need it"
    containers = {container["name"] for container in pod["containers"]}
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ACTIONS["job"]
        assert len(rule.keys() & {"onExitCodes", "onPodConditions"}) == 1
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] in containers
            values = rule["onExitCodes"]["values"]
            assert rule["onExitCodes"]["operator"] in {"In", "NotIn"} and values == sorted(set(values)) and 0 not in values
    _rules_of_pods(pod)


def _rules_of_pods(pod: dict[str, Any]) -> None:
    """Every mount has its volume and a place of its own, and a GPU that is asked for is a GPU that is had."""
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert NAME.fullmatch(container["name"])
        mounts = container["volumeMounts"]
        assert {mount["name"] for mount in mounts} == volumes
        assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
        resources = container["resources"]
        assert resources["requests"].get("nvidia.com/gpu") == resources["limits"].get("nvidia.com/gpu")
        for quantity in resources["limits"].values():
            assert re.fullmatch(r"\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?", quantity)
