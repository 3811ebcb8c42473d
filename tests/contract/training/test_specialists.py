"""Training of adapters on a tiny model, in this process: it learns, repeats itself, resumes, and stops when told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dmoa.errors import CheckpointError, ConfigError, DmoaError
from dmoa.tracking import open_tracker
from dmoa.training import specialists as lora_loop
from dmoa.training.specialists import build_job, latest_state, train_adapter
from tests.unit.training.lora_fixtures import make_job, make_rows, save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore::DeprecationWarning:ray.*")
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


def test_it_learns(unbroken: Path) -> None:
    state = latest_state(unbroken / "state")
    assert state is not None
    curve = json.loads((state / lora_loop.STATE).read_text())["curve"]
    assert [point["step"] for point in curve] == [4, 8, 12]
    losses = [
        line["metrics"]["loss_nats"]
        for line in map(json.loads, (unbroken / "metrics.jsonl").read_text().splitlines())
        if line["op"] == "log" and "loss_nats" in line["metrics"]
    ]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]


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
    job, tracker = make_job(model, tmp_path), open_tracker("none", run_dir=tmp_path, name="x")
    worker = lora_loop._Worker(job, rank=0, num_workers=1)
    for _ in range(4):
        worker.update(tracker)
    worker.check(tracker)
    kept = tmp_path / "state" / "step-00000004"
    kept.mkdir(parents=True)
    worker.save(kept)
    for _ in range(3):
        worker.update(tracker)  # lost
    trained = train_adapter(job, out=tmp_path / "adapter", workers=0, storage_path=None)
    assert [point["step"] for point in trained.curve] == [4, 8, 12]
    for name in FILES:
        assert (tmp_path / "adapter" / name).read_bytes() == (unbroken / "adapter" / name).read_bytes()


def test_state_of_another_job_is_refused(model: str, unbroken: Path, tmp_path: Path) -> None:
    job = make_job(model, unbroken, learning_rate=0.01)
    with pytest.raises(CheckpointError, match="other settings"):
        train_adapter(job, out=tmp_path, workers=0, storage_path=None)


def test_it_stops_at_the_accuracy_asked_for(model: str, tmp_path: Path) -> None:
    job = make_job(model, tmp_path, stop_accuracy=0.3, learning_rate=0.03, check_every=2)
    trained = train_adapter(job, out=tmp_path / "adapter", workers=0, storage_path=None)
    assert trained.steps < 12
    assert trained.curve[-1]["accuracy"] >= 0.3
    assert all(point["accuracy"] < 0.3 for point in trained.curve[:-1])


def test_shares_of_two_workers_add_up_to_one_workers_batch(model: str, tmp_path: Path) -> None:
    job = make_job(model, tmp_path)
    whole, first, second = (lora_loop._Worker(job, rank=rank, num_workers=n) for rank, n in ((0, 1), (0, 2), (1, 2)))
    batch = whole.rows[:6]
    whole.model.loss(batch, 3).backward()
    first.model.loss(batch[0::2], 3).backward()
    second.model.loss(batch[1::2], 3).backward()
    for one, a, b in zip(whole.weights.values(), first.weights.values(), second.weights.values(), strict=True):
        assert one.grad is not None and a.grad is not None and b.grad is not None  # noqa: PT018 -- for the type checker
        torch.testing.assert_close(a.grad + b.grad, one.grad, atol=1e-4, rtol=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run(model: str, tmp_path: Path) -> None:
    worker = lora_loop._Worker(make_job(model, tmp_path), rank=0, num_workers=1)
    next(iter(worker.weights.values())).data.fill_(float("nan"))
    with pytest.raises(DmoaError, match="lower the learning_rate"):
        worker.update(open_tracker("none", run_dir=tmp_path, name="x"))


def test_too_few_rows_are_named(model: str, tmp_path: Path) -> None:
    job = make_job(model, tmp_path)
    with pytest.raises(ConfigError, match="there are 5 rows"):
        build_job(
            "tiny", model, job.settings, job.schedule, make_rows(5), make_rows(2), run_dir=tmp_path, track="none", threads=1
        )
