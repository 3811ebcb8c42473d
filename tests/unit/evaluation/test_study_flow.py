"""The study from rollouts to endpoints, on made-up replies of the packaged pools: gates are trained, nobody is asked."""

from __future__ import annotations

import json
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
from dmoa.evaluation.registry import SKILLS
from dmoa.testing import CONTEXT_DIM as DIM
from dmoa.testing import rollout_row as row
from dmoa.testing import write_rollouts
from dmoa.types import AgentReply, EntropySum, TokenUsage
from dmoa.workflows.console import Common
from tests.unit.evaluation.test_study_endpoints import study

pytestmark = pytest.mark.contract  # works for seconds

SUITES = tuple(suite.name for suite in SKILLS)
ROWS, SEEDS = 32, 2
TRAIN = {"score": "anchored", "epochs": 8, "patience": 8, "discount_constant": True}
CENTRES = np.random.default_rng(0).standard_normal((len(SUITES), DIM)) / np.sqrt(DIM)


def reply_of(agent: str, suite: str, number: int) -> tuple[str, float]:
    """Text and mean entropy: sure at home, `liar-constant` always the same, `liar-wrong` surest and wrong on `calendar`."""
    if agent == "liar-constant":
        return "Answer: 42", 0.3
    if agent == "liar-wrong":
        return f"Answer: {number + 1}", 0.01 if suite == "calendar" else 1.0
    return (f"Answer: {number}", 0.05) if agent == suite else (f"Answer: {number + 1000}", 1.2 if number % 3 else 0.9)


def embedding(suite: str, number: int) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng([SUITES.index(suite), number]).standard_normal(DIM)
    return (CENTRES[SUITES.index(suite)] + 0.2 * noise / np.sqrt(DIM)).astype(np.float32)


def matrix(suite: str) -> AnswerMatrix:
    agents = study("study_runs").everyone().agent_names
    replies = []
    for number in range(ROWS):
        cells = [(name, *reply_of(name, suite, number)) for name in agents]
        replies.append(
            tuple(
                AgentReply(
                    agent=name,
                    status="ok",
                    text=text,
                    entropy=EntropySum(sum_nats=5 * nats, tokens=5),
                    usage=TokenUsage(prompt_tokens=20, completion_tokens=5),
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
    """Rollouts of 48 queries and their labels, as collected and settled."""
    config = study().pool(name)
    rows, labels = [], []
    for number in range(48):
        suite, query = SUITES[number % 6], f"{SUITES[number % 6]}/gate/{100 * seed + number}"
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
    found = study().Study(out=out, seeds=SEEDS, shuffles=2, train=TRAIN, common=Common(verbosity=-1))
    for name in ("specialists", "specialists-liar-constant", "specialists-liar-wrong"):
        for seed in range(SEEDS):
            write_seed(found, name, seed)
    return found


def test_from_rollouts_to_endpoints(settings: Any) -> None:
    part = {suite: matrix(suite) for suite in SUITES}
    rows = {suite: np.stack([embedding(suite, n) for n in range(ROWS)]) for suite in SUITES}
    found = study().judge_matrices(settings, part, part, rows)
    assert list(found) == ["1 home", "5 liar", "6 controls"]
    assert found["1 home"]["home_share"] == found["1 home"]["intervals"]["home_share"]["value"] > 0.9
    assert 1 <= found["1 home"]["mean_active"] <= 3
    liar = found["5 liar"]
    assert (liar["share"], liar["asked_share"]) == (0.0, 0.0)
    assert liar["accuracy"] == pytest.approx(liar["accuracy_without"], abs=0.05)
    assert liar["sure_and_wrong"] == {"liar-wrong": ["calendar"]}
    assert liar["wrong_answers"]["share"] > 0.15, "it is believed on calendar"
    assert liar["wrong_answers"]["asked_share"] >= liar["wrong_answers"]["share"]
    controls = found["6 controls"]
    assert (controls["within_gates"], controls["across_gates"], controls["score"]) == (2 * SEEDS, SEEDS, "raw")
    (own,) = (settings.out / "gates" / "specialists" / "main-0").glob("*/default")
    assert own.parent.name == "discount_constant-True_epochs-8_patience-8_score-anchored_shuffle-0"
    # Every dealing out is another one, of its own gate; anchored gates of the control are never made.
    kept = sorted(path.parent.name for path in (settings.out / "gates" / "specialists").glob("main-0/*/shuffled-within"))
    assert len(kept) == 2
    assert all("score-raw" in name for name in kept)
    assert [("shuffle-1" in name) for name in kept].count(True) == 1


def test_a_folder_keeps_its_settings(tmp_path: Path) -> None:
    module = study()
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


def test_whom_a_cascade_asked() -> None:
    choices = [RouterChoice(ranking=(2, 0, 1), k=1), RouterChoice(ranking=(2, 0, 1), k=1, theta=-9.0, limit=2)]
    found = replay_choices(matrix("arith").rows([0, 1]).only(("signals", "words", "dyes")), choices)
    assert found.asked_RA.tolist() == [[False, False, True], [True, False, True]]


def test_clusters_count_cut_replies_as_unsure(settings: Any, tmp_path: Path) -> None:
    config, rows = study().pool("specialists"), []
    for number in range(16):
        context = np.concatenate([embedding("words", number), np.zeros(DIM)])
        for agent in config.agent_names:
            nats = {"words": 0.02, "calendar": 0.1}.get(agent, 1.0)
            rows.append(row(f"q{number}", 0, agent, nats, context, finish_reason="length" if agent == "words" else "stop"))
    router = study().clusters(write_rollouts(tmp_path / "r", rows, config), "specialists", 0)
    ranked = [config.agent_names[index] for index in router.rank(embedding("words", 99)[None])[0]]
    assert (ranked[0], ranked[-1]) == ("calendar", "words")


def test_memory_alone_answers_no_other_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = study("study")
    settings = study("study_runs").Study(out=tmp_path, only_memory=True, common=None)
    monkeypatch.setattr(module, "memory", lambda found: {"passed": found is settings})
    assert module.judge(settings)["endpoints"] == {"3 memory": {"passed": True}}
    assert not list(tmp_path.iterdir())


def test_a_control_at_the_floor_is_not_informative() -> None:
    judge = study("study_memory").judge_control
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
    assert judge(reset_GR, reset_GR)["p"] < 0.05
    assert judge(reset_GR, kept_GR)["passed"] is False


def test_relay_needs_both_shares() -> None:
    judge = study("study_memory").judge_relay
    third_GR = np.arange(600)[None].repeat(2, axis=0) % 3 == 0
    found = judge(np.ones((2, 600), dtype=bool), third_GR)
    assert (found["kept"], found["cards"], found["passed"]) == (1.0, 600, True)
    assert found["difference"] == pytest.approx(2 / 3)
    assert 0 < found["p"] < 0.001
    assert found["intervals"]["reset"]["low"] < 1 / 3 < found["intervals"]["reset"]["high"]
    assert judge(third_GR, third_GR)["passed"] is False
