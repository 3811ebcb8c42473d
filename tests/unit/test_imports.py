"""The import rules of the package: one way, heavy packages at home, nothing heavy by accident."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dmoa

ROOT = Path(dmoa.__file__).parent
HEAVY = ("torch", "ray", "vllm", "transformers", "wandb")

# Layers from the bottom up; a module may import from its own layer and from those below it.
LAYERS: list[tuple[str, ...]] = [
    ("types", "errors", "explain", "yaml_tree", "redaction", "protocols"),
    ("config", "engine_options", "scaling_options", "sandbox", "isolation"),
    ("core",),
    (
        "agents",
        "policies",
        "orchestrator",
        "asking",
        "cascade",
        "routing",
        "checkpoint",
        "reply",
        "trace",
        "replay",
        "swarm",
        "tracking",
        "waking",
    ),
    ("dataflow",),
    ("serving", "training", "evaluation", "bench"),
    ("cli", "__main__"),
]
SEPARATE = ("serving", "training", "evaluation")
HOMES = {
    "ray": ("dataflow", "serving", "training", "evaluation", "cli", "bench"),
    "transformers": ("agents", "training"),
    "sentence_transformers": ("agents",),
    "peft": ("agents", "training"),
    "vllm": ("serving", "agents", "bench"),
    "wandb": ("tracking",),
    "datasets": ("evaluation",),
    "jinja2": ("evaluation",),
    "matplotlib": ("evaluation",),
    "fastapi": ("serving",),
    "typer": ("cli",),
    "math_verify": ("evaluation",),
    "rich": ("cli",),
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def layer(name: str) -> int:
    for number, names in enumerate(LAYERS):
        if name in names:
            return number
    raise AssertionError(f"{name} is in no layer: add it to LAYERS")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    here = part(path)
    if here == "__init__":
        return
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] != "dmoa" or len(pieces) < 2 or pieces[1].startswith("_"):
            continue
        there = pieces[1]
        assert layer(there) <= layer(here), f"{path.name} imports {name}, which lies above it"
        if here in SEPARATE and there in SEPARATE:
            assert here == there, f"{here} and {there} must not import each other: {path.name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_stay_at_home(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        if top in HOMES:
            assert part(path) in HOMES[top], f"{path.relative_to(ROOT)} imports {top}; its home is {', '.join(HOMES[top])}"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_package_and_config_load_nothing_heavy() -> None:
    assert loaded_by("import dmoa, dmoa.config") == set()


def test_orchestrator_loads_torch_at_most() -> None:
    assert loaded_by("import dmoa.orchestrator") <= {"torch"}


def test_the_ingress_side_never_loads_torch() -> None:
    assert loaded_by("import dmoa.swarm, dmoa.trace, dmoa.serving.http, dmoa.serving.router_client") <= {"ray"}


def test_a_replica_that_only_speaks_to_endpoints_stays_light() -> None:
    assert loaded_by("import dmoa.engines.openai, dmoa.agents.pool") == set()


def test_core_is_torch_and_numpy_only() -> None:
    allowed = {"torch", "numpy", "dmoa"} | set(sys.stdlib_module_names)
    for path in sorted((ROOT / "core").glob("*.py")):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path.name


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 700
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
