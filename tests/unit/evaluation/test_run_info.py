"""What a run that goes on must have in common with its beginning."""

from __future__ import annotations

import hashlib
import itertools
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmoa.agents.pool import fingerprint, load_pool
from dmoa.config import Config
from dmoa.errors import ConfigError
from dmoa.evaluation.records import CompareOptions, EvaluateOptions, PoolInfo, RunInfo, pool_differences
from dmoa.evaluation.repeats import evaluate_repeatedly
from dmoa.evaluation.results import read_evaluation
from dmoa.evaluation.run import check_level, evaluate, plugin_pairs
from dmoa.evaluation.run_folder import RunFolder, read_record
from dmoa.policies.registry import POLICIES
from dmoa.testing import scripted_pool
from dmoa.workflows.compare import run_curve
from dmoa.workflows.console import Bars, Common
from dmoa.workflows.evaluate import build_evaluation
from tests.unit.evaluation.samples import row, write_rows


def info(*overrides: str) -> PoolInfo:
    return info_of(load_pool(None, overrides))


def info_of(config: Config) -> PoolInfo:
    return PoolInfo(name=config.name, fingerprint=fingerprint(config), config=config.model_dump(mode="json"))


def test_settings_beside_the_fingerprint_are_named() -> None:
    llm = next(iter(load_pool(None).llms))
    changed = info("agents.0.sampling.max_tokens=7", f"llms.{llm}.engine_kwargs.dtype=int8", "gate.activation.mass=0.5")
    assert changed.fingerprint == info().fingerprint
    found = pool_differences(info(), changed)
    assert found["agents.0.sampling.max_tokens"][1] == 7
    assert found["gate.activation.mass"] == (0.8, 0.5)
    assert any(name.startswith(f"llms.{llm}.") and values[1] == "int8" for name, values in found.items())
    assert len(found) == 3


def test_what_only_says_how_much_runs_side_by_side_may_change() -> None:
    llm = next(iter(load_pool(None).llms))
    assert pool_differences(info(), info(f"llms.{llm}.max_num_seqs=3", "server.port=8123")) == {}


@pytest.mark.parametrize(("begun", "now"), list(itertools.product(["namespaces", "seccomp", "weak", "none"], repeat=2)))
def test_a_run_goes_on_in_no_weaker_sandbox(begun: str, now: str) -> None:
    strength = {"namespaces": 3, "seccomp": 2, "weak": 1, "none": 0}
    if strength[now] >= strength[begun]:
        assert check_level(begun, now) is None
    else:
        with pytest.raises(ConfigError, match=f"--resume: programs ran in sandbox level '{begun}' .* this host has '{now}'"):
            check_level(begun, now)


def test_what_scripted_agents_do_may_change_and_a_server_has_no_settings() -> None:
    def scripted(**options: Any) -> PoolInfo:
        tree = {
            "name": "tiny",
            "llms": {"s": {"model": "scripted:s", "engine": "scripted", "engine_kwargs": options}},
            "agents": [{"name": "a", "llm": "s", "profile": "Adds."}],
        }
        return info_of(Config.model_validate(tree))

    assert pool_differences(scripted(failing=["a"]), scripted(failing=[])) == {}
    server = PoolInfo(name="default", fingerprint="", config={"url": "http://127.0.0.1:8000"})
    assert pool_differences(server, server.model_copy(update={"config": {"url": "http://127.0.0.1:8000/"}})) == {}
    other = server.model_copy(update={"config": {"url": "http://127.0.0.1:9000"}})
    assert pool_differences(server, other) == {"url": ("http://127.0.0.1:8000", "http://127.0.0.1:9000")}


@pytest.mark.contract  # asks git for the revision
def test_a_run_that_answered_nothing_may_begin_anew(tmp_path: Path) -> None:
    """As after a wrong `--address`: the corrected command is not to be refused."""
    folder = RunFolder(tmp_path / "out")
    options = EvaluateOptions(benchmarks=("arith",), out=folder.root, limit=2)

    def nowhere() -> AbstractContextManager[None]:
        raise ConfigError("--address: nobody answers")

    with Bars(-1) as bars:
        made = build_evaluation(options, scripted_pool(), ("arith",), folder, Common(verbosity=-1), bars, "dmoa evaluate")
    session = replace(made, open_ray=nowhere)
    for _ in range(2):
        with pytest.raises(ConfigError, match="nobody answers"):
            evaluate(session)
    folder.answers("arith", "dmoa").parent.mkdir()
    folder.answers("arith", "dmoa").touch()
    with pytest.raises(ConfigError, match="holds a run; go on with it by --resume"):
        evaluate(session)


@pytest.mark.contract  # asks git for the revision
def test_a_run_tells_that_its_rows_come_from_a_file_that_has_changed(tmp_path: Path) -> None:
    folder, told = RunFolder(tmp_path / "out"), list[str]()
    path = write_rows(tmp_path / "data", "gsm8k", "test.jsonl", [row("gsm8k")])

    def nowhere() -> AbstractContextManager[None]:
        raise ConfigError("--address: nobody answers")

    def run(*, resume: bool) -> list[str]:
        told.clear()
        options = EvaluateOptions(benchmarks=("gsm8k",), data_dir=tmp_path / "data", out=folder.root, resume=resume)
        with Bars(-1) as bars:
            made = build_evaluation(options, scripted_pool(), ("gsm8k",), folder, Common(verbosity=-1), bars, "dmoa evaluate")
        with pytest.raises(ConfigError, match="nobody answers"):
            evaluate(replace(made, open_ray=nowhere, say=told.append))
        return [line for line in told if line.startswith("note: not the file")]

    assert run(resume=False) == run(resume=True) == []
    kept = folder.tasks("gsm8k").read_text()
    path.write_text(json.dumps(row("gsm8k", question="Ada has 4 pots. How many?")) + "\n", encoding="utf-8")
    assert ["gsm8k/test.jsonl; it goes on with the rows that it keeps" in line for line in run(resume=True)] == [True]
    assert folder.tasks("gsm8k").read_text() == kept
    path.unlink()
    assert run(resume=True) == [], "its rows lie in its folder"


@pytest.mark.contract  # asks git for the revision
def test_repeats_are_one_run_that_is_kept_and_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")

    def nowhere() -> AbstractContextManager[None]:
        raise ConfigError("--address: nobody answers")

    def run(repeats: int, *, resume: bool = False) -> None:
        options = CompareOptions(benchmarks=("arith",), out=folder.root, limit=2, repeats=repeats, resume=resume)
        with Bars(-1) as bars:
            made = build_evaluation(options, scripted_pool(), ("arith",), folder, Common(verbosity=-1), bars, "dmoa compare")
        evaluate_repeatedly(replace(made, open_ray=nowhere), repeats)

    with pytest.raises(ConfigError, match="nobody answers"):
        run(2)
    assert read_evaluation(folder.root).config.repeats == 2, "what was killed is told"
    answers = RunFolder(folder.root / "repeat-1").answers("arith", "dmoa")
    answers.parent.mkdir(parents=True)
    answers.touch()
    with pytest.raises(ConfigError, match="holds a run; go on with it by --resume"):
        run(2)
    with pytest.raises(ConfigError, match="--resume: repeats: begun with 2, now 3"):
        run(3, resume=True)
    with pytest.raises(ConfigError, match="nobody answers"):
        run(2, resume=True)


@pytest.mark.contract  # asks git for the revision
@pytest.mark.parametrize("place", ["repeat-1", "curve/1-none"])
def test_the_runs_in_a_run_have_its_rows_though_their_file_has_changed(place: str, tmp_path: Path) -> None:
    """Killed before its second part began, it goes on with a file that was edited meanwhile."""
    folder, part = RunFolder(tmp_path / "out"), RunFolder(tmp_path / "out" / place)
    path = write_rows(tmp_path / "data", "gsm8k", "test.jsonl", [row("gsm8k")])
    more: dict[str, Any] = {"repeats": 2} if place == "repeat-1" else {"curve": (1,), "kind": "saboteur"}
    common = Common(config=None, overrides=(), verbosity=-1, json_path=None)

    def run(open_ray: Any, *, resume: bool) -> None:
        names = ("gsm8k",)
        options = CompareOptions(
            benchmarks=names, data_dir=tmp_path / "data", out=folder.root, resume=resume, track="none", **more
        )
        if resume and options.curve:
            run_curve(options, scripted_pool(), common, "dmoa compare")
        with Bars(-1) as bars:
            made = build_evaluation(options, scripted_pool(), names, folder, common, bars, "dmoa compare")
        evaluate_repeatedly(replace(made, open_ray=open_ray), options.repeats)

    def nowhere() -> AbstractContextManager[None]:
        raise ConfigError("--address: nobody answers")

    with pytest.raises(ConfigError, match="nobody answers"):
        run(nowhere, resume=False)
    path.write_text(json.dumps(row("gsm8k", question="Ada has 4 pots. How many?")) + "\n", encoding="utf-8")
    damaged = part.answers("gsm8k", "dmoa")  # ends it before Ray is needed
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a Answered record"):
        run(nullcontext, resume=True)
    assert part.tasks("gsm8k").read_bytes() == folder.tasks("gsm8k").read_bytes()
    assert part.gold("gsm8k").read_bytes() == folder.gold("gsm8k").read_bytes()
    assert read_record(part.run, RunInfo).benchmarks == read_record(folder.run, RunInfo).benchmarks


def test_an_engine_may_lie_elsewhere_and_not_be_another() -> None:
    def pool(engine: str) -> PoolInfo:
        return PoolInfo(name="p", fingerprint="f", config={"llms": {"v": {"engine": engine, "model": "m"}}})

    assert pool_differences(pool("/a/shout.py:Shout"), pool("/b/c/shout.py:Shout")) == {}
    changed = pool_differences(pool("/a/shout.py:Shout"), pool("/a/shout.py:Loud"))
    assert changed == {"llms.v.engine": ("shout.py:Shout", "shout.py:Loud")}
    assert plugin_pairs(None, {"engine shout": "ab"}) == {}, "an older run noted none"
    pairs = plugin_pairs({"engine shout": "a" * 64, "policy mine": "b" * 64}, {"engine shout": "c" * 64, "policy mine": "b" * 64})
    assert pairs["engine shout"] == (f"a file of SHA-256 {'a' * 12}", f"a file of SHA-256 {'c' * 12}")
    assert len(set(pairs["policy mine"])) == 1


@pytest.mark.contract  # asks git for the revision
def test_the_file_of_a_policy_is_noted_and_an_edited_one_does_not_go_on(tmp_path: Path) -> None:
    text = 'from dmoa import policy\n@policy("mine", "x.")\nclass Mine:\n    name = "mine"\n'
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    folder = RunFolder(tmp_path / "out")

    def nowhere() -> AbstractContextManager[None]:
        raise ConfigError("--address: nobody answers")

    def run(*, resume: bool) -> None:
        names = POLICIES.resolve((f"{tmp_path / 'mine.py'}:Mine",), "--policies")
        options = EvaluateOptions(benchmarks=("arith",), policies=names, out=folder.root, limit=2, resume=resume)
        with Bars(-1) as bars:
            made = build_evaluation(options, scripted_pool(), ("arith",), folder, Common(verbosity=-1), bars, "dmoa evaluate")
        try:
            evaluate(replace(made, open_ray=nowhere))
        finally:
            del POLICIES["mine"]  # as in the next process

    with pytest.raises(ConfigError, match="nobody answers"):
        run(resume=False)
    noted = read_record(folder.run, RunInfo).plugins
    assert noted == {"policy mine": hashlib.sha256(text.encode()).hexdigest()}
    with pytest.raises(ConfigError, match="nobody answers"):
        run(resume=True)
    (tmp_path / "mine.py").write_text(text + "# changed\n", encoding="utf-8")
    begun = noted["policy mine"][:12]
    with pytest.raises(ConfigError, match=f"--resume: policy mine: begun with a file of SHA-256 {begun}, now"):
        run(resume=True)
