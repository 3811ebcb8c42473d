"""The study from rollouts to endpoints, on made-up replies of the packaged pools: gates are trained, nobody is asked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmoa.errors import ConfigError
from dmoa.evaluation.answer_matrix import AnswerMatrix, RouterChoice, replay_choices
from dmoa.evaluation.records import Task
from dmoa.testing import CONTEXT_DIM as DIM
from dmoa.testing import rollout_row as row
from dmoa.testing import write_rollouts
from dmoa.types import AgentReply
from dmoa.workflows.console import Common
from tests.unit.evaluation.test_study_endpoints import job

SUITES, SURFACES = ("arith", "words", "calendar", "shared"), ("arith", "words", "calendar")
ROWS, SEEDS = 32, 2
CENTRES = np.random.default_rng(0).standard_normal((3, DIM)) / np.sqrt(DIM)


def reply_of(agent: str, suite: str, number: int) -> tuple[str, float]:
    """Text and mean entropy: sure at home, `liar-constant` always the same, `liar-wrong` surest and wrong on `calendar`."""
    if agent == "liar-constant":
        return "Answer: 42", 0.3
    if agent == "liar-wrong":
        return f"Answer: {number + 1}", 0.01 if suite == "calendar" else 1.0
    is_home = agent == suite or agent == {"arith": f"arith-{('carry', 'plain')[number % 2]}"}.get(suite)
    return (f"Answer: {number}", 0.05) if is_home else (f"Answer: {number + 1000}", 1.2 if number % 3 else 0.9)


def embedding(suite: str, number: int) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng([SUITES.index(suite), number]).standard_normal(DIM)
    return (CENTRES[SUITES.index(suite) % 3] + 0.2 * noise / np.sqrt(DIM)).astype(np.float32)


def matrix(suite: str) -> AnswerMatrix:
    agents, surface = job("study_settings").everyone().agent_names, "arith" if suite == "shared" else suite
    replies = []
    for number in range(ROWS):
        cells = [(name, *reply_of(name, surface, number)) for name in agents]
        replies.append(
            tuple(
                AgentReply(
                    agent=name,
                    status="ok",
                    text=text,
                    entropy_sum_nats=5 * nats,
                    entropy_tokens=5,
                    prompt_tokens=20,
                    completion_tokens=5,
                )
                for name, text, nats in cells
            )
        )
    return AnswerMatrix(
        benchmark=suite,
        agents=agents,
        tasks=tuple(Task(row_id=f"{suite}/{number}", benchmark=suite, text=str(number)) for number in range(ROWS)),
        replies=tuple(replies),
        value_RA=np.array([[float(reply.text == f"Answer: {n}") for reply in replies[n]] for n in range(ROWS)]),
    )


def write_seed(settings: Any, name: str, seed: int) -> None:
    """Rollouts of 24 queries and their labels, as collected and settled."""
    config = job("study_settings").pool(name)
    rows, labels = [], []
    for number in range(24):
        suite, query = SURFACES[number % 3], f"{SURFACES[number % 3]}/gate/{100 * seed + number}"
        context = np.concatenate([embedding(suite, 1000 + 100 * seed + number), np.zeros(DIM)])
        labels.append({"query_id": query, "benchmark": suite, "gold": {"answer": str(number)}})
        for agent in config.agent_names:
            text, nats = reply_of(agent, suite, number)
            rows.append(row(query, 0, agent, nats, context, source=suite, text=text))
    folder = settings.out / "rollouts" / name / f"main-{seed}"
    write_rollouts(folder, rows, config, files=1)
    (folder / "settled").touch()
    apart = settings.out / "labels" / name / f"main-{seed}"
    apart.mkdir(parents=True)
    (apart / "labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("study")
    found = job("study_settings").Study(out=out, seeds=SEEDS, shuffles=2, common=Common(verbosity=-1))
    for name in ("specialists", "specialists-liar-constant", "specialists-liar-wrong"):
        for seed in range(SEEDS):
            write_seed(found, name, seed)
    return found


def test_from_rollouts_to_endpoints(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    study = job("study_gate")
    monkeypatch.setattr(study, "EPOCHS", (1, 8))
    monkeypatch.setattr(study, "ALPHAS", ((0.1, 0.5), (0.5, 0.1)))
    part = {suite: matrix(suite) for suite in SUITES}
    found = {"validation": part, "test": part}
    rows = {suite: np.stack([embedding("arith" if suite == "shared" else suite, n) for n in range(ROWS)]) for suite in SUITES}
    chosen, tried = study._tune(settings, found, rows)
    assert chosen["patience"] == chosen["epochs"] == 8
    assert tried["constant_agents"] == ["liar-constant"]
    assert chosen["score"] == min(("raw", "anchored"), key=tried["sent_to_constant_agents"].get)
    assert [(size["alpha"], size["theta_alpha"]) for size in tried["sizes"]] == [(0.1, 0.5), (0.5, 0.1)]
    endpoints = study._endpoints(settings, chosen, found, rows)
    assert list(endpoints) == ["1 home", "2 shared", "4 several", "5 liar", "6 controls"]
    assert endpoints["1 home"]["home_share"] == endpoints["1 home"]["intervals"]["home_share"]["value"] > 0.9
    assert endpoints["5 liar"]["sure_and_wrong"] == {"liar-wrong": ["calendar"]}
    assert endpoints["5 liar"]["wrong_answers"]["share"] > 0.3, "it is believed on calendar"
    assert endpoints["5 liar"]["asked_share"] >= endpoints["5 liar"]["share"]
    controls = endpoints["6 controls"]
    assert (controls["within_gates"], controls["across_gates"], controls["score"]) == (2 * SEEDS, SEEDS, "raw")
    # Every dealing out is another one, of its own gate; anchored gates of the control are never made.
    kept = sorted(path.parent.name for path in (settings.out / "gates" / "specialists").glob("main-0/*/shuffled-within"))
    assert len(kept) == 2
    assert all("score-raw" in name for name in kept)
    assert [("shuffle-1" in name) for name in kept].count(True) == 1
    upper = study._upper_bound(settings, {**chosen, "score": "anchored"}, found, rows)
    assert upper["home_share"] > 0.9
    assert list((settings.out / "gates" / "specialists" / "main-0").glob("*score-raw*/labelled"))
    # What came of it is plain JSON, and the same gates are found again.
    study.write_result(settings, {"endpoints": endpoints, "tried": tried, "upper": upper})
    assert json.loads((settings.out / "result.json").read_text())["tried"]["constant_agents"] == ["liar-constant"]
    assert (
        study._spent(settings, chosen, found, rows).items()
        <= next(size for size in tried["sizes"] if size["alpha"] == chosen["alpha"]).items()
    )


def test_the_second_test_takes_the_first_ones_choice_with_a_price_on_agents(
    settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    second = job("study_second")
    with pytest.raises(ConfigError, match=r"holds no result; run jobs/study_gate.py to its end first"):
        second._chosen(replace(settings, out=tmp_path))
    first = {"score": "raw", "epochs": 8, "patience": 8, "alpha": 0.5, "theta_alpha": 0.1}
    (settings.out / "result.json").write_text(json.dumps({"chosen": first}))
    chosen = second._chosen(settings)
    assert chosen == {"score": "raw", "epochs": 8, "patience": 8, "alpha": "auto", "agent_price": 0.1}
    asked: list[str] = []

    def answered(*_: Any, **__: Any) -> dict[str, AnswerMatrix]:
        asked.append("test")
        assert list((settings.out / "gates" / "specialists" / "main-0").glob("agent_price*")), "gates come before answers"
        return {suite: matrix(suite).only(job("study_settings").pool("specialists").agent_names) for suite in second.SUITES}

    monkeypatch.setattr(second, "answered", answered)
    monkeypatch.setattr(second, "matrices", lambda *_: {suite: matrix(suite) for suite in SUITES})
    rows = {suite: np.stack([embedding("arith", n) for n in range(ROWS)]) for suite in second.SUITES}
    monkeypatch.setattr(second, "embeddings", lambda *_: rows)
    found = second._run(settings, chosen)
    assert asked == ["test"]
    assert list(found["endpoints"]) == ["2 shared", "4 several"]
    assert all(1 <= endpoint["mean_active"] <= 3 for endpoint in found["endpoints"].values())
    assert len(found["points"]) == SEEDS
    assert json.dumps(job("study_settings").plain(found))


def test_the_third_test_holds_the_discount_against_gates_without_it(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    third, agents = job("study_third"), job("study_settings").pool("specialists-liar-constant").agent_names

    def answered(*_: Any, rows: int, seed: int) -> dict[str, AnswerMatrix]:
        assert (rows, seed) == (300, 9)
        trained = settings.out / "gates" / "specialists-liar-constant" / "main-0"
        assert len(list(trained.glob("*discount_constant-*"))) == 2, "gates come before answers"
        return {suite: matrix(suite).only(agents) for suite in third.SINGLE}

    monkeypatch.setattr(third, "answered", answered)
    rows = {suite: np.stack([embedding(suite, n) for n in range(ROWS)]) for suite in third.SINGLE}
    monkeypatch.setattr(third, "embeddings", lambda *_: rows)
    found = third._run(settings)
    judged = found["endpoints"]["5 liar"]
    assert (judged["share"], judged["asked_share"]) == (0.0, 0.0)
    assert judged["accuracy"] == pytest.approx(judged["accuracy_without"], abs=0.05)
    assert judged.keys() == found["kept"].keys()
    assert found["settings"]["discount_constant"] is True
    assert json.dumps(job("study_settings").plain(found))


def test_a_folder_keeps_its_settings(tmp_path: Path) -> None:
    module = job("study_settings")
    begun = module.Study(out=tmp_path, common=Common())
    module.check_same(begun)
    module.check_same(replace(begun, workers=7, common=Common(verbosity=1)))
    with pytest.raises(ConfigError, match=r"job.out: relay_test: begun with 300, now 20; repeat"):
        module.check_same(replace(begun, relay_test=20))
    known = json.loads((tmp_path / "study.json").read_text())
    known["pool specialists"] = "of other adapters"
    (tmp_path / "study.json").write_text(json.dumps(known))
    with pytest.raises(ConfigError, match=r"pool specialists: begun with of other adapters, now"):
        module.check_same(begun)


def test_results_are_plain() -> None:
    found = job("study_settings").plain({1: (np.float64("nan"), np.bool_(True)), "a": [np.int64(3), math.inf, 0.5, None]})
    assert json.dumps(found) == '{"1": [null, true], "a": [3, null, 0.5, null]}'


def test_nobody_is_no_agent() -> None:
    doubt = job("study_gate").winners_doubt(matrix("arith").only(("words", "arith-carry")), np.array([1, -1, *[0] * (ROWS - 2)]))
    np.testing.assert_allclose(doubt[:3], np.log([0.05 + 1e-3, 20 + 1e-3, 1.2 + 1e-3]))


def test_whom_a_cascade_asked() -> None:
    choices = [RouterChoice(ranking=(2, 0, 1), k=1), RouterChoice(ranking=(2, 0, 1), k=1, theta=-9.0, limit=2)]
    found = replay_choices(matrix("arith").rows([0, 1]).only(("base", "words", "arith-plain")), choices)
    assert found.asked_RA.tolist() == [[False, False, True], [True, False, True]]


def test_clusters_count_cut_replies_as_unsure(settings: Any, tmp_path: Path) -> None:
    config, rows = job("study_settings").pool("specialists"), []
    for number in range(16):
        context = np.concatenate([embedding("words", number), np.zeros(DIM)])
        for agent in config.agent_names:
            nats = {"words": 0.02, "calendar": 0.1}.get(agent, 1.0)
            rows.append(row(f"q{number}", 0, agent, nats, context, finish_reason="length" if agent == "words" else "stop"))
    router = job("study_gates").clusters(write_rollouts(tmp_path / "r", rows, config), "specialists", 0)
    ranked = [config.agent_names[index] for index in router.rank(embedding("words", 99)[None])[0]]
    assert (ranked[0], ranked[-1]) == ("calendar", "words")


def test_chain_at_the_floor_is_not_informative() -> None:
    judge = job("study_memory").judge_chain
    floor_GR = np.zeros((2, 200))
    found = judge(floor_GR, floor_GR)
    assert (found["passed"], found["informative"]) == (True, False)
    assert found["reading"].startswith("not informative")
    kept_GR, reset_GR = floor_GR.copy(), floor_GR.copy()
    kept_GR[:, :100], reset_GR[:, 2:100] = 1.0, 1.0
    found = judge(kept_GR, reset_GR)
    assert found["rows_right"] == {"default": [100.0, 100.0], "no-memory": [98.0, 98.0]}
    assert (found["discordant_rows"], found["informative"], found["passed"]) == ([2, 2], True, True)
    # p is that of the bar, which even no difference at all is clear of.
    assert judge(reset_GR, reset_GR)["p"] < 0.001
    assert judge(reset_GR, kept_GR)["passed"] is False


def test_relay_needs_both_shares() -> None:
    judge = job("study_memory").judge_relay
    third_GR = np.arange(600)[None].repeat(2, axis=0) % 3 == 0
    found = judge(np.ones((2, 600), dtype=bool), third_GR)
    assert (found["kept"], found["cards"], found["passed"]) == (1.0, 600, True)
    assert found["difference"] == pytest.approx(2 / 3)
    assert 0 < found["p"] < 0.001
    assert found["intervals"]["reset"]["low"] < 1 / 3 < found["intervals"]["reset"]["high"]
    assert judge(third_GR, third_GR)["passed"] is False
