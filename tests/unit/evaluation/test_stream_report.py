"""The report of an adaptation: the stream with and without it, and what is logged of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmoa.training.options import AdaptOptions
from dmoa.workflows.adapt import AdaptReport, AdaptRow, log_stream, print_adaptation


def points(right: list[float]) -> list[dict[str, object]]:
    """The probability of being right is known from the second query on."""
    usual = {"entropy_nats": None, "agents": 2, "tokens": 10}
    return [
        usual | {"row_id": f"r{place}", "right": value, "right_probability": 0.75 if place else None, "gate_version": f"v{place}"}
        for place, value in enumerate(right)
    ]


def report() -> AdaptReport:
    rows = [
        AdaptRow(benchmark="dyes", gate=gate, first=first, first_rows=2, rest=rest, rest_rows=4, agents=1.5, tokens=10.0)
        for gate, first, rest in (("zero-shot", 0.0, 0.25), ("zero-shot-ttt", 0.5, None))
    ]
    return AdaptReport(
        command="dmoa adapt",
        options={},
        pool="p",
        starts={"zero-shot": "v0", "zero-shot-ttt": "v2"},
        rows=rows,
        updates={"zero-shot": [{"queries": ["r"], "loss": loss, "drift": drift} for loss, drift in ((None, 0.0), (0.7, 0.5))]},
        stream={"zero-shot": points([0.0, 0.0]), "zero-shot-ttt": points([0.0, 1.0])},
    )


def test_the_stream_is_logged_as_means_so_far_and_once(tmp_path: Path) -> None:
    options = AdaptOptions.parse({"benchmark": "dyes", "out": tmp_path, "track": "jsonl"})
    for _ in range(2):
        log_stream(report(), tmp_path, options)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if line["op"] == "log"]
    assert [line["step"] for line in logged] == [1, 2]
    assert logged[1]["metrics"]["zero-shot-ttt/right"] == 0.5
    assert logged[1]["metrics"]["zero-shot/drift"] == 0.5
    assert logged[1]["metrics"]["zero-shot/agents"] == 2
    assert ["zero-shot/right_probability" in line["metrics"] for line in logged] == [False, True]
    assert logged[1]["metrics"]["zero-shot/right_probability"] == 0.75
    assert "zero-shot/entropy_nats" not in logged[1]["metrics"]  # nothing is known of it
    assert sum(line["op"] == "table" for line in lines) == 1


def test_the_table_has_starts_and_what_adaptation_made_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    print_adaptation(report())
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["dyes", "zero-shot", "0.0%", "of", "2", "25.0%", "of", "4", "1.50", "10"] in lines
    assert ["dyes", "zero-shot-ttt", "50.0%", "of", "2", "1.50", "10"] in lines


def test_a_start_that_learned_nothing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    print_adaptation(report())
    assert "learned nothing" not in capsys.readouterr().out
    first = report().updates["zero-shot"][0]
    print_adaptation(report().model_copy(update={"updates": {"zero-shot": [first, first]}}))
    assert "zero-shot: learned nothing from 2 queries" in capsys.readouterr().out
