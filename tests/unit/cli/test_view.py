"""`dmoa view`: a folder's traces, trainings and evaluations by the same routes as a server's, for this machine alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from dmoa.evaluation.records import BenchmarkInfo
from dmoa.evaluation.results import read_evaluation
from dmoa.serving.http.page import create_view
from dmoa.testing import answered as answered_row
from dmoa.testing import run_info, scored, write_run
from dmoa.trace import write_traces
from dmoa.workflows.view import Folder
from tests.unit.cli.conftest import Invoke
from tests.unit.serving.test_traces import answered


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two traces, a training of two epochs with a line that was cut, and an evaluation of two policies."""
    write_traces(tmp_path / "traces.jsonl", [answered("t1").trace(), answered("t2", at_s=1.0, wall_ms=900.0).trace()])
    (tmp_path / "train").mkdir()
    lines = [
        {"op": "config", "values": {"command": "dmoa train"}},
        *({"op": "log", "step": step, "metrics": {"train/loss": 1.0 / (1 + step), "valid/loss": None}} for step in (0, 1)),
        {"op": "log", "step": 2, "metrics": {"held_loss": 0.25, "pace": 3.0}},
    ]
    (tmp_path / "train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"op": "lo')
    info = BenchmarkInfo(name="arith", title="Arithmetic", rows=2)
    rows = [("dmoa", 0, 1.0), ("dmoa", 1, 0.0), ("single", 0, 0.0), ("single", 1, 0.0)]
    write_run(
        tmp_path / "runs" / "one",
        run_info([info]),
        [answered_row("arith", number, policy) for policy, number, _ in rows],
        [scored("arith", number, policy, value) for policy, number, value in rows],
    )
    return tmp_path


def test_what_lies_in_a_folder_is_shown_by_the_routes_of_a_server(folder: Path) -> None:
    client = TestClient(create_view(Folder(folder)), base_url="http://127.0.0.1")
    status = client.get("/v1/dmoa/status").json()
    assert (status["can_ask"], status["is_admin"], status["statistics"][0]["calls"]) == (False, False, 2)
    assert [one["trace_id"] for one in client.get("/v1/dmoa/traces").json()["data"]] == ["t2", "t1"]
    assert [one["trace_id"] for one in client.get("/v1/dmoa/traces?slow_ms=100").json()["data"]] == ["t2"]
    assert client.get("/v1/dmoa/traces/t1").json()["answer"] == "19"
    assert client.get("/v1/dmoa/traces/t9").status_code == 404
    assert client.get("/v1/dmoa/traces?limit=0").status_code == 400
    assert client.get("/v1/dmoa/gates").status_code == 404
    assert "content-security-policy" in client.get("/").headers


def test_runs_have_the_figures_of_their_reports(folder: Path) -> None:
    client = TestClient(create_view(Folder(folder)), base_url="http://127.0.0.1")
    runs = client.get("/v1/dmoa/runs").json()["data"]
    assert [(one["id"], one["kind"]) for one in runs] == [("runs/one", "evaluation"), ("train", "training")]
    train = client.get("/v1/dmoa/runs/train").json()
    losses = [{"name": "train/loss", "points": [[0, 1.0], [1, 0.5]]}, {"name": "held_loss", "points": [[2, 0.25]]}]
    paces = [{"name": "pace", "points": [[2, 3.0]]}]
    assert train["curves"] == [{"title": "loss", "series": losses}, {"title": "pace", "series": paces}]
    assert train["facts"] == {"command": "dmoa train"}
    evaluation = client.get("/v1/dmoa/runs/runs%2Fone").json()
    found = {row["policy"]: (row["n"], row["accuracy"], row["tokens"]) for row in evaluation["rows"]}
    assert found == {"dmoa": (2, 0.5, 110.0), "single": (2, 0.0, 110.0)}
    assert client.get("/v1/dmoa/runs/nothing").status_code == 404


def test_a_run_in_the_folder_itself_has_an_address_that_a_browser_keeps(folder: Path) -> None:
    """`.../runs/.` is the list to a browser."""
    client = TestClient(create_view(Folder(folder / "runs" / "one")), base_url="http://127.0.0.1")
    (run,) = client.get("/v1/dmoa/runs").json()["data"]
    assert (run["id"], run["kind"]) == ("one (DIR)", "evaluation")
    assert client.get("/v1/dmoa/runs/one%20%28DIR%29").json()["rows"]


def test_a_file_that_is_gone_since_is_no_trace(folder: Path) -> None:
    client = TestClient(create_view(Folder(folder)), base_url="http://127.0.0.1")
    (folder / "traces.jsonl").unlink()
    assert client.get("/v1/dmoa/traces/t1").json()["error"]["code"] == "trace_not_found"


def test_messages_of_a_run_that_are_none_are_passed_over(tmp_path: Path) -> None:
    lines = [
        '{"op": "config", "values": [1]}',
        '{"op": "config", "values": {"rate": NaN, "deep": [{"decay": -1e999}]}}',
        '{"op": "log", "step": "x", "metrics": {"loss": 1.0, "pace": 1e999, "share": "a"}}',
        '{"op": "log", "step": 1, "metrics": [2.0]}',
        "[" * 100_000,
        "null",
    ]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    client = TestClient(create_view(Folder(tmp_path)), base_url="http://127.0.0.1")
    found = client.get("/v1/dmoa/runs/odd").json()
    assert found["curves"] == [{"title": "loss", "series": [{"name": "loss", "points": [[2, 1.0]]}]}]
    assert found["settings"] == {"rate": None, "deep": [{"decay": None}]}


@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("traces.jsonl", '"created_unix_s":'),
        ("traces.jsonl", '"query":{"seed":'),
        ("traces.jsonl", '"entropy_tokens":'),
        ("runs/one/answers/arith.dmoa.jsonl", '"prompt_tokens":'),
        ("runs/one/evaluation.json", '"accuracy":'),
        ("train/metrics.jsonl", '"step": '),
    ],
)
@pytest.mark.parametrize("odd", ["1e999", "-Infinity", "NaN", "9" * 400])
def test_numbers_that_nobody_counted_break_no_page(folder: Path, file: str, number: str, odd: str) -> None:
    evaluation = read_evaluation(folder / "runs" / "one")
    (folder / "runs" / "one" / "evaluation.json").write_text(evaluation.model_dump_json())
    if "answers" in file:
        (folder / "runs" / "one" / "evaluation.json").unlink()
    text = (folder / file).read_text().replace('"query":{', '"query":{"seed":1,')
    changed = re.sub(rf"({number})-?[\d.]+", rf"\g<1>{odd}", text)
    assert changed != text
    (folder / file).write_text(changed)
    client = TestClient(create_view(Folder(folder)), base_url="http://127.0.0.1")
    for path in ("status", "traces", "traces/t1", "runs", "runs/train", "runs/runs%2Fone"):
        found = client.get(f"/v1/dmoa/{path}")
        assert found.status_code in (200, 404), path
        found.json(parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_page_elsewhere_cannot_read_it_by_a_name_of_its_own(folder: Path) -> None:
    client = TestClient(create_view(Folder(folder)), base_url="http://evil.example")
    assert client.get("/v1/dmoa/traces").status_code == 400


def test_a_folder_that_is_none_is_bad_input(dmoa: Invoke, tmp_path: Path) -> None:
    result = dmoa("view", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "is no folder" in result.output
