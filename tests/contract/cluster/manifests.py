"""The files of `cluster/`, read once: what the tests of this folder look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
SERVICE = KUBERAY / "service" / "rayservice.yaml"
RAY_CLUSTER = KUBERAY / "cluster" / "raycluster.yaml"
JOB = KUBERAY / "job" / "rayjob.yaml"


@dataclass(frozen=True, slots=True)
class Manifest:
    """One document of a Kubernetes file."""

    path: Path
    tree: dict[str, Any]

    @property
    def kind(self) -> str:
        """Its kind, such as RayService."""
        return str(self.tree["kind"])

    @property
    def label(self) -> str:
        """What a test is called by."""
        return f"{self.path.relative_to(CLUSTER)}:{self.kind}"


def documents(path: Path) -> list[Any]:
    """The documents of a YAML file."""
    return [tree for tree in yaml.safe_load_all(path.read_text(encoding="utf-8")) if tree is not None]


def one(path: Path) -> dict[str, Any]:
    """The only document of a YAML file."""
    (tree,) = documents(path)
    assert isinstance(tree, dict)
    return tree


def manifests() -> list[Manifest]:
    """Every Kubernetes object of `cluster/`, those that kustomize reads for itself left out."""
    found = [Manifest(path, tree) for path in sorted(CLUSTER.rglob("*.yaml")) for tree in documents(path)]
    return [
        item for item in found if "apiVersion" in item.tree and "kind" in item.tree and item.path.name != "kustomization.yaml"
    ]


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a tree, itself included."""
    if isinstance(value, dict):
        yield value
        for child in value.values():
            yield from walk(child)
    elif isinstance(value, list):
        for child in value:
            yield from walk(child)


def containers(tree: Any) -> list[dict[str, Any]]:
    """Every container of every pod in a tree."""
    return [item for part in walk(tree) for item in part.get("containers", []) if isinstance(item, dict)]


def pods(tree: Any) -> list[dict[str, Any]]:
    """Every pod template in a tree."""
    return [part for part in walk(tree) if "spec" in part and isinstance(part["spec"], dict) and "containers" in part["spec"]]
