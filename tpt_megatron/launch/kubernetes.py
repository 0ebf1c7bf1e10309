"""Kubernetes: the run's config as a ConfigMap, and beside it a JobSet or a PyTorchJob for training, or an indexed Job for augment and preprocess.

What each does about how ranks end:

                       JobSet                             PyTorchJob                   indexed Job
    3, stopped         all start again, uncounted         all start again, counted     the index starts again, uncounted
    2, wrong config    fails                              fails                        fails
    evicted            all start again, uncounted         all start again              the index starts again, uncounted
    else               all again, max_restarts times      all again, max_restarts      the index again, max_restarts times
    pause before it    backoff_s, twice as long each      backoff_s                    Kubernetes' own: 10 s, twice as long each

Written after jobset.x-k8s.io/v1alpha2 as of JobSet 0.10 (onJobFailureMessagePatterns), kubeflow.org/v1 as of its training operator 1.9, and batch/v1.
No cluster has run them yet.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import yaml

from tpt_megatron.config.load import read_config
from tpt_megatron.errors import ConfigError, MachineError, Stopped
from tpt_megatron.launch.job import Job
from tpt_megatron.launch.kubernetes_pod import CONFIG_FILE, CONTAINER, labels, literal, name_of, pod_template
from tpt_megatron.launch.local import AGENT

PORT = 29400
ATTEMPT = "TPT_ATTEMPT"
RETRY = 130
"""A PyTorchJob takes exit codes below 128 for failures that would come again."""


def manifest(job: Job) -> str:
    """Return the manifest's documents as YAML. ConfigError for options that Kubernetes has no use for, or that it needs."""
    if job.options.container.image is None:
        raise ConfigError("launch.container.image is missing: on Kubernetes ranks run in a container")
    if job.options.container.mounts:
        raise ConfigError("launch.container.mounts are Slurm's; on Kubernetes name volume claims: launch.kubernetes.claims={CLAIM: PATH}")
    text, _ = read_config(job.name)
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(job, "-config"), "data": {CONFIG_FILE: text}}
    if job.stage != "train":
        work = _indexed_job(job)
    elif job.options.kubernetes.kind == "jobset":
        work = _jobset(job)
    else:
        work = _pytorchjob(job)
    return yaml.dump_all([config, work], Dumper=_Dumper, sort_keys=False, width=200).rstrip("\n")


def apply(job: Job) -> str:
    """Hand the manifest to kubectl, and return what it says. MachineError where there is none, or where the cluster refuses."""
    text = manifest(job)
    if shutil.which("kubectl") is None:
        raise MachineError("kubernetes: there is no kubectl on this machine; print the manifest with --dry-run and apply it where there is one")
    done = subprocess.run(["kubectl", "apply", "--filename=-"], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MachineError(f"kubernetes: {' '.join(done.stderr.split()) or f'kubectl ended with exit code {done.returncode}'}")
    return done.stdout.rstrip("\n")


def _jobset(job: Job) -> dict[str, Any]:
    options, name = job.options, name_of(job)
    agent = _agent(job, f"{name}-ranks-0-0.{name}:{PORT}", "JOB_COMPLETION_INDEX")
    agent += [f"--attempt-variable={ATTEMPT}", f"--backoff-s={options.backoff_s}", f"--max-backoff-s={options.max_backoff_s}"]
    if options.logs is not None:
        agent += [literal(f"--logs={options.logs}/{name}/attempt_") + f"$({ATTEMPT})"]
    attempt = {"name": ATTEMPT, "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"}}}
    one_ends_all = {
        "parallelism": options.nodes,
        "completions": options.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [_on_exit("FailJob", ConfigError.exit_code), _on_exit("FailJob", Stopped.exit_code), _on_eviction("FailJob")]},
        "template": pod_template(job, [*agent, "--", *_arguments(job)], environment=[attempt]),
    }
    # The first rule that fits counts. Messages are Kubernetes' own: "Container tpt for pod NAMESPACE/POD failed with exit code 2 matching ...".
    wrong_config = {
        "name": "wrongConfig",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [f"failed with exit code {ConfigError.exit_code} "],
    }
    stopped = {"name": "stoppedOrEvicted", "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": options.max_restarts, "rules": [wrong_config, stopped]},
            "replicatedJobs": [{"name": "ranks", "replicas": 1, "template": {"spec": one_ends_all}}],
        },
    }


def _pytorchjob(job: Job) -> dict[str, Any]:
    options, name = job.options, name_of(job)
    # The operator says in every pod where the master is, and in RANK the pod's number.
    agent = _agent(job, "$(MASTER_ADDR):$(MASTER_PORT)", "RANK")
    agent += [f"--failed-exit-code={RETRY}", f"--failed-pause-s={options.backoff_s}"]
    if options.logs is not None:
        agent += [literal(f"--logs={options.logs}/{name}")]
    template = pod_template(job, [*agent, "--", *_arguments(job)], container="pytorch")  # the name that the operator looks for
    del template["spec"]["restartPolicy"]  # said below, for all
    replicas = {"Master": 1} | ({"Worker": options.nodes - 1} if options.nodes > 1 else {})
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job),
        "spec": {
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": options.max_restarts},
            "pytorchReplicaSpecs": {role: {"replicas": count, "restartPolicy": "ExitCode", "template": template} for role, count in replicas.items()},
        },
    }


def _indexed_job(job: Job) -> dict[str, Any]:
    count, command = job.options.nodes, [literal(word) for word in (job.options.container.python, "-m", "tpt_megatron.cli")]
    command += _arguments(job)
    if job.stage == "preprocess":
        # The shell becomes the command, so that signals reach it.
        command = ["bash", "-c", literal(f'exec "$@" "shard=$((JOB_COMPLETION_INDEX + 1))/{count}"'), "shard", *command]
    else:
        command.append("slurm=null")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job),
        "spec": {
            "parallelism": count,
            "completions": count,
            "completionMode": "Indexed",
            "backoffLimitPerIndex": job.options.max_restarts,
            "podFailurePolicy": {"rules": [_on_exit("FailJob", ConfigError.exit_code), _on_exit("Ignore", Stopped.exit_code), _on_eviction("Ignore")]},
            "template": pod_template(job, command),
        },
    }


def _agent(job: Job, rendezvous: str, node_variable: str) -> list[str]:
    options = job.options
    words = [literal(word) for word in (options.container.python, *AGENT)]
    words += [f"--nodes={options.nodes}", f"--ranks={options.gpus_per_node}", f"--stop-s={options.stop_s}", f"--id={name_of(job)}"]
    return [*words, f"--rendezvous={rendezvous}", f"--node-variable={node_variable}"]


def _arguments(job: Job) -> list[str]:
    return [literal(word) for word in job.arguments(config=f"/etc/tpt/{CONFIG_FILE}")]


def _on_exit(action: str, code: int) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]}}


def _on_eviction(action: str) -> dict[str, Any]:
    return {"action": action, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _metadata(job: Job, ending: str = "") -> dict[str, Any]:
    namespace = job.options.kubernetes.namespace
    return {"name": name_of(job) + ending, **({"namespace": namespace} if namespace else {}), "labels": labels(job)}


class _Dumper(yaml.SafeDumper):
    """Text of several lines as such, and no names for what comes twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
