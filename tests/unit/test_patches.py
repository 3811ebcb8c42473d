"""No test patches what is ours: periods, patience, places and stand-ins are arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def ours(tree: ast.Module) -> set[str]:
    """The names that a file imports from dmoa or from tests."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("dmoa", "tests"):
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] in ("dmoa", "tests")]
            found.update(alias.asname or alias.name.split(".")[0] for alias in names)
    return found


def patches(text: str) -> Iterator[int]:
    """Yield the lines on which a file sets an attribute of what it has from dmoa or tests."""
    tree = ast.parse(text)
    own = ours(tree)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        if node.func.attr not in ("setattr", "patch", "object"):
            continue
        target = node.args[0]
        while isinstance(target, ast.Attribute):
            target = target.value
        by_path = isinstance(target, ast.Constant) and str(target.value).split(".")[0] in ("dmoa", "tests")
        if by_path or (isinstance(target, ast.Name) and target.id in own):
            yield node.lineno


def test_no_test_patches_what_is_ours() -> None:
    names = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "tests").rglob("*.py"))}
    texts = {name: path.read_text(encoding="utf-8") for name, path in names.items()}
    found = {name: list(patches(text)) for name, text in texts.items() if "setattr" in text or "mock" in text}
    assert {name: where for name, where in found.items() if where} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from dmoa import storage as s\nmonkeypatch.setattr(s, 'PERIOD_S', 1)", [2]),
        ("from dmoa.storage import Mirror\nmonkeypatch.setattr(Mirror, 'push', f)", [2]),
        ("import dmoa.storage\nmonkeypatch.setattr(dmoa.storage.Mirror, 'push', f)", [2]),
        ("monkeypatch.setattr('dmoa.storage.PERIOD_S', 1)", [1]),
        ("from unittest import mock\nmock.patch('dmoa.storage.PERIOD_S')", [2]),
        ("import sys\nmonkeypatch.setattr(sys, 'argv', [])", []),
    ],
)
def test_a_patch_is_noticed(text: str, found: list[int]) -> None:
    assert list(patches(text)) == found
