"""The hub: the table itself, and the seam to `datasets` and `huggingface_hub` on folders of this machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmoa.errors import ConfigError
from dmoa.evaluation import data as hub
from dmoa.evaluation import data as loading
from dmoa.evaluation.benchmarks.base import BENCHMARKS, HubSource
from dmoa.evaluation.data import load_rows, load_splits, slices_of
from dmoa.evaluation.records import SPLITS
from tests.unit.evaluation.samples import CONDITIONS, EVIDENCES, row, write_rows

HUB = {name: spec.hub for name, spec in BENCHMARKS.items() if spec.hub is not None}
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both libraries without a network and with an empty cache of this test's own; the folder of the hub's cache."""
    import datasets
    import huggingface_hub

    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    return cache


def publish(tmp_path: Path, name: str, files: dict[str, list[dict[str, Any]]]) -> str:
    """A data set folder as `datasets` finds it; its files are the hub's splits."""
    for file, rows in files.items():
        write_rows(tmp_path / "hub", name, f"{file}.jsonl", rows)
    return str(tmp_path / "hub" / name)


def published(monkeypatch: pytest.MonkeyPatch, name: str, source: HubSource) -> None:
    """Let a benchmark's rows come from there."""
    monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], hub=source))


def test_the_table_has_every_benchmark_at_a_fixed_commit() -> None:
    assert set(BENCHMARKS) - set(HUB) == {"cruxeval_o", "math"}
    for name, source in HUB.items():
        assert re.fullmatch(r"[0-9a-f]{40}", source.revision), name
        assert re.fullmatch(r"[\w-]+/[\w-]+", source.dataset), name


@pytest.mark.parametrize("name", HUB)
def test_hub_splits_do_not_overlap_where_one_file_serves_several(name: str) -> None:
    slices = slices_of(BENCHMARKS[name], None)
    assert set(slices) == set(SPLITS)
    for fraction in (0.0, 0.1199, 0.12, 0.1999, 0.2, 0.5999, 0.6, 0.9999):
        for file in {part.file for part in slices.values()}:
            assert sum(part.file == file and part.holds(fraction) for part in slices.values()) == 1


def test_rows_from_the_hub_equal_rows_from_files(tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("hotpotqa", question=f"Who is {number}?") for number in range(5)]
    dataset = publish(tmp_path, "hotpotqa", {"validation": rows})
    published(monkeypatch, "hotpotqa", HubSource(dataset=dataset, revision=SHA))
    from_hub = load_rows("hotpotqa", "test", data_dir=None)
    from_files = load_rows("hotpotqa", "test", data_dir=tmp_path / "hub")
    assert from_hub.rows == from_files.rows
    assert from_hub.sources == {f"{dataset}:validation": SHA}


def test_one_upstream_split_serves_all_three(tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row("humaneval", task_id=f"Made/{number}", prompt=f"def f{number}():\n", entry_point=f"f{number}")
        for number in range(164)
    ]
    dataset = publish(tmp_path, "humaneval", {"test": rows})
    monkeypatch.setitem(
        BENCHMARKS,
        "humaneval",
        replace(BENCHMARKS["humaneval"], hub=HubSource(dataset=dataset, revision=SHA, slices=HUB["humaneval"].slices)),
    )
    parts = load_splits("humaneval", SPLITS, data_dir=None)
    names = {split: {each.label.gold["entry_point"] for each in loaded.rows} for split, loaded in parts.items()}
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 164
    assert len(names["test"]) > 100 > len(names["train"]) > 0 < len(names["adaptation"])


def test_a_large_split_is_thinned_evenly_and_says_so(tmp_path: Path, offline: Path) -> None:
    dataset = publish(tmp_path, "gsm8k", {"test": [row("gsm8k", question=str(number)) for number in range(10)]})
    name, rows = hub.read_split(HubSource(dataset=dataset, revision=SHA, max_rows=4), "test")
    assert name == f"{dataset}:test[::3]"
    assert [each["question"] for each in rows] == ["0", "3", "6", "9"]


def test_bad_hub_rows_are_named_by_number(tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = publish(tmp_path, "gsm8k", {"test": [row("gsm8k"), row("gsm8k", answer="none")]})
    published(monkeypatch, "gsm8k", HubSource(dataset=dataset, revision=SHA))
    with pytest.raises(ConfigError, match=r"gsm8k:test, line 2, field `answer`: saw 'none'"):
        load_rows("gsm8k", "test", data_dir=None)
    assert len(load_rows("gsm8k", "test", data_dir=None, skip_bad_rows=True).bad) == 1


def test_definitions_come_from_the_repository_at_its_revision(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = offline / "datasets--made--patients" / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (snapshot / "release_evidences.json").write_text(json.dumps(EVIDENCES), encoding="utf-8")
    (snapshot / "release_conditions.json").write_text(json.dumps(CONDITIONS), encoding="utf-8")
    published(monkeypatch, "ddxplus", HubSource(dataset="made/patients", revision=SHA))
    definitions, sources = loading.find_definitions(BENCHMARKS["ddxplus"], None)
    assert definitions.conditions == list(CONDITIONS)
    assert sources == {"made/patients/release_evidences.json": SHA, "made/patients/release_conditions.json": SHA}


@pytest.mark.parametrize("name", ["gsm8k", "ddxplus"])
def test_without_a_hub_the_error_says_what_to_do(name: str, offline: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{HUB[name].dataset}.* cannot be had from the Hugging Face hub.* --data-dir"):
        load_rows(name, "test", data_dir=None)


def test_a_split_that_is_not_there_is_an_error_too(tmp_path: Path, offline: Path) -> None:
    dataset = publish(tmp_path, "gsm8k", {"test": [row("gsm8k")]})
    with pytest.raises(ConfigError, match=r"gsm8k:train at revision .*cannot be had"):
        hub.read_split(HubSource(dataset=dataset, revision=SHA), "train")
