"""`dmoa train` on a real Ray Train: two workers, one of them killed, then the command itself; it ends as if unbroken."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dmoa import checkpoint
from dmoa.testing import domain_rows, write_rollouts
from dmoa.testing import scripted_pool as pool
from dmoa.testing import scripted_pool_yaml as pool_yaml
from tests.integration.head import environment
from tests.integration.trainings import command, curve, greatest_difference, kept_weights, num_epochs, run, start

EPOCHS = 120


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    (folder / "pool.yaml").write_text(pool_yaml())
    write_rollouts(folder / "rollouts", domain_rows(22, steps=2), pool())
    return folder


@pytest.fixture(scope="module")
def options() -> tuple[str, ...]:
    return ("--epochs", str(EPOCHS), "--patience", str(EPOCHS), "--dtype", "float64", "--seed", "1")


@pytest.fixture(scope="module")
def unbroken(material: Path, options: tuple[str, ...]) -> Path:
    """The folder of the same training in process, unbroken."""
    ran = run(command(material, material / "whole", *options, "--workers", "0"))
    assert ran.returncode == 0, ran.stderr
    return material / "whole"


def test_two_workers_train_a_gate_that_can_be_loaded(material: Path, tmp_path: Path) -> None:
    ran = run(command(material, tmp_path / "run", "--epochs", "2", "--workers", "2"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(tmp_path / "run" / "checkpoint")]
    assert [epoch["epoch"] for epoch in curve(tmp_path / "run")] == [1, 2]
    gate, _ = checkpoint.load(tmp_path / "run" / "checkpoint")
    assert gate.spec.agents == pool().agent_names


def test_a_folder_that_the_worker_does_not_share_is_refused_before_anything_is_trained(material: Path, tmp_path: Path) -> None:
    """Every process has a folder of its own under /proc/self: as machines have, of which there is but one here."""
    arguments = command(material, Path("/proc/self/cwd/out/tests/apart"), "--epochs", "2")
    ran = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment(), check=False)
    assert ran.returncode == 2, ran.stderr
    assert "--out: '/proc/self/cwd/out/tests/apart/state' is this machine's alone: Ray runs the worker on " in ran.stderr
    assert "Traceback" not in ran.stderr
    assert [
        path.name for path in (tmp_path / "out" / "tests" / "apart" / "state").iterdir() if path.name.startswith(".mark")
    ] == []


@pytest.mark.accept
def test_two_workers_one_killed_and_then_the_driver_end_as_one_unbroken(
    material: Path, unbroken: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = command(material, out, *options, "--workers", "2")
    running = start(arguments, out, log)
    running.wait_for(lambda: num_epochs(out) >= 3)
    kept = running.kill_worker()
    running.wait_for(lambda: num_epochs(out) >= kept + 2)
    running.kill()
    before = num_epochs(out)
    assert before < EPOCHS
    assert not (out / "checkpoint").exists()
    ran = run(arguments)
    assert ran.returncode == 0, ran.stderr
    assert f"going on after epoch {before}" in ran.stderr
    assert ran.stdout.split() == [str(out / "checkpoint")]
    found, expected = curve(out), curve(unbroken)
    assert [epoch["epoch"] for epoch in found] == list(range(1, EPOCHS + 1))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert next(iter(kept_weights(out).values())).dtype.itemsize == 8
    assert greatest_difference(out, unbroken) < 1e-6
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["step"] for line in lines if line["op"] == "log" and line["step"]) == list(range(1, EPOCHS + 1))


@pytest.mark.usefixtures("own_ray")
def test_a_file_damaged_inside_is_one_message_by_way_of_ray_data(tmp_path: Path) -> None:
    damaged = write_rollouts(tmp_path / "rollouts", domain_rows(), pool())
    part = damaged / "rollouts" / "part-2.parquet"
    with pq.ParquetFile(part) as file:
        # What a look at the folder does not read: the pages of `context`.
        pages = file.metadata.row_group(0).column(file.schema_arrow.names.index("context"))
    data = bytearray(part.read_bytes())
    start = pages.dictionary_page_offset or pages.data_page_offset
    data[start : start + pages.total_compressed_size] = bytes(pages.total_compressed_size)
    part.write_bytes(data)
    (tmp_path / "pool.yaml").write_text(pool_yaml())
    ran = run(command(tmp_path, tmp_path / "run"))
    assert ran.returncode == 2, ran.stderr
    assert "part-2.parquet: not a whole Parquet file" in ran.stderr
    assert "Traceback" not in ran.stderr
