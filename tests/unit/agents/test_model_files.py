"""The files of a model, looked at before anything starts: missing, cut short, of another kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmoa.agents.pool import check_corpus, check_files
from dmoa.config import Config
from dmoa.engines.models import check_model
from dmoa.errors import ConfigError


def whole(folder: Path) -> Path:
    """A folder with everything that is looked at."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.ones(64)}, folder / "model.safetensors")
    return folder


def pool(folder: Path, engine: str = "transformers") -> Config:
    tree = {
        "name": "pool",
        "llms": {"fake": {"model": "scripted:x", "engine": "scripted"}, "real": {"model": f"path:{folder}", "engine": engine}},
        "agents": [
            {"name": "one", "llm": "fake", "profile": "Echoes."},
            *({"name": f"agent{number}", "llm": "real", "profile": "Adds."} for number in range(6)),
        ],
    }
    return Config.model_validate(tree)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
    (folder / "model.safetensors").write_text(text)


def shard_lost(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
    (lambda folder: (folder / "model.safetensors").unlink(), "lacks safetensors weights"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json or model.safetensors.index.json cannot be read"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds no JSON object"),
    (cut, "model.safetensors has "),
    (pointer, "holds no weights: it is cut short, or a pointer to a file"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors (0 bytes) holds no weights"),
    (shard_lost, "model-00002-of-00002.safetensors is missing"),
]


@pytest.mark.parametrize(("spoil", "part"), FAULTS, ids=[part for _, part in FAULTS])
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_model_that_cannot_load_is_named_with_its_agents(
    tmp_path: Path, spoil: Callable[[Path], object], part: str, engine: str
) -> None:
    folder = whole(tmp_path / "model")
    check_files(pool(folder, engine))
    spoil(folder)
    with pytest.raises(ConfigError) as caught:
        check_files(pool(folder, engine))
    message = str(caught.value)
    assert message.startswith("llms.real.model")
    for text in (repr(f"path:{folder}"), part, "(agents on it: agent0, agent1, agent2, agent3 and 2 more)"):
        assert text in message
    assert "\n" not in message


@pytest.mark.parametrize("model", ["embedded:smollm3", "embedded:minilm", "hub:a/b/c", "path:/nonexistent", "path:\0"])
def test_other_models_are_looked_at_as_far_as_they_can_be(model: str) -> None:
    with pytest.raises(ConfigError, match="model: "):
        check_model(model)


@pytest.mark.parametrize("model", ["embedded:smollm2-135m", "hub:org/name@main", "s3://bucket/model"])
def test_nothing_is_fetched(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMOA_CACHE", str(tmp_path / "cache"))
    check_model(model)
    assert not (tmp_path / "cache").exists()


def test_a_corpus_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    config = pool(whole(tmp_path / "model"))
    check_corpus(config)
    missing = config.model_copy(update={"tools": config.tools.model_copy(update={"search_corpus": str(tmp_path / "none.jsonl")})})
    with pytest.raises(ConfigError, match=r"tools.search_corpus: cannot read '.*none.jsonl'"):
        check_corpus(missing)
