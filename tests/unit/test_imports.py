"""The import rules of the package: one way, no circles, heavy packages at home, nothing heavy by accident; and its sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dmoa

ROOT = Path(dmoa.__file__).parent
JOBS = ROOT.parent / "jobs"
HEAVY = ("torch", "ray", "vllm", "transformers", "wandb")

# Floors from the bottom up; a module may import from its own floor and from those below it.
FLOORS: list[tuple[str, ...]] = [
    ("types", "errors", "protocols"),
    ("validation", "provenance", "loopback", "yaml_tree", "plugins", "flat"),
    ("config", "engine_options"),
    ("core", "sandbox"),
    ("checkpoint", "routing", "trace", "tracking", "storage"),
    ("replay",),
    ("engines", "policies"),
    ("agents",),
    ("step_calls", "recovery", "dispatch"),
    ("orchestrator",),
    ("swarm",),
    ("dataflow",),
    ("serving", "training", "evaluation"),
    ("workflows", "bench", "testing"),
    ("cli",),
]
SEPARATE = ("serving", "training", "evaluation")
RAY_HOMES = ("dataflow", "serving", "training", "evaluation", "workflows", "cli", "bench")
HOMES: dict[str, tuple[str, ...]] = {
    "ray": RAY_HOMES,
    "transformers": ("engines", "agents.embedder", "training"),
    "sentence_transformers": ("agents.embedder",),
    "peft": ("engines.transformers", "training"),
    "vllm": ("engines.vllm", "serving.vllm_replica", "bench"),
    "wandb": ("tracking",),
    "datasets": ("evaluation",),
    "jinja2": ("evaluation",),
    "matplotlib": ("evaluation",),
    "fastapi": ("serving",),
    "typer": ("workflows", "cli"),
    "math_verify": ("evaluation",),
    "rich": ("workflows", "cli"),
}
MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 60
SMALL_FILE_LINES = 60
LOADED_BY_NAME = ("dmoa.__main__", "dmoa.serving.deploy", "dmoa.bench.vllm_timed")
"""Small files that no module imports: Python, Serve configs and vLLM's processes name them."""


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a module, such as `dmoa.core.gate`."""
    return ".".join(("dmoa", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


PATHS = {name_of(path): path for path in modules()}


def part(path: Path) -> str:
    """The room (folder or file) under `dmoa/` that a module is in."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> frozenset[str]:
    """Everything a file imports, wherever in the file: modules, and names as `module.name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of dmoa that it imports, without the package files that lead to them."""
    arrows: dict[str, set[str]] = {}
    for name, path in PATHS.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in PATHS:
                targets.update(full if (full := f"{node.module}.{alias.name}") in PATHS else node.module for alias in node.names)
            elif isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names if alias.name in PATHS)
        arrows[name] = targets - {name}
    return arrows


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other: what is left when modules without open imports are taken away in turns."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while True:
        done = {name for name, targets in left.items() if not targets & left.keys()}
        done |= {name for name in left if not any(name in targets for other, targets in left.items() if other != name)}
        if not done:
            return [sorted(left)] if left else []
        left = {name: targets - done for name, targets in left.items() if name not in done}


def floor(name: str) -> int:
    for number, names in enumerate(FLOORS):
        if name in names:
            return number
    raise AssertionError(f"{name} is on no floor: add it to FLOORS")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    here = part(path)
    if here in ("__init__", "__main__"):
        return
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] != "dmoa" or len(pieces) < 2 or pieces[1].startswith("_"):
            continue
        there = pieces[1]
        assert floor(there) <= floor(here), f"{path.name} imports {name}, which lies above it"
        if here in SEPARATE and there in SEPARATE:
            assert here == there, f"{here} and {there} must not import each other: {path.name}"


def test_no_circle_between_files() -> None:
    assert circles(graph()) == []


def test_a_circle_would_be_noticed() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": set()}) == [["b", "c"]]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_stay_at_home(path: Path) -> None:
    own = name_of(path).removeprefix("dmoa.")
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        if homes is not None:
            assert any(own == home or own.startswith(f"{home}.") for home in homes), f"{own} imports {name}; its home is {homes}"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.contract
def test_package_and_config_load_nothing_heavy() -> None:
    assert loaded_by("import dmoa, dmoa.config") == set()


@pytest.mark.contract
def test_orchestrator_loads_torch_at_most() -> None:
    assert loaded_by("import dmoa.orchestrator") <= {"torch"}


@pytest.mark.contract
def test_the_ingress_side_never_loads_torch() -> None:
    assert loaded_by("import dmoa.swarm, dmoa.trace, dmoa.serving.http.routes, dmoa.serving.router.client") <= {"ray"}


@pytest.mark.contract
def test_a_replica_that_only_speaks_to_endpoints_stays_light() -> None:
    assert loaded_by("import dmoa.engines.openai, dmoa.agents.pool") == set()


def test_core_is_torch_and_numpy_only() -> None:
    allowed = {"torch", "numpy", "dmoa"} | set(sys.stdlib_module_names)
    for path in sorted((ROOT / "core").glob("*.py")):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path.name


@pytest.mark.parametrize("path", [*modules(), *sorted(JOBS.rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT.parent)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


def test_small_files_have_two_importers() -> None:
    arrows = graph()
    alone = []
    for name, path in PATHS.items():
        is_small = len(path.read_text(encoding="utf-8").splitlines()) < SMALL_FILE_LINES and path.name != "__init__.py"
        if is_small and name not in LOADED_BY_NAME and sum(name in targets for targets in arrows.values()) < 2:
            alone.append(name)
    assert alone == []
