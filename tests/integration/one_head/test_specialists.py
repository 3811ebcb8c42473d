"""Adapters trained by Ray Train's workers: a killed driver goes on and ends as an unbroken run; two train what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmoa.training.specialists import train_adapter
from tests.integration.evaluations import run_and_kill
from tests.unit.training.lora_fixtures import make_job, save_tiny_model

ROOT = Path(__file__).parents[3]
FILES = ("adapter_config.json", "adapter_model.safetensors")
DRIVER = """
import sys
from pathlib import Path
from dmoa.workflows.evaluate import opened_ray
from dmoa.training.specialists import train_adapter
from tests.unit.training.lora_fixtures import make_job
model, out = sys.argv[1], Path(sys.argv[2])
job = make_job(model, out, steps=12, check_every=1)
with opened_ray(None):
    trained = train_adapter(job, out=out / "adapter", workers=int(sys.argv[3]), storage_path=None)
print(trained.steps)
"""


def has_state(out: Path) -> bool:
    """Ray Train goes on from what its snapshot names, which it writes after a checkpoint."""
    return (out / "ray" / "adapter-tiny" / "checkpoint_manager_snapshot.json").is_file()


@pytest.mark.accept
def test_a_killed_driver_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    model = save_tiny_model(tmp_path / "model")
    out, command = tmp_path / "run", [sys.executable, "-c", DRIVER, model, str(tmp_path / "run"), "1"]
    assert run_and_kill(command, lambda: has_state(out), tmp_path / "log")
    assert not (out / "adapter").exists()
    assert not run_and_kill(command, lambda: False, tmp_path / "log"), (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["op"] == "log" and "loss_nats" in line["metrics"]]
    assert steps[-1] == 12
    assert steps.count(1) == 1, "the second run began anew"
    alone = train_adapter(
        make_job(model, tmp_path / "alone", steps=12, check_every=1), out=tmp_path / "a", workers=0, storage_path=None
    )
    assert alone.steps == 12
    for name in FILES:
        assert (out / "adapter" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


@pytest.mark.accept
def test_two_workers_train_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    model = save_tiny_model(tmp_path / "model")
    subprocess.run([sys.executable, "-c", DRIVER, model, str(tmp_path / "two"), "2"], check=True, timeout=300)
    alone = make_job(model, tmp_path / "one", steps=12, check_every=1)
    train_adapter(alone, out=tmp_path / "one" / "adapter", workers=0, storage_path=None)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-3, rtol=0)  # shipped in bfloat16
