"""The cluster files against Ray's own schema, KubeRay's fields, and each other: one version of everything everywhere.

KubeRay's own schema is checked too where $KUBERAY_CRDS names a folder with ray.io_rayclusters.yaml and
ray.io_rayjobs.yaml (ray-operator/config/crd/bases of its repository); the fields that these files use are spelled out
here in any case.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
MANIFESTS = ("settings.yaml", "kuberay-cluster.yaml", "kuberay-job.yaml", "mlflow.yaml")
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CONSTRAINTS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))

text, positive = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
number = {"type": "integer", "minimum": 0}


def fields(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """A table with exactly these fields."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


def either(*values: Any) -> dict[str, Any]:
    return {"enum": list(values)}


quantities = {
    "type": "object",
    "properties": {
        "cpu": {"type": "string", "pattern": r"^[1-9]\d*m?$"},
        "memory": {"type": "string", "pattern": r"^[1-9]\d*[MG]i$"},
        "nvidia.com/gpu": either("1"),
    },
    "required": ["cpu", "memory"],
    "additionalProperties": False,
}
resources = fields({"requests": quantities, "limits": quantities})
metadata = fields({"name": {"type": "string", "pattern": "^[a-z][a-z-]*$"}})
reference = fields({"name": text})
environment = several(
    {
        "oneOf": [
            fields({"name": text, "value": text}),
            fields({"name": text, "valueFrom": fields({"secretKeyRef": fields({"name": text, "key": text})})}),
            fields({"name": text, "valueFrom": fields({"configMapKeyRef": fields({"name": text, "key": text})})}),
        ]
    }
)
ports = several(fields({"containerPort": positive, "name": text}))
container = fields(
    {"name": text, "image": text, "resources": resources},
    envFrom=several(fields({"configMapRef": reference})),
    env=environment,
    ports=ports,
    command=several(text),
    args=several(text),
    readinessProbe=fields({"tcpSocket": fields({"port": text})}, initialDelaySeconds=positive),
)
pod = fields(
    {
        "serviceAccountName": either("tipl"),
        "securityContext": fields({"runAsNonRoot": either(True), "runAsUser": either(1000)}, fsGroup=either(1000)),
        "containers": several(container),
    },
    terminationGracePeriodSeconds=positive,
    tolerations=several(fields({"key": text, "operator": either("Exists"), "effect": either("NoSchedule")})),
)
template = fields({"spec": pod}, metadata=fields({"labels": {"type": "object"}}))
start_parameters = {"type": "object", "additionalProperties": {"type": "string"}}
ray_cluster = fields(
    {
        "rayVersion": text,
        "authOptions": fields({"mode": either("token"), "secretName": either("tipl-token")}),
        "enableInTreeAutoscaling": either(True),
        "autoscalerOptions": fields(
            {
                "version": either("v2"),
                "upscalingMode": either("Default", "Aggressive", "Conservative"),
                "idleTimeoutSeconds": positive,
                "resources": resources,
            }
        ),
        "headGroupSpec": fields(
            {"serviceType": either("ClusterIP"), "rayStartParams": start_parameters, "template": template}
        ),
        "workerGroupSpecs": several(
            fields(
                {
                    "groupName": text,
                    "replicas": number,
                    "minReplicas": number,
                    "maxReplicas": positive,
                    "rayStartParams": start_parameters,
                    "template": template,
                }
            )
        ),
    }
)
ray_job = fields(
    {
        "clusterSelector": fields({"ray.io/cluster": either("tipl")}),
        "submissionMode": either("HTTPMode"),
        "entrypoint": text,
    }
)
labels = fields({"app": either("tipl-mlflow")})
KINDS = {
    ("ray.io/v1", "RayCluster"): {"metadata": metadata, "spec": ray_cluster},
    ("ray.io/v1", "RayJob"): {"metadata": fields({"generateName": text}), "spec": ray_job},
    ("v1", "ConfigMap"): {"metadata": metadata, "data": {"type": "object", "additionalProperties": text}},
    ("v1", "ServiceAccount"): {"metadata": fields({"name": either("tipl"), "annotations": {"type": "object"}})},
    ("v1", "Service"): {
        "metadata": metadata,
        "spec": fields(
            {
                "type": either("ClusterIP"),
                "selector": labels,
                "ports": several(fields({"name": text, "port": positive, "targetPort": text})),
            }
        ),
    },
    ("apps/v1", "Deployment"): {
        "metadata": metadata,
        "spec": fields({"replicas": either(1), "selector": fields({"matchLabels": labels}), "template": template}),
    },
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def check(document: dict[str, Any]) -> None:
    kind = KINDS[document["apiVersion"], document["kind"]]
    jsonschema.validate(document, fields({"apiVersion": text, "kind": text, **kind}))


def cluster() -> dict[str, Any]:
    (document,) = documents("kuberay-cluster.yaml")
    return document["spec"]


def containers(part: Any) -> Iterator[dict[str, Any]]:
    """Every container anywhere in a document."""
    if isinstance(part, dict):
        yield from part.get("containers", [])
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from containers(inner)


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_manifest_has_the_documented_fields_and_no_others(name: str) -> None:
    found = documents(name)
    assert found
    for document in found:
        check(document)


def test_the_check_finds_a_misspelt_field_and_a_number_in_place_of_a_string() -> None:
    (document,) = documents("kuberay-cluster.yaml")
    document["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        check(document)
    (document,) = documents("kuberay-cluster.yaml")
    document["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        check(document)


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's schema that refuses what it does not name, as the API server would drop it without a word."""
    inner = {key: closed(value) if isinstance(value, dict) else value for key, value in schema.items()}
    if "properties" in inner and "additionalProperties" not in inner:
        inner["additionalProperties"] = False
    return inner


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder with KubeRay's schemas")
@pytest.mark.parametrize(("name", "plural"), [("kuberay-cluster.yaml", "rayclusters"), ("kuberay-job.yaml", "rayjobs")])
def test_kuberays_own_schema_takes_them(name: str, plural: str) -> None:
    crd = yaml.safe_load(Path(os.environ["KUBERAY_CRDS"], f"ray.io_{plural}.yaml").read_text())
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    for document in documents(name):
        jsonschema.validate(document, schema)


def test_rays_own_schema_takes_the_aws_file() -> None:
    schema = json.loads(Path(ray.__path__[0], "autoscaler", "ray-schema.json").read_text())
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError, match="max_worker'"):
        jsonschema.validate({**config, "max_worker": 3}, schema)


def test_the_aws_file_has_a_head_without_work_spot_workers_that_collect_and_gpu_workers_that_train() -> None:
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["collect"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["train"]["resources"]["GPU"] == 1
    assert types["collect"]["min_workers"] == types["train"]["min_workers"] == 0
    assert types["collect"]["max_workers"] + types["train"]["max_workers"] == config["max_workers"]
    assert config["idle_timeout_minutes"] <= 10
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert any(option == "--env RAY_AUTH_MODE=token" for option in config["docker"]["run_options"])


def test_one_version_of_ray_in_images_manifests_constraints_and_installation() -> None:
    version = CONSTRAINTS["ray"]
    assert ray.__version__ == version
    assert cluster()["rayVersion"] == version
    everything = "".join(path.read_text() for path in [*CLUSTER.glob("*.*"), ROOT / "Dockerfile"])
    images = re.findall(r"registry\.example\.com/tipl_ray:(\S+)", everything)
    assert len(images) >= 8
    assert set(images) == {f"ray-{version}", f"ray-{version}-gpu"}
    assert f"ray[default,train,tune]>={version.rpartition('.')[0]}," in (ROOT / "pyproject.toml").read_text()


def test_the_image_has_the_python_that_the_project_asks_for_and_the_constrained_versions() -> None:
    (image,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert image.startswith(f"python:{sys.version_info.major}.{sys.version_info.minor}-")
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert all("constraints.txt" in line for line in installs)
    assert "USER 1000" in DOCKERFILE
    assert {"torch", "mlflow", "boto3", "psycopg2-binary"} <= set(CONSTRAINTS)


def test_workers_and_head_share_settings_account_and_image_and_gpus_are_asked_for_where_training_runs() -> None:
    groups = {group["groupName"]: group["template"]["spec"] for group in cluster()["workerGroupSpecs"]}
    for one in containers(cluster()):
        assert one["envFrom"] == [{"configMapRef": {"name": "tipl-settings"}}]
        assert one["resources"]["requests"] == one["resources"]["limits"]
    (collect,), (train,) = (groups[name]["containers"] for name in ("collect", "train"))
    assert "nvidia.com/gpu" not in collect["resources"]["limits"]
    assert train["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert train["image"].endswith("-gpu")


def test_a_node_that_is_to_go_has_time_to_reach_a_commit_before_it_is_killed() -> None:
    for group in cluster()["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        values = {one["name"]: one["value"] for one in spec["containers"][0]["env"]}
        assert 60 <= float(values["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < spec["terminationGracePeriodSeconds"]


def test_the_job_runs_files_that_the_image_has_on_the_settings_storage() -> None:
    (job,) = documents("kuberay-job.yaml")
    entrypoint = job["spec"]["entrypoint"].split()
    for word in entrypoint:
        if word.startswith("/home/tipl/tipl_ray/"):
            assert (ROOT / word.removeprefix("/home/tipl/tipl_ray/")).is_file(), word
    assert "COPY jobs jobs" in DOCKERFILE
    assert "WORKDIR /home/tipl/tipl_ray" in DOCKERFILE
    assert entrypoint[entrypoint.index("--storage") + 1] == "$TIPL_STORAGE"


def test_what_is_referred_to_is_defined_or_said_to_be_made_by_command() -> None:
    settings = {document["kind"]: document for document in documents("settings.yaml")}
    known = set(settings["ConfigMap"]["data"])
    assert {"TIPL_STORAGE", "MLFLOW_TRACKING_URI", "MLFLOW_ARTIFACTS", "AWS_REGION"} == known
    assert settings["ServiceAccount"]["metadata"]["name"] == "tipl"
    page = (CLUSTER / "README.md").read_text()
    deployment, service = documents("mlflow.yaml")
    assert settings["ConfigMap"]["data"]["MLFLOW_TRACKING_URI"] == (
        f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )
    for one in containers(deployment):
        for variable in one["env"]:
            source = variable["valueFrom"]
            if "configMapKeyRef" in source:
                assert source["configMapKeyRef"]["key"] in known
            else:
                assert f"secret generic {source['secretKeyRef']['name']}" in page
    assert "secret generic tipl-token" in page
    assert "kind: Secret" not in "".join((CLUSTER / name).read_text() for name in MANIFESTS)


def test_no_file_carries_a_password_or_a_token() -> None:
    for path in [*CLUSTER.glob("*.*"), ROOT / "Dockerfile"]:
        content = path.read_text()
        assert not re.search(r"(?i)(password|secret_access_key|auth_token)\s*[:=]\s*['\"]?[a-z0-9/+]{6,}", content), (
            path
        )
        assert not re.search(r"AKIA[0-9A-Z]{16}", content), path


def test_the_mlflow_server_takes_the_options_that_it_is_given() -> None:
    deployment, _ = documents("mlflow.yaml")
    (one,) = containers(deployment)
    (program, command), options = one["command"], [word.partition("=")[0] for word in one["args"]]
    result = subprocess.run(
        [sys.executable, "-m", program, command, "--help"], capture_output=True, text=True, timeout=200, check=True
    )
    assert [option for option in options if option not in result.stdout] == []


def test_a_linter_of_dockerfiles_is_quiet() -> None:
    program = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_spot_notice_drains_the_node_once_the_notice_is_there(tmp_path: Path) -> None:
    """With stand-ins for curl, which has no machine of AWS to ask, and for ray, which writes down how it is called."""
    (tmp_path / "curl").write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  *latest/api/token*) echo t ;;\n"
        f"  *instance-action*) echo asked >>{tmp_path}/asked; [ $(wc -l <{tmp_path}/asked) -gt 2 ] ;;\n"
        "esac\n"
    )
    (tmp_path / "ray").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/called\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("curl", "ray", "sleep"):
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", CLUSTER / "spot_notice.sh"], env=environment, timeout=60, check=True, capture_output=True)
    assert (tmp_path / "asked").read_text().count("asked") == 3
    assert (tmp_path / "called").read_text().startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
