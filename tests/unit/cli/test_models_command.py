"""`dmoa models`: what it prints, what it writes as JSON, and its exit codes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmoa.cli.main import app
from dmoa.engines import models


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds a stand-in for MiniLM and nothing else."""
    monkeypatch.setenv("DMOA_CACHE", str(tmp_path))
    folder = tmp_path / "models" / models.EMBEDDED["minilm"].folder
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"1234")
    entry = {"bytes": 4, "sha256": "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4"}
    (folder / models.MANIFEST).write_text(json.dumps({"files": {"model.safetensors": entry}}))
    return folder


@pytest.mark.parametrize("command", [["models"], ["models", "list"]])
def test_lists_what_there_is_and_what_is_cached(command: list[str], cache: Path) -> None:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert f"minilm         {cache}" in result.stdout
    assert "smollm2-135m   not fetched" in result.stdout


def test_the_list_as_json(cache: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["models", "list", "--json", str(tmp_path / "out.json")]).exit_code == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert {record["name"]: record["path"] for record in written["models"]} == {"smollm2-135m": None, "minilm": str(cache)}


def test_a_cached_model_is_fetched_at_once_and_verified(cache: Path) -> None:
    for options in ([], ["--verify"]):
        result = CliRunner().invoke(app, ["models", "fetch", "minilm", *options])
        assert (result.exit_code, result.stdout) == (0, f"{cache}\n")


def test_path(cache: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["models", "path", "minilm", "--json", str(tmp_path / "out.json")])
    assert (result.exit_code, result.stdout) == (0, f"{cache}\n")
    assert json.loads((tmp_path / "out.json").read_text())["path"] == str(cache)


def test_an_absent_model_exits_1_and_says_how_to_get_it(cache: Path) -> None:
    result = CliRunner().invoke(app, ["models", "path", "smollm2-135m"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "run `dmoa models fetch smollm2-135m`" in result.stderr


@pytest.mark.parametrize("command", ["fetch", "path"])
def test_an_unknown_name_exits_2_and_says_what_is_allowed(command: str, cache: Path) -> None:
    result = CliRunner().invoke(app, ["models", command, "nope"])
    assert result.exit_code == 2
    assert "'nope' is not an embedded model; expected one of smollm2-135m, minilm" in result.stderr
