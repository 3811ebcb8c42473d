"""Kubernetes manifests: valid by KubeRay's schemas, in step with each other and with dmoa, and without a secret in them."""

from __future__ import annotations

import gzip
import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from dmoa.serving.launch import PROXY_FLAGS, SERVE_FLAGS
from tests.contract.cluster.manifests import (
    CLUSTER,
    KUBERAY,
    RAY_CLUSTER,
    ROOT,
    SERVICE,
    Manifest,
    containers,
    manifests,
    one,
    pods,
    walk,
)

PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
CUSTOM = [item for item in manifests() if item.kind in PLURALS]
REGISTRY = "registry.example.com/"
PART_OF = {"app.kubernetes.io/part-of": "dmoa"}


@cache
def schema(kind: str) -> dict[str, Any]:
    """The schema of a kind, as strict as the API server with field validation: unknown fields are errors."""
    text = gzip.decompress((Path(__file__).parent / "kuberay" / f"ray.io_{PLURALS[kind]}.yaml.gz").read_bytes()).decode()
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [item for item in crd["spec"]["versions"] if item["name"] == "v1"]
    tree: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    for part in walk(tree):
        if isinstance(part.get("properties"), dict) and part.get("type") == "object":
            part.setdefault("additionalProperties", bool(part.get("x-kubernetes-preserve-unknown-fields")))
    tree["properties"]["metadata"]["additionalProperties"] = True  # the API server's own
    return tree


def problems(kind: str, tree: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(schema(kind)).iter_errors(tree)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]


def test_each_kind_of_kuberay_is_there() -> None:
    assert sorted(item.kind for item in CUSTOM) == sorted(PLURALS)


@pytest.mark.parametrize("item", CUSTOM, ids=lambda item: item.label)
def test_valid_by_its_schema(item: Manifest) -> None:
    assert problems(item.kind, item.tree) == []


@pytest.mark.parametrize("item", CUSTOM, ids=lambda item: item.label)
def test_schema_refuses_a_misspelt_field_and_a_wrong_type(item: Manifest) -> None:
    text = json.dumps(item.tree)
    assert problems(item.kind, json.loads(text.replace('"rayStartParams"', '"rayStartParam"')))
    assert problems(item.kind, json.loads(text.replace('"containerPort": 8080', '"containerPort": "metrics"')))


def test_service_runs_the_cluster_that_stands_alone() -> None:
    assert one(SERVICE)["spec"]["rayClusterConfig"] == one(RAY_CLUSTER)["spec"]


def test_ray_version_is_the_pinned_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (pinned,) = re.findall(r"ray\[.*\]==(\S+)", "\n".join(project["dependencies"]))
    versions = [part["rayVersion"] for item in CUSTOM for part in walk(item.tree) if "rayVersion" in part]
    assert versions == [pinned] * 3


@pytest.mark.parametrize("item", CUSTOM, ids=lambda item: item.label)
def test_ray_asks_for_a_token(item: Manifest) -> None:
    (spec,) = [part for part in walk(item.tree) if "headGroupSpec" in part]
    assert spec["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("path", [SERVICE, RAY_CLUSTER], ids=lambda path: path.name)
def test_every_process_has_the_flags_and_the_keys(path: Path) -> None:
    assert len(containers(one(path))) == 3
    for container in containers(one(path)):
        env = {item["name"]: item for item in container["env"]}
        flags = SERVE_FLAGS | PROXY_FLAGS
        assert {name: env[name]["value"] for name in flags} == flags
        assert env["DMOA_API_KEYS"]["valueFrom"]["secretKeyRef"] == {"name": "dmoa-api-keys", "key": "keys"}  # not optional


def test_the_head_survives_with_redis() -> None:
    (service,) = [item.tree for item in manifests() if item.kind == "Service" and item.tree["metadata"]["name"] == "dmoa-redis"]
    options = one(RAY_CLUSTER)["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"redis://dmoa-redis:{service['spec']['ports'][0]['port']}"
    (redis,) = [item for item in manifests() if item.kind == "StatefulSet"]
    (password,) = containers(redis.tree)[0]["env"]
    assert password["valueFrom"]["secretKeyRef"] == options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert service["spec"]["selector"].items() <= redis.tree["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("item", manifests(), ids=lambda item: item.label)
def test_secrets_are_referred_to_and_never_held(item: Manifest) -> None:
    assert item.kind != "Secret"
    for part in walk(item.tree):
        if re.search(r"KEY|TOKEN|PASSWORD|SECRET", str(part.get("name", ""))):
            assert "value" not in part
            assert set(part["valueFrom"]["secretKeyRef"]) <= {"name", "key", "optional"}
        for field in ("redisPassword", "redisUsername", "credentials"):
            assert "value" not in part.get(field, {})


@pytest.mark.parametrize("item", manifests(), ids=lambda item: item.label)
def test_pods_are_confined_and_bounded(item: Manifest) -> None:
    for pod in pods(item.tree):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "automountServiceAccountToken" in pod["spec"]
    beside = [part["autoscalerOptions"] for part in walk(item.tree) if "autoscalerOptions" in part]
    for container in (*containers(item.tree), *beside):
        assert container["securityContext"] | {"readOnlyRootFilesystem": True} == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    for container in containers(item.tree):
        assert container["image"].startswith(REGISTRY)


def test_one_place_names_every_image() -> None:
    listed = {
        item["name"]: f"{item['name']}:{item['newTag']}" for item in one(KUBERAY / "images" / "kustomization.yaml")["images"]
    }
    used = {container["image"] for item in manifests() for container in containers(item.tree)}
    assert used == set(listed.values())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert {image.rpartition(":")[2] for image in used if "/dmoa-" in image} == {version}


@pytest.mark.parametrize("path", sorted(KUBERAY.rglob("kustomization.yaml")), ids=lambda path: path.parent.name)
def test_kustomizations_name_what_is_there(path: Path) -> None:
    tree = one(path)
    named = [*tree.get("resources", []), *tree.get("components", [])]
    assert named or tree["kind"] == "Component"
    for name in named:
        target = path.parent / name
        assert target.is_file() or (target / "kustomization.yaml").is_file(), f"{path}: {name}"


def test_every_manifest_of_a_folder_is_in_its_kustomization() -> None:
    for folder in ("base", "service", "cluster", "job"):
        there = {path.name for path in (KUBERAY / folder).glob("*.yaml")} - {"kustomization.yaml"}
        assert there == {name for name in one(KUBERAY / folder / "kustomization.yaml")["resources"] if name.endswith(".yaml")}


def test_the_switch_turns_the_second_cluster_off() -> None:
    (patch,) = one(KUBERAY / "service-in-place" / "kustomization.yaml")["patches"]
    (change,) = yaml.safe_load(patch["patch"])
    service = one(SERVICE)
    assert {"kind": service["kind"], "name": service["metadata"]["name"]} == patch["target"]
    assert service["spec"]["upgradeStrategy"]["type"] == "NewCluster"
    assert change == {"op": "replace", "path": "/spec/upgradeStrategy/type", "value": "None"}


def test_the_old_cluster_outlives_its_queries() -> None:
    spec = one(SERVICE)["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert spec["rayClusterDeletionDelaySeconds"] > application["args"]["limits"]["deadline_s"]


def ports(policy: dict[str, Any], labels: dict[str, str]) -> set[int] | None:
    """Ports that a policy opens to pods with some labels in its own namespace; None: all of them."""
    for rule in policy["spec"]["ingress"]:
        for source in rule["from"]:
            selector = source.get("podSelector", {})
            expressions = selector.get("matchExpressions", [])
            fits = selector.get("matchLabels", {}).items() <= labels.items() and all(
                labels.get(item["key"]) in item["values"] for item in expressions
            )
            if fits and "namespaceSelector" not in source:
                return {port["port"] for port in rule["ports"]} if "ports" in rule else None
    return set()


def test_network_lets_in_who_must_and_nobody_else() -> None:
    policies = {item.tree["metadata"]["name"]: item.tree for item in manifests() if item.kind == "NetworkPolicy"}
    for item in CUSTOM:
        for pod in pods(item.tree):
            assert PART_OF.items() <= pod["metadata"]["labels"].items()
            assert ports(policies["dmoa-ray"], pod["metadata"]["labels"]) is None
    assert ports(policies["dmoa-ray"], {"app": "other"}) == set()
    assert ports(policies["dmoa-redis"], {**PART_OF, "ray.io/node-type": "head"}) == {6379}
    assert ports(policies["dmoa-redis"], {**PART_OF, "ray.io/node-type": "worker"}) == set()
    for policy in policies.values():
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert all(source for rule in policy["spec"]["ingress"] for source in rule["from"])


def test_network_opens_the_ports_that_are_served_and_scraped() -> None:
    (policy,) = [item.tree for item in manifests() if item.tree["metadata"]["name"] == "dmoa-ray"]
    opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    (head, *_) = containers(one(RAY_CLUSTER))
    declared = {port["name"]: port["containerPort"] for port in head["ports"]}
    (monitor,) = [item.tree for item in manifests() if item.kind == "PodMonitor"]
    scraped = {declared[endpoint["port"]] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert opened == scraped | {declared["dashboard"], declared["serve"]}


def test_names_are_looked_up_also_where_nodes_keep_a_cache() -> None:
    (policy,) = [item.tree for item in manifests() if item.tree["metadata"]["name"] == "dmoa-ray"]
    (rule,) = [rule for rule in policy["spec"]["egress"] if {"protocol": "UDP", "port": 53} in rule.get("ports", [])]
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in rule["to"]


def test_ray_up_shows_prometheus_whom_to_ask() -> None:
    (job, _) = one(CLUSTER / "monitoring" / "prometheus.yaml")["scrape_configs"]
    folder = str(Path(job["file_sd_configs"][0]["files"][0]).parent)
    tree = one(CLUSTER / "ray-up.yaml")
    assert f"-v {folder}:{folder}" in tree["docker"]["run_options"]
    assert tree["initialization_commands"] == [f"mkdir -p -m 777 {folder}"]


def test_ray_up_is_valid_and_holds_no_secret() -> None:
    tree = one(CLUSTER / "ray-up.yaml")
    rules = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(tree, rules)
    types = tree["available_node_types"]
    assert tree["head_node_type"] in types
    assert tree["docker"]["image"].startswith(REGISTRY)
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = tree[name][-1]
        assert "RAY_AUTH_MODE=token" in start
        assert "0.0.0.0" not in start
        (env_file,) = re.findall(r"set -a; \. (\S+);", start)
        assert env_file in tree["file_mounts"]
    assert not re.search(r"(KEY|TOKEN|SECRET)\w*=(?!\.\.\.)[\w\"']", (CLUSTER / "ray-up.yaml").read_text(encoding="utf-8"))
