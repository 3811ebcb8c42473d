"""Dockerfiles copy what exists; dashboards and scrape settings name metrics that exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import ray

from dmoa.serving.launch import PROXY_FLAGS, SERVE_FLAGS
from tests.contract.cluster.manifests import CLUSTER, ROOT, one

DOCKERFILES = sorted(path for path in CLUSTER.glob("Dockerfile.*"))
GRAFANA = CLUSTER / "monitoring" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "dmoa.json"
HISTOGRAM = ("_bucket", "_sum", "_count")


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_copies_only_what_exists_and_what_the_ignore_file_lets_through(path: Path) -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    sources = [source for name, rest in instructions(path) if name == "COPY" for source in shlex.split(rest)[:-1]]
    assert {"dmoa", "pyproject.toml", "README.md", "LICENSE", "jobs", "serve_app.py"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), f"{path.name} copies {source}"
        assert source in let_through, f".dockerignore keeps {source} out"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_runs_as_a_user_with_the_serve_flags_and_names_no_package_index(path: Path) -> None:
    lines = instructions(path)
    env = dict(item.split("=", 1) for name, rest in lines if name == "ENV" for item in shlex.split(rest))
    flags = SERVE_FLAGS | PROXY_FLAGS
    assert {name: env[name] for name in flags} == flags
    assert [rest for name, rest in lines if name == "USER"] == ["1000"]
    assert next(rest for name, rest in lines if name == "ARG").split("=")[1].startswith("registry.example.com/")
    assert not re.search(r"://|--(extra-)?index", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_torch_comes_first(path: Path) -> None:
    installs = [rest for name, rest in instructions(path) if name == "RUN" and "pip install" in rest]
    assert "torch==" in installs[0]
    assert len(installs) == 2


def test_there_is_one_image_without_and_one_with_gpus() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda"]


@cache
def exported() -> set[str]:
    """Names under which Prometheus sees the metrics that the package defines: by Ray's exporter and by the router's account."""
    names: set[str] = set()
    for path in (ROOT / "dmoa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            kind = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if kind not in ("Counter", "Gauge", "Histogram") or not str(node.args[0].value).startswith("dmoa_"):
                continue
            name = f"ray_{node.args[0].value}" if isinstance(node.func, ast.Attribute) else str(node.args[0].value)
            names |= {name + end for end in {"Counter": ("_total",), "Gauge": ("",), "Histogram": HISTOGRAM}[kind]}
    return names


@cache
def ray_metrics() -> set[str]:
    """Names that Ray's own dashboards query."""
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return {name for path in folder.glob("*.py") for name in re.findall(r"ray_serve_\w+", path.read_text(encoding="utf-8"))}


def queries() -> list[str]:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_exported_names_are_those_that_the_readme_promises() -> None:
    assert {"ray_dmoa_queries_total", "ray_dmoa_query_latency_ms_bucket", "dmoa_router_up"} <= exported()


@pytest.mark.parametrize("query", queries())
def test_dashboard_asks_for_metrics_that_exist(query: str) -> None:
    named = set(re.findall(r"\b(?:ray_)?(?:dmoa|serve)_\w+", query))
    assert named
    assert named <= exported() | ray_metrics()
    assert query.count("(") == query.count(")")
    assert query.count("{") == query.count("}")


def test_dashboard_shows_every_metric_of_dmoa() -> None:
    asked = " ".join(queries())
    stems = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in exported()}
    assert {stem for stem in stems if stem not in asked} == set()


def test_figures_are_those_of_now_and_the_gate_is_shown_by_its_version() -> None:
    panels = [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if panel["type"] == "stat"]
    assert all(target["instant"] for panel in panels for target in panel["targets"])  # else a gate of hours ago stands there too
    (gate,) = [panel for panel in panels if panel["title"] == "Gate"]
    assert gate["options"]["textMode"] == "name"  # its value is 1


def test_panels_lie_side_by_side_without_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_provisioning_and_scraping_are_of_the_form_that_their_programs_read() -> None:
    (source,) = one(GRAFANA / "datasources" / "prometheus.yaml")["datasources"]
    assert source["type"] == "prometheus"
    (provider,) = one(GRAFANA / "dashboards" / "dmoa.yaml")["providers"]
    assert provider["type"] == "file"
    jobs = {job["job_name"]: job for job in one(CLUSTER / "monitoring" / "prometheus.yaml")["scrape_configs"]}
    assert jobs.keys() == {"ray", "dmoa"}
    assert jobs["ray"]["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    assert jobs["dmoa"]["metrics_path"] == "/metrics"
