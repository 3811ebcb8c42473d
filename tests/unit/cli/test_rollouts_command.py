"""`dmoa rollouts` before it asks anyone: queries from everywhere, labels apart, and bad input named."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmoa.cli.jobs import collect_rollouts_job
from dmoa.config import load
from dmoa.errors import ConfigError
from dmoa.evaluation.registry import SUITES
from dmoa.testing import scripted_pool
from dmoa.training.collect import CollectSession, collect, width
from dmoa.training.options import RolloutOptions
from dmoa.training.rollouts import part_paths
from dmoa.workflows.collect import build_collection, check_unchanged, prepare_queries, read_labels, track
from dmoa.workflows.console import Bars, Common
from tests.unit.training.rollout_samples import manifest, rows, write_rollouts

ROOT = Path(__file__).parents[3]


def quiet(text: str) -> None:
    """Say nothing."""


def test_samples_and_the_entropies_of_every_agent_are_logged(tmp_path: Path) -> None:
    """Two queries of two steps: the adder answers at 0.5 nats a token, echo at 2, the guesser was lost, one was not asked."""
    folder = write_rollouts(tmp_path / "collection", [rows(0), rows(1)])
    track(manifest(), folder, RolloutOptions.parse({"out": folder.root, "benchmarks": "arith", "track": "jsonl"}))
    logged = [json.loads(line) for line in (folder.root / "metrics.jsonl").read_text().splitlines()]
    samples = next(line for line in logged if line["op"] == "table")
    assert (samples["name"], len(samples["rows"])) == ("samples", 16)
    assert dict(zip(samples["columns"], samples["rows"][0], strict=True))["query_id"] == "arith/gate/0000"
    found = {}
    for line in logged:
        if line["op"] == "histogram":
            found[line["name"]] = [round(line["edges"][i], 3) for i, count in enumerate(line["counts"]) for _ in range(count)]
    assert found == {"entropy/adder": [0.5] * 4, "entropy/echo": [2.0] * 4, "entropy/guesser": [], "entropy/dead": []}


@pytest.mark.contract  # asks git for the revision of the code
def test_a_login_in_the_url_of_a_server_is_not_kept(tmp_path: Path) -> None:
    options = RolloutOptions.parse({"out": tmp_path, "benchmarks": "arith", "url": "http://me:hunter2@127.0.0.1:1"})
    with Bars(-1) as bars:
        session = build_collection(options, scripted_pool(), Common(verbosity=-1), bars, "dmoa rollouts")
    assert session.manifest.gate_version.endswith("127.0.0.1:1")
    assert "hunter2" not in session.manifest.model_dump_json()


def test_sources_are_mixed_by_weight_and_rows_are_those_of_the_gates_split(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("".join(f"Own question {number}?\n" for number in range(50)), encoding="utf-8")
    options = RolloutOptions.parse(
        {"out": tmp_path / "o", "benchmarks": "arith:2,relay", "queries": [f"{mine}:1"], "limit": 40, "seed": 3}
    )
    prepared = prepare_queries(options, quiet)
    queries = list(prepared.queries)
    assert {(source.name, source.queries) for source in prepared.sources} == {("mine.txt", 10), ("arith", 20), ("relay", 10)}
    assert len({query.query_id for query in queries}) == 40
    firsts = [query.source for query in queries[:8]]
    assert sorted(firsts) == ["arith"] * 4 + ["mine.txt"] * 2 + ["relay"] * 2
    rows = {row.task.row_id: row.task for row in SUITES["arith"].generate("gate", 20, 3)}
    assert {query.query_id: query.text for query in queries if query.source == "arith"} == {
        name: task.text for name, task in rows.items()
    }
    assert all(query.stages for query in queries if query.source == "relay")
    assert {query.split for query in queries} == {"train"}


def test_labels_lie_apart_and_are_read_back(tmp_path: Path) -> None:
    base = {"out": tmp_path / "o", "benchmarks": "arith", "limit": 5}
    plain = list(prepare_queries(RolloutOptions.parse(base), quiet).queries)
    labelled = list(prepare_queries(RolloutOptions.parse({**base, "labels": tmp_path / "l"}), quiet).queries)
    assert labelled == plain
    assert [path.name for path in tmp_path.iterdir()] == ["l"]
    gold = {row.task.row_id: row.label for row in SUITES["arith"].generate("gate", 5, 0)}
    assert {label.row_id: label for label in read_labels(tmp_path / "l")} == gold
    assert set(json.loads((tmp_path / "l" / "labels.jsonl").read_text().splitlines()[0])) == {"query_id", "benchmark", "gold"}
    with pytest.raises(ConfigError, match="holds no labels"):
        list(read_labels(tmp_path / "nowhere"))


def test_no_query_carries_its_label(tmp_path: Path) -> None:
    options = RolloutOptions.parse({"out": tmp_path / "o", "benchmarks": "suites", "limit": 60})
    for query in prepare_queries(options, quiet).queries:
        assert not set(query.model_dump()) & {"gold", "label", "answer"}


def test_sources_that_hold_too_little_are_told(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("One?\nTwo?\n", encoding="utf-8")
    said: list[str] = []
    prepared = prepare_queries(RolloutOptions.parse({"out": "o", "queries": [str(mine)], "limit": 9}), said.append)
    assert len(list(prepared.queries)) == 2
    assert said == ["note: the sources hold 2 queries, fewer than the 9 of --limit"]


def test_a_query_is_as_wide_as_its_exploration(pool: Path) -> None:
    config = load(pool, ["gate.activation.max_agents=1"])
    assert (width(config, None), width(config, 0.2)) == (3, 2)
    assert width(load(pool), 0.2) == 3, "never more than there are agents"


# Ray Serve's own records, as they are imported for the first time.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "both are empty"),
        (["--benchmarks", "nope"], "nope not known"),
        (["--benchmarks", "gsm8k", "--split", "anchor"], "--split: gsm8k has no split 'anchor'; expected one of train"),
        (["--benchmarks", "arith", "--split", "other"], "split is 'other'"),
        (["--benchmarks", "arith", "--dense", "--epsilon", "0.2"], "epsilon is 0.2"),
        (["--queries", "nowhere.txt"], "--queries: cannot read 'nowhere.txt'"),
        (["--queries", "nowhere.txt", "--labels", "l"], "--labels: no effect without --benchmarks"),
        (
            ["--benchmarks", "arith", "--labels", "s3://bucket/l"],
            "--labels is 's3://bucket/l'; expected a place of this machine",
        ),
        (["--benchmarks", "arith", "--checkpoint", "nowhere"], "nowhere"),
        (["--benchmarks", "arith", "--limit", "9999999"], "limit is 9999999"),
    ],
)
@pytest.mark.contract
def test_bad_input_is_one_message_and_asks_nobody(
    dmoa: Any, pool: Path, tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = dmoa("rollouts", "--config", pool, "--out", "o", *arguments)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert not (tmp_path / "o" / "rollouts.json").exists()


def test_the_jobs_file_is_read_and_its_mistakes_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load((ROOT / "jobs" / "collect_rollouts.yaml").read_text(encoding="utf-8"))
    options = RolloutOptions.parse(tree["job"])
    assert next((source.name, source.weight) for source in options.benchmarks) == ("arith", 2.0)
    for text, message in (
        ("job: {out: o}", "both are empty"),
        ("job: {benchmarks: [arith]}", "out: missing"),
        ("name: x", "job: missing"),
    ):
        (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        monkeypatch.setattr(sys, "argv", ["jobs/collect_rollouts.py", "--config", str(tmp_path / "job.yaml")])
        with pytest.raises(SystemExit) as ended:
            collect_rollouts_job()
        assert ended.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def own(path: Path, *texts: str) -> str:
    path.write_text("".join(f'{{"query": "{text}", "query_id": {at}}}\n' for at, text in enumerate(texts)), encoding="utf-8")
    return str(path)


def test_an_id_that_two_files_give_to_different_texts_is_refused_and_the_same_query_is_asked_once(tmp_path: Path) -> None:
    files = [own(tmp_path / "one.jsonl", "One?", "Two?"), own(tmp_path / "two.jsonl", "One?", "Two?", "Three?")]
    options = RolloutOptions.parse({"out": tmp_path / "o", "queries": files})
    prepared = prepare_queries(options, quiet)
    assert sorted(query.text for query in prepared.queries) == ["One?", "Three?", "Two?"]
    assert [source.queries for source in prepared.sources] == [2, 1]
    own(tmp_path / "two.jsonl", "One?", "Another?")
    with pytest.raises(ConfigError, match=r"two\.jsonl, and a source before it: query_id '1' names two texts; give each query"):
        prepare_queries(options, quiet)


def test_a_collection_goes_on_only_with_the_files_that_it_was_begun_with(tmp_path: Path) -> None:
    options = RolloutOptions.parse(
        {"out": tmp_path / "o", "queries": [own(tmp_path / "one.jsonl", "One?")], "benchmarks": "arith:1"}
    )
    before = manifest(sources=[source.model_dump() for source in prepare_queries(options, quiet).sources])
    check_unchanged(options, before)
    own(tmp_path / "one.jsonl", "One?", "Two?")
    with pytest.raises(
        ConfigError, match=r"--queries: '.*one\.jsonl' has changed since the collection in '.*o' was begun; restore"
    ):
        check_unchanged(options, before)
    (tmp_path / "one.jsonl").unlink()  # what was asked lies in the collection
    check_unchanged(options, before)


def test_labels_that_a_collection_was_begun_without_are_refused(tmp_path: Path) -> None:
    options = RolloutOptions.parse({"out": tmp_path / "o", "benchmarks": "arith", "limit": 5, "labels": tmp_path / "l"})
    with pytest.raises(
        ConfigError, match=r"--labels: '.*l' holds none, and those of the collection in '.*o' were to be kept when"
    ):
        check_unchanged(options, manifest())
    prepare_queries(options, quiet)
    check_unchanged(options, manifest())


@pytest.mark.contract  # asks git for the revision of the code
def test_a_collection_goes_on_only_with_the_column_that_it_was_begun_with(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("first,second\nOne?,Two?\n")

    def session(field: str | None) -> CollectSession:
        options = RolloutOptions.parse({"out": tmp_path / "o", "queries": [str(tmp_path / "rows.csv")], "field": field})
        with Bars(-1) as bars:
            return build_collection(options, scripted_pool(), Common(verbosity=-1), bars, "dmoa rollouts")

    begun = session("first")
    begun.folder.root.mkdir()
    begun.folder.manifest.write_text(begun.manifest.model_dump_json())
    with pytest.raises(ConfigError, match=r"--out: field: begun with first, now second; repeat the settings"):
        collect(session("second"))
    options = {name: value for name, value in begun.manifest.options.items() if name != "field"}
    earlier = begun.manifest.model_copy(update={"options": options, "seed": 7})
    begun.folder.manifest.write_text(earlier.model_dump_json())
    with pytest.raises(ConfigError, match=r"--out: seed: begun with 7, now 0; repeat"):  # an earlier dmoa wrote no field down
        collect(session("second"))


def test_nothing_of_a_collection_is_read_where_nothing_is_logged(tmp_path: Path) -> None:
    folder = write_rollouts(tmp_path / "collection", [rows(0)])
    part_paths(folder.root)[0].write_bytes(b"not read")
    track(manifest(), folder, RolloutOptions.parse({"out": folder.root, "benchmarks": "arith", "track": "none"}))
    assert not (folder.root / "metrics.jsonl").exists()
