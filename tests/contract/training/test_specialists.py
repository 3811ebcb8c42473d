"""Training of adapters on a tiny model, in this process: it learns, repeats itself, resumes, and stops when told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dmoa.errors import CheckpointError, ConfigError, DmoaError
from dmoa.training.specialists import STATE, latest_state, train_adapter
from tests.unit.training.lora_fixtures import make_job, make_rows, save_tiny_model

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def unbroken(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    trained = train_adapter(make_job(model, folder), out=folder / "adapter", workers=0, storage_path=None)
    assert trained.steps == 12
    return folder


def logged(folder: Path) -> list[dict[str, Any]]:
    """What was logged of the updates of a run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["op"] == "log" and "loss_nats" in line["metrics"]]


def test_it_learns(unbroken: Path) -> None:
    losses = [line["metrics"]["loss_nats"] for line in logged(unbroken)]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]
    state = latest_state(unbroken / "state")
    assert state is not None
    assert state.name == "checkpoint-12"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
def test_the_adapter_loads_and_changes_the_base(model: str, unbroken: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model.removeprefix("path:"))
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, unbroken / "adapter")(tokens).logits
    assert not torch.allclose(before, after, atol=1e-3)


def test_the_adapter_names_no_path(unbroken: Path) -> None:
    text = (unbroken / "adapter" / "adapter_config.json").read_text()
    assert "path@sha256:" in json.loads(text)["base_model_name_or_path"]
    assert "/" not in text


def test_a_broken_run_ends_as_the_unbroken_one(model: str, unbroken: Path, tmp_path: Path) -> None:
    """It is broken in the middle of keeping its second state."""
    shutil.copytree(unbroken / "state" / "checkpoint-8", tmp_path / "state" / "checkpoint-8")
    shutil.copytree(unbroken / "state" / "checkpoint-12", tmp_path / "state" / "checkpoint-12")
    (tmp_path / "state" / "checkpoint-12" / STATE).unlink()
    trained = train_adapter(make_job(model, tmp_path), out=tmp_path / "adapter", workers=0, storage_path=None)
    assert [point["step"] for point in trained.curve] == [4, 8, 12]
    assert [line["step"] for line in logged(tmp_path)] == [9, 10, 11, 12]
    for name in FILES:
        assert (tmp_path / "adapter" / name).read_bytes() == (unbroken / "adapter" / name).read_bytes()


def test_a_training_that_is_over_asks_the_model_nothing(unbroken: Path, tmp_path: Path, model: str) -> None:
    before = (unbroken / "metrics.jsonl").read_text()
    trained = train_adapter(make_job(model, unbroken), out=tmp_path, workers=0, storage_path=None)
    assert trained.steps == 12
    assert (unbroken / "metrics.jsonl").read_text() == before


def test_state_of_another_job_is_refused(model: str, unbroken: Path, tmp_path: Path) -> None:
    job = make_job(model, unbroken, learning_rate=0.01)
    kept = {path.name: path.read_bytes() for path in unbroken.iterdir() if path.is_file()}
    assert "metrics.jsonl" in kept
    with pytest.raises(CheckpointError, match="other settings"):
        train_adapter(job, out=tmp_path, workers=0, storage_path=None)
    assert {name: (unbroken / name).read_bytes() for name in kept} == kept


def test_it_stops_at_the_accuracy_asked_for(model: str, tmp_path: Path) -> None:
    job = make_job(model, tmp_path, stop_accuracy=0.3, learning_rate=0.03, check_every=2)
    trained = train_adapter(job, out=tmp_path / "adapter", workers=0, storage_path=None)
    assert trained.steps < 12
    assert trained.curve[-1]["accuracy"] >= 0.3
    assert all(point["accuracy"] < 0.3 for point in trained.curve[:-1])


def test_a_loss_that_is_not_finite_ends_the_run(model: str, tmp_path: Path) -> None:
    job = make_job(model, tmp_path, learning_rate=1e30, clip=1e30)
    with pytest.raises(DmoaError, match="lower the learning_rate"):
        train_adapter(job, out=tmp_path / "adapter", workers=0, storage_path=None)
    assert not (tmp_path / "adapter").exists()


def test_too_few_rows_are_named(model: str, tmp_path: Path) -> None:
    job = make_job(model, tmp_path)
    with pytest.raises(ConfigError, match="there are 5 rows"):
        train_adapter(replace(job, rows=tuple(make_rows(5))), out=tmp_path, workers=0, storage_path=None)


def test_workers_that_cannot_share_a_batch_are_named(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers is 4; batch_rows is 6"):
        train_adapter(make_job(model, tmp_path), out=tmp_path, workers=4, storage_path=None)
