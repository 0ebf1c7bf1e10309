"""Manifests for Kubernetes; tests/support/kubernetes_schema.py says what is checked of them, and what not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.support.kubernetes_schema import check_manifest
from tests.support.train_runs import write_train_config
from tpt_megatron.launch.job import make_job
from tpt_megatron.launch.kubernetes import manifest

ODD = "a b$(HOME)'\"\\;*"
FULL: dict[str, Any] = {
    "namespace": "research",
    "service_account": "trainer",
    "claims": {"datasets": "/data", "runs": "/runs"},
    "secrets": ["wandb"],
    "cpus": 96,
    "memory_gb": 1024,
    "resources": {"rdma/ib": 8},
    "labels": {"kueue.x-k8s.io/queue-name": "gpus"},
    "node_selector": {"gpu": "h100"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_train_config(tmp_path, tmp_path, steps=4)
    (tmp_path / "augment.yaml").write_text("input: a.jsonl\noutput: augmented\ngenerator: {kind: worked}  # a remark\n")
    (tmp_path / "preprocess.yaml").write_text("input: a.jsonl\noutput: data\ntokenizer: byte\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documents(name: str, *words: str, nodes: int = 2, **options: Any) -> list[dict[str, Any]]:
    options = {"container": {"image": "registry/tpt:1"}, **options}
    words += tuple(f"launch.{key}={json.dumps(value)}" for key, value in options.items())
    return check_manifest(manifest(make_job(name, list(words), None, {"nodes": nodes})))


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    if document["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    if document["kind"] == "PyTorchJob":
        spec = spec["pytorchReplicaSpecs"]["Master"]
    found: dict[str, Any] = spec["template"]["spec"]
    return found


@pytest.mark.parametrize("name", ["train.yaml", "augment.yaml", "preprocess.yaml"])
@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
@pytest.mark.parametrize(("kubernetes", "options"), [({}, {}), (FULL, {"logs": "/runs/logs", "environment": {"NCCL_DEBUG": "INFO", "ODD": ODD}})])
def test_manifests_have_only_what_the_schemas_have(folder: Path, name: str, kind: str, kubernetes: dict[str, Any], options: dict[str, Any]) -> None:
    config, work = documents(
        name, f"output={ODD}" if name != "train.yaml" else f"run_dir={ODD}", kubernetes={"kind": kind, **kubernetes}, gpus_per_node=2, **options
    )
    assert work["kind"] == ("Job" if name != "train.yaml" else {"jobset": "JobSet", "pytorchjob": "PyTorchJob"}[kind])
    assert config["data"] == {"config.yaml": (folder / name).read_text()}
    assert pod_of(work)["volumes"][1]["configMap"]["name"] == config["metadata"]["name"]
    assert pod_of(work)["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") == (None if name == "preprocess.yaml" else "2")
    assert work["metadata"].get("namespace") == kubernetes.get("namespace")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("backoffLimit: 0", "backofLimit: 0"),
        ("backoffLimit: 0", "backoffLimit: none"),
        ("maxRestarts: 3", "maxRestart: 3"),
        ("RestartJobSetAndIgnoreMaxRestarts", "RestartEverything"),
        ("name: wrongConfig", "nam: wrongConfig"),
        ("mountPath: /etc/tpt", "mountpath: /etc/tpt"),
        ("  image: ", "  imag: "),
        ("containerName: tpt", "containerName: main"),
        ("restartPolicy: Never", "restartPolicy: OnFailure"),
    ],
)
def test_the_check_finds_mistakes(folder: Path, right: str, wrong: str) -> None:
    text = manifest(make_job("train.yaml", ["launch.container.image=i"], None, {"gpus_per_node": 1}))
    check_manifest(text)
    assert right in text
    with pytest.raises((AssertionError, ValidationError)):
        check_manifest(text.replace(right, wrong))


def test_ranks_of_a_jobset_find_each_other_and_end_as_its_rules_say(folder: Path) -> None:
    _, work = documents("train.yaml", gpus_per_node=1, backoff_s=60, max_restarts=7, stop_s=600)
    spec = work["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"], spec["backoffLimit"]) == (2, 2, "Indexed", 0)
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 600
    command = pod["containers"][0]["command"]
    assert "--rendezvous=tpt-train-ranks-0-0.tpt-train:29400" in command
    assert {"--nodes=2", "--ranks=1", "--node-variable=JOB_COMPLETION_INDEX", "--backoff-s=60", "--stop-s=600"} <= set(command)
    assert work["spec"]["failurePolicy"]["maxRestarts"] == 7
    wrong, stopped = work["spec"]["failurePolicy"]["rules"]
    # As Kubernetes words a job that fails by such a rule.
    message = "Container tpt for pod research/tpt-train-ranks-0-1-x7x9k failed with exit code {} matching FailJob rule at index {}"
    (pattern,) = wrong["onJobFailureMessagePatterns"]
    assert re.search(pattern, message.format(2, 0))
    assert not re.search(pattern, message.format(3, 1))
    assert not re.search(pattern, message.format(23, 1))
    assert (wrong["action"], stopped["action"]) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert [rule.get("onExitCodes", {}).get("values") for rule in spec["podFailurePolicy"]["rules"]] == [[2], [3], None]


def test_tasks_of_preprocess_are_shards_and_dollars_stay_what_they_are(folder: Path) -> None:
    _, work = documents("preprocess.yaml", f"output={ODD}", nodes=5, device="cpu", max_restarts=2)
    assert (work["spec"]["completions"], work["spec"]["backoffLimitPerIndex"]) == (5, 2)
    command = pod_of(work)["containers"][0]["command"]
    # Kubernetes expands $(NAME) of variables it knows and makes $$ one dollar; `echo` stands for the command then.
    words = [re.sub(r"\$\$", "$", word) for word in command]
    words[words.index("python3")] = "echo"
    ended = subprocess.run(words, env={"JOB_COMPLETION_INDEX": "4", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert ended.stdout == f"-m tpt_megatron.cli preprocess /etc/tpt/config.yaml output={ODD} shard=5/5\n"
    assert not [word for word in command if re.search(r"(?<!\$)(\$\$)*\$\(", word)]


def test_a_dry_run_prints_the_manifest_and_nothing_else(folder: Path) -> None:
    words = ["launch", "kubernetes", "train.yaml", "--gpus-per-node=2", "--nodes=2", "--dry-run", "launch.container.image=image"]
    ended = subprocess.run([sys.executable, "-m", "tpt_megatron.cli", *words], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [document["kind"] for document in yaml.safe_load_all(ended.stdout)] == ["ConfigMap", "JobSet"]
