"""Score posterior: hand-computed targets, a training that sees through a sure liar, and what its gate does in the step loop."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmoa import checkpoint
from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import fingerprint
from dmoa.config import Config
from dmoa.core.gate import Gate, GateSpec, init_gate
from dmoa.core.in_step import judge
from dmoa.core.label_model import fit_label_model
from dmoa.core.scores import posterior_scores
from dmoa.core.witnesses import NO_ANSWER, Witnesses, usual_doubts
from dmoa.errors import CheckpointError, ConfigError
from dmoa.feedback import MARK
from dmoa.replay import replay_routing
from dmoa.serving.trace_archive import without_secrets
from dmoa.swarm import Swarm
from dmoa.testing import (
    CONTEXT_DIM,
    FakeAgents,
    Fate,
    Say,
    decision,
    rollout_row,
    router_of,
    said,
    scripted_pool,
    write_rollouts,
)
from dmoa.trace import AnsweredQuery, Trace, read_traces, write_traces
from dmoa.training.dataset import EpisodeBuilder, Episodes, read_episodes, read_manifests
from dmoa.training.judging import competence_bias, fit_judge, judged, learnt, with_outcomes, witnesses_of_steps
from dmoa.training.objective import Scale, Split, build_data
from dmoa.training.options import TrainOptions
from dmoa.training.outcomes import Outcome
from dmoa.training.rollouts import RolloutFolder, RolloutQuery
from dmoa.training.state import StateStore
from dmoa.training.trainer import FittedTargets, TrainContext, _credit_competence, fit_spec, run_training
from dmoa.types import Answer, Limits, Query, supervision_of
from tests.unit.core.test_label_model import by_hand
from tests.unit.training.in_process import train

AGENTS = ("good", "fine", "liar")
QUERIES = 40
NATS = {"good": 0.4, "fine": 0.5, "liar": 0.01}


def pool(**gate: Any) -> Config:
    return scripted_pool(
        AGENTS,
        f"{{hidden: 16, score: posterior, activation: {{max_agents: 3}}, {', '.join(f'{k}: {v}' for k, v in gate.items())}}}",
    )


def texts(number: int) -> dict[str, str]:
    """Two agents that are right, and one that is sure of something else every time."""
    return {"good": f"Answer: {number}", "fine": f"It is so. Answer: {number}", "liar": f"Answer: {1000 + 7 * number}"}


def rows(queries: int = QUERIES, **changes: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(queries):
        context = np.concatenate([rng.standard_normal(CONTEXT_DIM) / math.sqrt(CONTEXT_DIM), np.zeros(CONTEXT_DIM)])
        for agent, text in texts(number).items():
            nats = NATS[agent] * rng.uniform(0.8, 1.2)
            found.append(rollout_row(f"q{number:03d}", 0, agent, nats, context, text=text, **changes))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str]]:
    """A gate that was trained on posteriors: the folder of its checkpoint, its result, and what the training said."""
    folder = tmp_path_factory.mktemp("trained")
    lines: list[str] = []
    rollouts = write_rollouts(folder / "rollouts", rows(), pool())
    result = train(folder / "gate", rollouts, pool(), said=lines, track="none", epochs=30)
    return result.checkpoint, result, lines


def test_the_targets_are_the_log_odds_of_being_right() -> None:
    assert posterior_scores(0.5) == 0.0
    assert posterior_scores(0.9) == pytest.approx(-math.log(9))
    assert posterior_scores(np.array([0.0, 1.0])) == pytest.approx([math.log(999), -math.log(999)])
    assert math.isnan(posterior_scores(math.nan))


def episodes_of(lines: list[dict[str, Any]], asked: Mapping[tuple[str, int], str] | None = None) -> Episodes:
    import pyarrow as pa

    from dmoa.training.dataset import COLUMNS
    from dmoa.training.rollouts import LATER_COLUMNS, SCHEMA

    builder = EpisodeBuilder(AGENTS, 2 * CONTEXT_DIM + 4, has_feedback=True, asked=[asked or {}])
    columns = {name: pa.array([(LATER_COLUMNS | line)[name] for line in lines], SCHEMA.field(name).type) for name in COLUMNS}
    builder.add(pa.table(columns), 0)
    return builder.build()


def test_answers_are_classed_by_step_and_what_was_cut_or_lost_has_none() -> None:
    lines = rows(3)
    lines[1]["finish_reason"] = "length"
    lines[4]["status"] = "failed"
    lines[6]["text"] = " "
    found = episodes_of(lines)
    assert found.answer_NA.tolist() == [[0, -1, 1], [0, -2, 1], [-1, 0, 1]]
    assert found.length_NA[0].tolist() == [9.0, 19.0, 12.0]


def test_scores_weights_and_noise_of_the_targets() -> None:
    lines = rows(3)
    lines[4]["status"] = "failed"
    lines[5]["propensity"] = 0.25
    lines[8]["entropy_tokens"] = 0  # nothing is known of its entropy, and it said something all the same
    episodes = episodes_of(lines)
    right_NA = np.array([[0.9, 0.9, 0.5], [0.8, np.nan, 0.2], [0.7, 0.7, 0.1]])
    scale = Scale(score="posterior", eta=1.0, anchors=None, target_NA=right_NA)
    data = build_data(episodes, Split(train_Q=np.arange(2), held_Q=np.array([2])), scale)
    assert data.score_NA[0] == pytest.approx([-math.log(9), -math.log(9), 0.0])
    assert data.ran_NA.tolist() == [[True, True, True], [True, False, True], [True, True, True]]
    assert data.weight_NA.tolist() == [[1, 1, 1], [1, 0, 4], [1, 1, 1]]
    assert not data.noise_NA.any()


def test_a_gate_learns_the_mean_of_what_the_step_says_and_what_its_kind_foretells() -> None:
    lines = rows(20)
    lines[4]["status"] = "failed"
    lines[6]["text"] = " "
    episodes, spec = episodes_of(lines), Gate(replace_spec()).spec
    model = fit_judge(episodes, np.arange(20), spec, seed=0)
    scale = judged(Scale(score="posterior", eta=1.0, anchors=None), model, episodes, spec)
    right, target = scale.right_NA, scale.target_NA
    assert right is not None
    assert target is not None
    found = witnesses_of_steps(episodes, np.arange(20), spec)
    assert right == pytest.approx(np.where(found.asked, model.right_probability(found), np.nan), nan_ok=True)
    each = [model.foretold(found.only(np.arange(3) == np.full((20, 1), agent)))[:, agent] for agent in range(3)]
    usual = model.foretold(replace(found, doubt_RA=usual_doubts(found)))
    assert target[3:] == pytest.approx((right[3:] + usual[3:]) / 2)
    assert np.abs(model.foretold(found) - np.stack(each, axis=1)).max() < 0.2  # it is its own; lengths of the others shift it
    assert np.isnan(target[1, 1])
    assert (target[2, 0], right[2, 0]) == (0.0, 0.0)  # no answer is no guess
    outcome = np.full(right.shape, np.nan)
    outcome[5, 0] = 1.0
    told = judged(scale, model, replace(episodes, outcome_NA=outcome), spec)
    assert told.target_NA is not None
    assert told.right_NA is not None
    assert told.target_NA[5].tolist() == told.right_NA[5].tolist()
    assert told.target_NA[6] == pytest.approx(target[6])


USUAL_LOG_NATS = np.array(
    [
        [-4.6, -3.6, -1.0, -1.8, -0.6, -1.9],
        [-0.3, -5.9, -0.9, -1.7, -0.7, -2.3],
        [-2.3, -1.0, -6.5, -3.1, -0.7, 0.2],
        [-1.8, -2.6, -1.0, -7.3, -0.7, -0.2],
        [0.1, -1.4, -1.3, -1.9, -3.6, -0.9],
        [-1.2, -1.5, -1.1, -1.5, -0.7, -5.7],
    ]
)
"""By kind of query and agent, an expert for each; about what the packaged specialists show."""


def test_an_expert_that_is_now_and_then_less_sure_keeps_its_kind_from_a_sure_stranger() -> None:
    """On the first kind the second agent is always fairly sure and wrong, the expert between very sure and unsure.

    Few queries are of the second agent's own kind. Judged reply by reply, the stranger took the expert's unsure ones: 5 of 48.
    """
    spread = np.where(np.eye(6) > 0, 0.6, 0.5)
    spread[0, 0] = 1.7
    kind = np.repeat(np.arange(6), [6, 3, 7, 8, 6, 6])
    taken = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        witnesses = Witnesses(
            answer_RA=np.tile(np.arange(6), (len(kind), 1)),
            doubt_RA=rng.normal(USUAL_LOG_NATS[kind], spread[kind]),
            length_RA=np.full((len(kind), 6), 20.0),
            outcome_RA=np.full((len(kind), 6), np.nan),
            embedding_RD=np.eye(6)[kind] + rng.normal(0, 0.15, (len(kind), 6)),
        )
        model = fit_label_model(witnesses, seed=0)
        target = learnt(model, witnesses, model.right_probability(witnesses))
        taken += int((target[kind == 0].argmax(axis=1) != 0).sum())
    assert taken <= 2


def test_a_label_model_needs_dense_steps_or_an_earlier_one() -> None:
    episodes, spec = episodes_of(rows(5)), Gate(replace_spec()).spec
    with pytest.raises(
        ConfigError, match=r"score is 'posterior'; it needs 8 dense steps to learn from, and these rollouts have 5"
    ):
        fit_judge(episodes, np.arange(5), spec, seed=0)
    earlier = fit_judge(episodes_of(rows(20)), np.arange(20), spec, seed=0)
    assert fit_judge(episodes, np.arange(5), spec, seed=0, earlier=earlier) is earlier


def half_explored(text: str) -> Episodes:
    """Forty queries; `good` was asked of the last twenty by chance alone, and `fine` said `text` to them."""
    lines = rows(40)
    for number, line in enumerate(lines):
        if number >= 60 and line["agent"] == "good":
            line["propensity"] = 0.5
        if number >= 60 and line["agent"] == "fine":
            line["text"] = text
    return episodes_of(lines)


def test_steps_explored_by_chance_move_neither_label_model_nor_competence() -> None:
    spec, split = replace(replace_spec(), head="linear"), Split(train_Q=np.arange(10), held_Q=np.arange(10, 40))
    found = []
    for text in ("Answer: 5", "Answer: 17"):
        episodes = half_explored(text)
        model = fit_judge(episodes, np.arange(40), spec, seed=0)
        scale = judged(Scale(score="posterior", eta=1.0, anchors=None), model, episodes, spec)
        assert scale.target_NA is not None
        scale.target_NA[20:] = [0.99, 0.5, 0.01] if text == "Answer: 5" else [0.01, 0.5, 0.99]
        gate = init_gate(spec, seed=0)
        began = gate.head_bias.tolist()
        _credit_competence(gate, FittedTargets(episodes=episodes, data=build_data(episodes, split, scale), scale=scale))
        found.append((model.digest(), gate.head_bias.tolist()))
    assert found[0] == found[1]
    assert found[0][1] != began


def replace_spec() -> Any:
    from dmoa.core.gate import GateSpec

    return GateSpec.from_config(pool().gate, AGENTS)


def test_preferences_of_a_gate_count_for_what_held_back_rows_say() -> None:
    """Agents of 90, 60, 30 %: a gate of noise is led by competence, one that knows who is right of which query is left alone."""
    rng = np.random.default_rng(0)
    model = by_hand([0.9, 0.6, 0.3])
    right = (rng.random((200, 3)) < np.array([0.9, 0.6, 0.3])) * 0.9 + 0.05
    noise = rng.normal(0, 0.1, right.shape)
    noise[:, 2] += 0.1  # its favourite
    led = noise + competence_bias(model, noise, right, 0.1)
    assert (noise.argmax(axis=1) == 0).mean() < 0.5 < 0.9 < (led.argmax(axis=1) == 0).mean()
    knows = np.eye(3)[rng.integers(0, 3, 200)]
    alone = competence_bias(model, knows, np.where(knows > 0, 0.95, 0.05), 0.1)
    assert (np.abs(alone) < 0.05).all()
    missing = np.where(np.arange(3) == 2, np.nan, right)
    assert competence_bias(model, noise, missing, 0.1)[0] > 0


def test_a_gate_trained_on_posteriors_leaves_the_sure_liar_out(trained: tuple[Path, Any, list[str]]) -> None:
    _, result, lines = trained
    assert result.report.load["liar"] == 0.0
    assert result.record.score == "posterior"
    metrics = result.record.metrics
    assert metrics["right"] > 0.9
    assert metrics["right_first"] > 0.9
    assert metrics["agents"] <= 1.3
    assert [line for line in lines if line.startswith("label model: ")] == result.report.trust
    assert "agreement" in result.report.trust[0]
    assert "liar" not in result.report.trust[0]


def test_the_checkpoint_carries_the_label_model(trained: tuple[Path, Any, list[str]], tmp_path: Path) -> None:
    folder, result, _ = trained
    gate, record = checkpoint.load(folder)
    assert gate.label_model is not None
    assert record.version == result.record.version
    again = checkpoint.save(tmp_path / "again", gate, record)
    assert checkpoint.load(again)[0].label_model.digest() == gate.label_model.digest()  # type: ignore[union-attr]
    assert gate.spec.fitted_left is not None
    other = replace(gate.label_model, ability_CA=gate.label_model.ability_CA + 1.0)
    changed = Gate(gate.spec, label_model=other)
    changed.load_state_dict(gate.state_dict())
    assert checkpoint.weights_version(changed) != record.version
    checkpoint.save(tmp_path / "mixed", changed, record)
    with pytest.raises(CheckpointError, match="damaged or mixed"):
        checkpoint.load(tmp_path / "mixed")


async def ask(gate: Gate, fates: Mapping[str, Fate], config: Config) -> tuple[Answer, FakeAgents, Trace]:
    agents = FakeAgents(fates)
    swarm = Swarm(config, agents=agents, router=router_of(gate), encoder=HashEncoder())
    asked = Query(trace_id="t", text="12 + 7?", limits=Limits(max_steps=4))
    events = [event async for event in swarm.ask(asked)]
    assert isinstance(events[-1], Answer)
    return events[-1], agents, AnsweredQuery(query=asked, answer=events[-1]).trace()


SAID = {
    "good": Say(text="Answer: 19", nats=0.4),
    "fine": Say(text="So, Answer: 19", nats=0.5),
    "liar": Say(text="Answer: 42", nats=0.01),
}


async def test_one_competent_agent_is_enough_and_the_liar_is_not_asked(trained: tuple[Path, Any, list[str]]) -> None:
    gate, _ = checkpoint.load(trained[0])
    answer, agents, _ = await ask(gate, SAID, pool())
    assert [call.agent for call in agents.calls] != ["liar"]
    assert len(agents.calls) == 1
    assert (answer.stop_reason, len(answer.steps)) == ("sure", 1)
    (step,) = answer.steps
    assert step.right_probability is not None
    assert step.right_probability > 0.8
    assert step.replies[0].right_probability == step.right_probability


async def test_a_step_judges_replies_and_asks_whoever_is_worth_most(trained: tuple[Path, Any, list[str]]) -> None:
    gate, _ = checkpoint.load(trained[0])
    with_liar = Gate(replace(gate.spec, mass=0.5, fitted_left=None, theta=-50.0), label_model=gate.label_model)
    with_liar.head_bias.data[2] = 5.0  # the liar first, whatever is asked
    answer, agents, trace = await ask(with_liar, SAID, pool())
    first = answer.steps[0]
    assert agents.calls[0].agent == "liar"
    assert agents.calls[1].agent in ("good", "fine")
    assert first.summary.endswith("Answer: 19")
    by_name = {reply.agent: reply.right_probability for reply in first.replies}
    assert by_name["liar"] < 0.2 < first.right_probability  # type: ignore[operator]
    shown = trace.dmoa.steps[0]
    assert shown.right_probability == round(first.right_probability, 6)  # type: ignore[arg-type]
    assert {agent.name: agent.right_probability for agent in shown.agents if agent.status == "ok"} == {
        name: round(p, 6) for name, p in by_name.items() if p is not None
    }


async def test_a_trace_with_a_label_model_replays_bit_for_bit(trained: tuple[Path, Any, list[str]], tmp_path: Path) -> None:
    gate, _ = checkpoint.load(trained[0])
    fates = SAID | {"good": Say(text="Answer: 3", nats=0.1234567891)}
    _, _, trace = await ask(gate, fates, pool())
    (read,) = read_traces(write_traces(tmp_path / "t.jsonl", [trace]))
    assert replay_routing([read], gate, "v1")[0].differences == ()
    step = read.dmoa.steps[0]
    lied = step.model_copy(update={"right_probability": 0.123})
    changed = read.model_copy(update={"dmoa": read.dmoa.model_copy(update={"steps": [lied, *read.dmoa.steps[1:]]})})
    (difference,) = replay_routing([changed], gate, "v1")[0].differences
    assert difference.startswith("step 0: right_probability was (0.123, ")


async def test_replies_are_not_judged_again_by_words_that_were_taken_out(trained: tuple[Path, Any, list[str]]) -> None:
    """A server that keeps traces takes secrets out of their texts: then two different ones agree."""
    gate, _ = checkpoint.load(trained[0])
    all_asked = Gate(replace(gate.spec, mass=0.999, fitted_left=None, theta=-50.0), label_model=gate.label_model)
    keys = {name: Say(text=f"Answer: sk-{letter * 40}") for name, letter in zip(SAID, "abc", strict=True)}
    _, _, trace = await ask(all_asked, keys, pool())
    kept = Trace.model_validate(without_secrets(trace.model_dump(mode="json")))
    assert {agent.text for agent in kept.dmoa.steps[0].agents if agent.status == "ok"} == {"Answer: [redacted]"}
    assert replay_routing([kept], all_asked, "v1")[0].differences == ()


async def test_without_a_label_model_nothing_is_judged(trained: tuple[Path, Any, list[str]]) -> None:
    gate, _ = checkpoint.load(trained[0])
    gate.label_model = None
    answer, _, trace = await ask(gate, SAID, pool())
    assert all(step.right_probability is None for step in answer.steps)
    assert "right_probability" not in trace.dmoa.model_dump_json()
    assert judge(decision({"good": 0.5, "fine": 0.5}, 1), [said("good", Say(text="1"))], asked="") is None


def test_what_was_asked_tells_the_form_of_answers() -> None:
    lines = rows(1)
    for line, text in zip(lines, ("Answer: 'a'", "Answer: 'A'", 'Answer: "a"'), strict=True):
        line["text"] = text
    assert answers_to("assert f(1) == ??", lines) == [[0, 1, 0]]
    assert answers_to("Which letter?", lines) == [[0, 0, 0]]


def answers_to(asked: str, lines: list[dict[str, Any]]) -> list[list[int]]:
    found: list[list[int]] = episodes_of(lines, {("q000", -1): asked}).answer_NA.tolist()
    return found


def test_outcomes_decide_where_nobody_agrees_and_the_gate_says_so(tmp_path: Path) -> None:
    lines = rows(24)
    for number, line in enumerate(lines):
        line["text"], line["entropy_sum_nats"], line["entropy_sq_sum"] = f"Answer: {5000 + number}", 8 * 0.4, 8 * 0.16
    folder = write_rollouts(tmp_path / "rollouts", lines, pool())
    known = [
        {"query_id": f"q{number:03d}", "agent": name, "reward": float(name == "fine"), "source": "users"}
        for number in range(20)
        for name in AGENTS
    ]
    (tmp_path / "outcomes.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in known), encoding="utf-8")
    told = train(tmp_path / "told", folder, pool(), outcomes=tmp_path / "outcomes.jsonl")
    untold = train(tmp_path / "untold", folder, pool())
    assert (told.record.supervision, untold.record.supervision) == ("outcomes(60)", "none")
    gate, record = checkpoint.load(tmp_path / "told" / "checkpoint")
    assert record.supervision == "outcomes(60)"
    assert record.version.startswith("outcomes-60-")
    assert [supervision_of(found.record.version) for found in (told, untold)] == ["outcomes(60)", "none"]
    assert gate.label_model is not None
    assert gate.label_model.order[0] == AGENTS.index("fine")
    assert 1 / (1 + np.exp(-gate.label_model.ability_CA[:, 1].mean())) > 0.7
    with pytest.raises(ConfigError, match="--outcomes: score is 'anchored', which reads none; add --score posterior"):
        train(tmp_path / "other", folder, pool(), outcomes=tmp_path / "outcomes.jsonl", score="anchored")
    (tmp_path / "strange.jsonl").write_text('{"query_id": "elsewhere", "reward": 1}', encoding="utf-8")
    with pytest.raises(ConfigError, match="--outcomes: none of 1 outcomes is of a query and an agent of these rollouts"):
        train(tmp_path / "none", folder, pool(), outcomes=tmp_path / "strange.jsonl")


def test_an_outcome_that_is_of_two_folders_counts_once_and_what_matched_is_told(tmp_path: Path) -> None:
    first, second = (write_rollouts(tmp_path / f"r{number}", rows(24), pool(), round=number) for number in (0, 1))
    known = [{"query_id": f"{name}{number:03d}", "agent": "good", "reward": 1} for name in ("q", "z") for number in range(5)]
    (tmp_path / "outcomes.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in known), encoding="utf-8")
    lines: list[str] = []
    values = {"outcomes": tmp_path / "outcomes.jsonl", "rollouts": f"{first},{second}", "out": tmp_path / "gate", "epochs": 1}
    context = TrainContext(say=lines.append)
    told = run_training(TrainOptions.parse({**values, "workers": 0, "track": "none"}), pool(), context)
    assert told.record.supervision == "outcomes(5)"
    assert any(line.startswith("5 of 10 outcomes are of these rollouts; the others are of other queries") for line in lines)


def test_an_outcome_is_of_the_newest_folder_that_has_its_query(tmp_path: Path) -> None:
    ends, given = (9.0, 5.0), [Outcome(query_id=name, agent="good", reward=1.0) for name in ("q000", "q003")]
    folders = [
        write_rollouts(tmp_path / f"r{number}", rows(count), pool(), round=number, ended_unix_s=end)
        for number, (count, end) in enumerate(zip((2, 4), ends, strict=True))
    ]
    spec = GateSpec.from_config(pool().gate, AGENTS)
    manifests = read_manifests(folders, spec, fingerprint(pool()))
    episodes = read_episodes(folders, spec, fingerprint(pool()), on_ray=False)
    told, count = with_outcomes(episodes, given, folders, manifests)
    judged_ = {
        (key.folder, key.query_id) for key, row in zip(told.key_Q, told.start_Q, strict=False) if told.outcome_NA[row, 0] == 1
    }
    assert (judged_, count) == ({(0, "q000"), (1, "q003")}, 2)


def test_two_folders_may_ask_different_things_by_one_name(tmp_path: Path) -> None:
    lines = rows(1)
    for line, text in zip(lines, ("Answer: 'a'", "Answer: 'A'", 'Answer: "a"'), strict=True):
        line["text"] = text
    folders = []
    for name, asked in (("code", "assert f(1) == ??"), ("letters", "Which letter?")):
        folder = RolloutFolder(write_rollouts(tmp_path / name, lines, pool()))
        query = RolloutQuery(query_id="q000", source="s", split="train", text=asked)
        folder.queries.write_text(query.model_dump_json() + "\n", encoding="utf-8")
        folders.append(folder.root)
    read = read_episodes(folders, Gate(replace_spec()).spec, fingerprint(pool()), on_ray=False)
    assert read.answer_NA.tolist() == [[0, 1, 0], [0, 0, 0]]


def test_lengths_are_not_known_in_traffic() -> None:
    """A reply's text is a token of its answer there."""
    episodes = episodes_of([line | {"query_id": f"{MARK}{line['query_id']}"} for line in rows(3)])
    witnesses = witnesses_of_steps(episodes, np.arange(3), Gate(replace_spec()).spec)
    assert np.isnan(witnesses.length_RA).all()
    assert (witnesses.answer_RA == [0, 0, 1]).all()


def test_replies_without_answers_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    prose = "It happens since light scatters.\n\nShorter waves scatter more than longer ones do.\n\nI hope this helps you, {}!"
    lines = [line | {"text": prose.format(line["agent"])} for line in rows(24)]
    folder = write_rollouts(tmp_path / "prose", lines, pool())
    with pytest.raises(ConfigError, match=r"no answer can be read from these replies: in 0 of \d+ steps .*use --score anchored"):
        train(tmp_path / "gate", folder, pool())
    assert StateStore(str(tmp_path / "gate" / "state")).read_progress() is None
    assert train(tmp_path / "anchored", folder, pool(), score="anchored", epochs=1).record.metrics["agents"] >= 1


def test_held_back_replies_without_answers_leave_tau_and_theta() -> None:
    episodes, spec = episodes_of(rows(24)), Gate(replace_spec()).spec
    held_Q = np.arange(20, 24)
    answer_NA = np.where(np.isin(np.arange(24), held_Q)[:, None], NO_ANSWER, episodes.answer_NA)
    episodes = replace(episodes, answer_NA=answer_NA)
    model = fit_judge(episodes, np.arange(20), spec, seed=0)
    scale = judged(Scale(score="posterior", eta=1.0, anchors=None), model, episodes, spec)
    data = build_data(episodes, Split(train_Q=np.arange(20), held_Q=held_Q), scale)
    options = TrainOptions.parse({"rollouts": "r", "out": "o"})
    fitted, metrics = fit_spec(init_gate(spec, seed=0), FittedTargets(episodes=episodes, data=data, scale=scale), options)
    assert (fitted.mass, fitted.theta, metrics) == (spec.mass, spec.theta, {})
