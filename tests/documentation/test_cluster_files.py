"""Job files of docs/cluster: keys and types are those of their schemas, and train.py takes their commands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from detection.config import parse_arguments

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "docs" / "cluster"

# The parts in use of Kubeflow's CRD kubeflow.org/v1 PyTorchJob and of Kubernetes' PodTemplateSpec: a key that is not
# here is an error, as it is for the API server. A value is a type, a set of texts, a list of one kind, or an object.
QUANTITY = (int, str)
VOLUME = {"name": str, "persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": str, "sizeLimit": QUANTITY}}
CONTAINER = {
    "name": {"pytorch"},
    "image": str,
    "command": [str],
    "ports": [{"name": str, "containerPort": int}],
    "resources": {"requests": {"cpu": QUANTITY, "memory": QUANTITY}, "limits": {"nvidia.com/gpu": QUANTITY}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
POD = {"terminationGracePeriodSeconds": int, "containers": [CONTAINER], "volumes": [VOLUME]}
REPLICAS = {
    "replicas": int,
    "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "template": {"spec": POD},
}
PYTORCH_JOB = {
    "apiVersion": {"kubeflow.org/v1"},
    "kind": {"PyTorchJob"},
    "metadata": {"name": str},
    "spec": {
        "elasticPolicy": {
            "rdzvBackend": {"c10d", "etcd", "etcd-v2"},
            "rdzvPort": int,
            "minReplicas": int,
            "maxReplicas": int,
            "maxRestarts": int,
        },
        "runPolicy": {"cleanPodPolicy": {"None", "Running", "All"}, "backoffLimit": int},
        "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": REPLICAS},
    },
}
# The parts in use of SkyPilot's task, resources and storage schemas.
SKYPILOT = {
    "name": str,
    "num_nodes": int,
    "workdir": str,
    "resources": {
        "accelerators": str,
        "use_spot": bool,
        "disk_size": int,
        "job_recovery": {"strategy": str, "max_restarts_on_errors": int},
    },
    "file_mounts": {
        "/datasets/coco": {"source": str, "mode": {"MOUNT", "COPY", "MOUNT_CACHED"}},
        "/runs": {"source": str, "mode": {"MOUNT", "COPY", "MOUNT_CACHED"}},
    },
    "setup": str,
    "run": str,
}


def faults(value: Any, schema: Any, place: str = "") -> list[str]:
    """What of a value is not as the schema says."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place} is {value!r}"]
        found = [f"{place}.{key} is unknown" for key in value if key not in schema]
        return found + [
            fault for key in value if key in schema for fault in faults(value[key], schema[key], f"{place}.{key}")
        ]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{place} is {value!r}"]
        return [fault for number, one in enumerate(value) for fault in faults(one, schema[0], f"{place}[{number}]")]
    fits = value in schema if isinstance(schema, set) else isinstance(value, schema)
    return (
        [] if fits and (schema is int or not isinstance(value, bool) or schema is bool) else [f"{place} is {value!r}"]
    )


def options_of(words: list[str]) -> None:
    """train.py takes what comes after its name; SystemExit where it does not."""
    parse_arguments(words[words.index("train.py") + 1 :])


def test_the_pytorchjob_fits_its_schema_and_its_command_is_taken():
    job = yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text())
    assert faults(job, PYTORCH_JOB) == []
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    assert container["ports"][0]["containerPort"] == job["spec"]["elasticPolicy"]["rdzvPort"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc_per_node={gpus}" in container["command"]
    assert pod["terminationGracePeriodSeconds"] > int(re.search(r"SHUTDOWN_TIMEOUT=(\d+)", dockerfile())[1])
    options_of(container["command"])


def test_the_skypilot_task_fits_its_schema_and_its_command_is_taken():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert faults(task, SKYPILOT) == []
    options_of(shlex.split(task["run"].replace("\\\n", " ")))
    used = set(re.findall(r"\$(SKYPILOT_\w+)", task["run"]))
    assert used == {"SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_NODE_IPS", "SKYPILOT_TASK_ID"}


def test_the_dockerfile_has_known_instructions_and_copies_what_there_is():
    lines = [line for line in dockerfile().replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    assert lines[0].startswith("FROM ")
    for line in lines:
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    extras = re.search(r"'\.\[(.*)\]'", dockerfile())[1].split(",")
    settings = (ROOT / "setup.cfg").read_text()
    assert all(f"\n{extra} =\n" in settings for extra in extras)
    told = re.search(r"torchrun .*", dockerfile().replace("\\\n#", ""))[0]
    options_of(shlex.split(told))


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("replicas: 2", "replica: 2", "replica is unknown"),
        ("restartPolicy: OnFailure", "restartPolicy: Sometimes", "Sometimes"),
        ("maxRestarts: 10", "maxRestarts: '10'", "maxRestarts is '10'"),
        ("name: pytorch ", "name: trainer ", "trainer"),
    ],
)
def test_a_wrong_job_does_not_fit(before, after, fault):
    text = (CLUSTER / "pytorchjob.yaml").read_text()
    assert before in text
    assert fault in "; ".join(faults(yaml.safe_load(text.replace(before, after)), PYTORCH_JOB))


def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text()
