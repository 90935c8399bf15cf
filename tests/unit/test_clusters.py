"""Cluster files follow the rules that KubeRay, Ray Serve and the recipes would enforce.

There is no API server here, so the rules of KubeRay's v1.7 operator (validation.go and the fields of
rayjob_types.go) are repeated: names of at most 47 characters, string values in rayStartParams, and so on.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.scripts.scripts import cli
from ray.serve.schema import ServeDeploySchema

from serving.app import ServingConfig
from ul2r.config import Recipe, load

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
RESOURCES = sorted(CLUSTERS.glob("*.yaml"))

SPEC_KEYS = {
    "RayJob": {
        "activeDeadlineSeconds",
        "backoffLimit",
        "entrypoint",
        "rayClusterSpec",
        "runtimeEnvYAML",
        "shutdownAfterJobFinishes",
        "suspend",
        "ttlSecondsAfterFinished",
    },
    "RayService": {"serveConfigV2", "rayClusterConfig"},
}
CLUSTER_KEYS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
WORKER_KEYS = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
}


def _load_resource(path: Path) -> dict[str, Any]:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(tree, dict)
    return tree


def _cluster(resource: dict[str, Any]) -> dict[str, Any]:
    spec = resource["spec"]
    cluster = spec["rayClusterSpec"] if resource["kind"] == "RayJob" else spec["rayClusterConfig"]
    assert isinstance(cluster, dict)
    return cluster


def _groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.fixture(params=RESOURCES, ids=lambda path: path.name)
def resource(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _load_resource(request.param)


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return _load_resource(CLUSTERS / "kuberay-rayjob.yaml")


def test_there_is_a_file_of_each_kind() -> None:
    assert {_load_resource(path)["kind"] for path in RESOURCES} == set(SPEC_KEYS)


def test_resource_has_only_keys_that_the_operator_knows(resource: dict[str, Any]) -> None:
    assert set(resource) == {"apiVersion", "kind", "metadata", "spec"}
    assert resource["apiVersion"] == "ray.io/v1"
    assert set(resource["spec"]) <= SPEC_KEYS[resource["kind"]]
    assert set(_cluster(resource)) <= CLUSTER_KEYS
    for group in _cluster(resource)["workerGroupSpecs"]:
        assert set(group) <= WORKER_KEYS


def test_name_is_short_enough_for_the_names_derived_from_it(resource: dict[str, Any]) -> None:
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", resource["metadata"]["name"])


def test_token_authentication_is_on(resource: dict[str, Any]) -> None:
    assert _cluster(resource)["authOptions"] == {"mode": "token"}


def test_ray_version_is_the_locked_one(resource: dict[str, Any]) -> None:
    version = _cluster(resource)["rayVersion"]
    assert f"ray=={version}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_ray_start_parameters_are_strings(resource: dict[str, Any]) -> None:
    for group in _groups(_cluster(resource)):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_worker_groups_have_consistent_sizes_and_distinct_names(resource: dict[str, Any]) -> None:
    groups = _cluster(resource)["workerGroupSpecs"]
    assert all(
        group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups
    )
    assert len({group["groupName"] for group in groups}) == len(groups)


def test_pods_are_complete(resource: dict[str, Any]) -> None:
    """Each has a container and the volume of every mount; limits equal requests, as extended resources require."""
    for group in _groups(_cluster(resource)):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert pod["containers"]
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_every_pod_runs_the_same_image(resource: dict[str, Any]) -> None:
    pods = [group["template"]["spec"] for group in _groups(_cluster(resource))]
    assert len({container["image"] for pod in pods for container in pod["containers"]}) == 1


def test_ray_and_kubernetes_count_the_same_gpus(resource: dict[str, Any]) -> None:
    for group in _groups(_cluster(resource)):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert group["rayStartParams"].get("num-gpus") == limits.get("nvidia.com/gpu", "0")


def test_job_that_is_suspended_or_expires_shuts_down_its_cluster(job: dict[str, Any]) -> None:
    spec = job["spec"]
    if spec.get("suspend") or spec.get("ttlSecondsAfterFinished"):
        assert spec["shutdownAfterJobFinishes"] is True


def test_job_is_not_retried_while_the_first_attempt_may_run(job: dict[str, Any]) -> None:
    assert job["spec"]["backoffLimit"] == 0


def test_job_starts_all_its_workers_at_once(job: dict[str, Any]) -> None:
    """A training run has a fixed size, with one worker per GPU."""
    recipe = _load_recipe(job["spec"]["entrypoint"])
    groups = _cluster(job)["workerGroupSpecs"]
    gpus = sum(group["replicas"] * int(group["rayStartParams"]["num-gpus"]) for group in groups)
    assert all(group["minReplicas"] == group["maxReplicas"] for group in groups)
    assert recipe.launch.gpus_per_worker == 1
    assert recipe.parallel.num_workers == gpus


def test_run_has_time_to_save_when_its_pods_or_its_job_are_ended(job: dict[str, Any]) -> None:
    (group,) = _cluster(job)["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    (*_, script) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert "DRAIN_NODE_REASON_PREEMPTION" in script
    sleep = re.search(r"sleep (\d+)$", script)
    assert sleep is not None
    assert int(sleep[1]) < pod["terminationGracePeriodSeconds"]
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= pod["terminationGracePeriodSeconds"]


def test_drain_command_of_a_pod_is_one_that_ray_has(job: dict[str, Any]) -> None:
    (group,) = _cluster(job)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    (*_, script) = container["lifecycle"]["preStop"]["exec"]["command"]
    words = shlex.split(script.partition("&&")[0])
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None
    # Raises for an option or a reason that does not exist.
    command.make_context(words[1], words[2:])


@pytest.mark.parametrize("code", [0, 1])
def test_pod_waits_only_if_its_end_could_be_announced(
    job: dict[str, Any], tmp_path: Path, code: int
) -> None:
    (group,) = _cluster(job)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    for name, lines in {"ray": f"exit {code}", "sleep": f"touch {tmp_path}/slept"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    subprocess.run(command, check=False, env=environment)
    assert (tmp_path / "slept").exists() == (code == 0)


def test_slurm_gives_the_signal_to_the_process_that_saves() -> None:
    """SIGTERM to `srun` kills its step, so the job runs in the batch script itself."""
    script = (CLUSTERS / "slurm.sbatch").read_text(encoding="utf-8")
    (line,) = re.findall(r"^(.*)jobs/train\.py", re.sub(r"(?m)^#.*$", "", script), re.MULTILINE)
    assert line == ".venv/bin/python "


@pytest.mark.parametrize(("name", "is_requeued"), [("USR1", True), ("TERM", False)])
@pytest.mark.parametrize("stage", ["join", "start", "train"])
def test_slurm_ends_with_130_at_each_stage_and_requeues_at_the_time_limit(
    name: str, stage: str, tmp_path: Path, *, is_requeued: bool
) -> None:
    """The signal comes while Ray's machines join, before the job has a handler, or while the run trains."""
    wait = f"kill -{name} $PPID; while :; do sleep 0.05; done"
    train = wait if stage == "start" else f"trap 'exit 130' TERM; {wait}"
    python = (
        'case "$1" in -c) echo token;; -) '
        f"{wait if stage == 'join' else 'exit 0'};; *) {train};; esac"
    )
    commands = {
        ".venv/bin/python": python,
        "bin/scontrol": f'case "$1" in requeue) touch {tmp_path}/requeued;; *) echo node1;; esac',
        "bin/srun": "exit 0",
        "bin/scancel": "exit 0",
    }
    for path, lines in commands.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / path).chmod(0o755)
    variables = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "1"}
    result = subprocess.run(
        ["bash", str(CLUSTERS / "slurm.sbatch"), "recipe.yaml"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **variables},
        check=False,
        timeout=60,
    )
    assert result.returncode == 130
    assert (tmp_path / "requeued").exists() == is_requeued


def test_pods_with_infiniband_may_lock_memory_and_have_shared_memory(
    job: dict[str, Any],
) -> None:
    pod = _cluster(job)["workerGroupSpecs"][0]["template"]["spec"]
    container = pod["containers"][0]
    assert "IPC_LOCK" in container["securityContext"]["capabilities"]["add"]
    (shm,) = [
        mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"
    ]
    assert {volume["name"]: volume for volume in pod["volumes"]}[shm]["emptyDir"][
        "medium"
    ] == "Memory"


def test_served_application_has_only_keys_that_serve_knows() -> None:
    """Ray Serve itself silently ignores a misspelled key."""
    service = _load_resource(CLUSTERS / "kuberay-rayservice.yaml")
    tree = yaml.safe_load(service["spec"]["serveConfigV2"])
    known = ServeDeploySchema.model_validate(tree).model_dump(exclude_unset=True)
    assert known == tree


def test_served_application_accepts_its_arguments() -> None:
    service = _load_resource(CLUSTERS / "kuberay-rayservice.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    arguments = ServingConfig.model_validate(application["args"])
    module, _, function = application["import_path"].partition(":")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    assert f"def {function}(config: ServingConfig)" in source
    (group,) = _cluster(service)["workerGroupSpecs"]
    assert group["rayStartParams"]["num-gpus"] == str(arguments.gpus)


def test_slurm_script_is_valid_bash_and_its_example_loads() -> None:
    script = CLUSTERS / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    example = re.search(
        r"sbatch clusters/slurm\.sbatch((?:[^\n]*\\\n#)*[^\n]*)", script.read_text()
    )
    assert example is not None
    recipe = _load_recipe("jobs/train.py " + example[1].replace("\\\n#", " "))
    directives = dict(re.findall(r"#SBATCH --([\w-]+)=(\d+)", script.read_text()))
    assert recipe.parallel.num_workers == int(directives["nodes"]) * int(
        directives["gpus-per-node"]
    )


@pytest.mark.parametrize("name", ["Dockerfile", "kuberay-rayjob.yaml", "kuberay-rayservice.yaml"])
def test_file_begins_by_saying_that_it_was_never_run(name: str) -> None:
    top = (CLUSTERS / name).read_text(encoding="utf-8").splitlines()[:3]
    assert re.search(r"Never (applied|built)", " ".join(top))


def _load_recipe(command: str) -> Recipe:
    """Load the recipe of `... jobs/train.py RECIPE --set KEY=VALUE ...` with its overrides."""
    words = shlex.split(command)
    recipe, *rest = words[words.index("jobs/train.py") + 1 :]
    assert rest[0::2] == ["--set"] * len(rest[1::2])
    return load(ROOT / recipe, rest[1::2], Recipe)
