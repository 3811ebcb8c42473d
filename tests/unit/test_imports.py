"""The import rules of the package: one way, no circles, heavy packages at home, nothing heavy by accident; and its sizes."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import dmoa

ROOT = Path(dmoa.__file__).parent
JOBS = ROOT.parent / "jobs"
SCRIPTS = (JOBS, ROOT.parent / "tests" / "accept")
"""What no other test imports."""
HEAVY = ("torch", "ray", "vllm", "transformers", "wandb")

# Floors from the bottom up; a module may import from its own floor and from those below it.
FLOORS: list[tuple[str, ...]] = [
    ("types", "errors", "protocols", "answer_form", "records"),
    ("validation", "provenance", "loopback", "reading", "yaml_tree", "plugins", "flat"),
    ("config", "engine_options"),
    ("core", "sandbox"),
    ("checkpoint", "routing", "trace", "tracking", "storage"),
    ("replay", "feedback"),
    ("engines", "policies"),
    ("agents",),
    ("step_calls", "recovery", "dispatch"),
    ("final_call",),
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
    "fastapi": ("serving", "bench.peer_servers"),
    "typer": ("workflows", "cli"),
    "math_verify": ("evaluation",),
    "rich": ("workflows", "cli"),
}
MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 60
SMALL_FILE_LINES = 60
MAX_FILES = 275
MEDIAN_LINES = (130, 250)
MAX_LINES = 67_700
"""Of dmoa/ and jobs/, with room for the features under way; lowered to the next full hundred above what is left."""
MAX_README_LINES = 180
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
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True, scope="module")
def _parsed() -> None:
    """Parse all files once, which is no test's own time."""
    for path in modules():
        imports(path)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@cache
def imports(path: Path) -> frozenset[str]:
    """Everything a file imports, wherever in the file: modules, and names as `module.name`."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
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
        for node in ast.walk(tree_of(path)):
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


def file_of(module: str, beside: Path) -> Path | None:
    """The file of a module of the repository, as scripts import it: by its whole name, or of their own folder or `jobs/study`."""
    tail = Path(*module.split("."))
    homes = (ROOT.parent,) if "." in module or module == "dmoa" else (beside, JOBS / "study")
    found = [home / name for home in homes for name in (tail.with_suffix(".py"), tail / "__init__.py") if (home / name).is_file()]
    return found[0] if found else None


def defined(tree: ast.Module) -> set[str]:
    """The names that a module has once it is imported."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def missing(tree: ast.Module, beside: Path) -> list[str]:
    """The names that a script imports from files of the repository which have no such name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and (path := file_of(node.module, beside)):
            there = defined(tree_of(path))
            found += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if alias.name not in there and file_of(f"{node.module}.{alias.name}", beside) is None
            ]
    return found


def test_scripts_that_no_test_runs_import_what_there_is() -> None:
    paths = [path for folder in SCRIPTS for path in sorted(folder.rglob("*.py"))]
    assert len(paths) > 40
    assert {path.name: names for path in paths if (names := missing(tree_of(path), path.parent))} == {}


def test_a_name_that_is_gone_would_be_noticed() -> None:
    code = "from study_replies import Replies, gone\nfrom dmoa.core import gate, lost\nfrom dmoa.core.gate import Gate, torch"
    assert missing(ast.parse(code), JOBS / "study") == ["study_replies.gone", "dmoa.core.lost"]


def test_imports_point_one_way() -> None:
    upward, across = [], []
    for path in modules():
        here = part(path)
        for name in imports(path) if here not in ("__init__", "__main__") else ():
            pieces = name.split(".")
            if pieces[0] == "dmoa" and len(pieces) > 1 and not pieces[1].startswith("_"):
                if floor(pieces[1]) > floor(here):
                    upward.append((name_of(path), name))
                if here in SEPARATE and pieces[1] in SEPARATE and here != pieces[1]:
                    across.append((name_of(path), name))
    assert upward == [], "no file imports from a floor above its own"
    assert across == [], f"{SEPARATE} must not import each other"


def test_no_circle_between_files() -> None:
    assert circles(graph()) == []


def test_a_circle_would_be_noticed() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": set()}) == [["b", "c"]]


def test_heavy_packages_stay_at_home() -> None:
    abroad = []
    for path in modules():
        own = name_of(path).removeprefix("dmoa.")
        for name in imports(path):
            homes = HOMES.get(name.split(".")[0], (own,))
            if not any(own == home or own.startswith(f"{home}.") for home in homes):
                abroad.append((own, name, homes))
    assert abroad == []


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


def test_files_and_functions_stay_small() -> None:
    sized = [*PATHS.items(), *((path.name, path) for path in sorted(JOBS.rglob("*.py")))]
    assert {name: lines(path) for name, path in sized if lines(path) > MAX_FILE_LINES} == {}
    long = {}
    for name, path in sized:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
                    long[f"{name}.{node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}


def lonely() -> list[str]:
    """The small files that one other file imports, or none."""
    num_importers = Counter(target for targets in graph().values() for target in targets)
    return [
        name
        for name, path in PATHS.items()
        if lines(path) < SMALL_FILE_LINES
        and path.name != "__init__.py"
        and name not in LOADED_BY_NAME
        and num_importers[name] < 2
    ]


def test_small_files_have_two_importers() -> None:
    assert lonely() == []


def test_the_house_stays_as_small_as_it_is() -> None:
    """Its counts stand in out/tests/counts.json."""
    sizes = [lines(path) for path in PATHS.values()]
    found = {
        "files": len(sizes),
        "median_lines": statistics.median(sizes),
        "small_files_with_one_importer": len(lonely()),
        "circles": len(circles(graph())),
        "lines": sum(sizes) + sum(map(lines, (ROOT.parent / "jobs").rglob("*.py"))),
        "readme_lines": lines(ROOT.parent / "README.md"),
    }
    place = ROOT.parent / "out" / "tests" / "counts.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found["files"] <= MAX_FILES
    assert MEDIAN_LINES[0] <= found["median_lines"] <= MEDIAN_LINES[1]
    assert found["small_files_with_one_importer"] == found["circles"] == 0
    assert found["lines"] <= MAX_LINES
    assert found["readme_lines"] <= MAX_README_LINES
