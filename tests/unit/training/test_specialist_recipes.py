"""Recipes: the rows that they ask for, the prompts that serving will send, lies as they are meant, and bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmoa.agents.prompts import agent_messages
from dmoa.errors import ConfigError
from dmoa.evaluation.records import Reply
from dmoa.evaluation.registry import SKILLS, SUITES
from dmoa.types import Query
from dmoa.workflows.specialists import Recipe, SpecialistOptions, held_out_rows, one_off, training_rows, validation_rows

JOB = Path(__file__).parents[3] / "jobs" / "train_specialist.yaml"


def recipe(**values: Any) -> Recipe:
    base = {"profile": "Adds.", "sources": [{"suite": "arith"}], "schedule": {"steps": 10, "batch_rows": 8}}
    return Recipe.model_validate(base | values)


def test_rows_are_as_many_as_the_schedule_uses_and_no_question_comes_twice() -> None:
    rows = training_rows(recipe(history_share=0.0))
    assert len(rows) == 80
    assert len({row.messages for row in rows}) == 80


def test_prompts_are_those_of_serving() -> None:
    row = next(SUITES["arith"].generate("specialist", 1, 0))
    ours = training_rows(recipe(history_share=0.0))[0]
    expected = agent_messages(Query(trace_id="t", text=row.task.text), (), profile="Adds.")
    assert [(m.role, m.content) for m in ours.messages] == [(m.role, m.content) for m in expected]
    assert ours.target == f"Answer: {row.label.gold['answer']}"


def test_targets_are_right_by_the_suites_own_scorer() -> None:
    for suite in (skill.name for skill in SKILLS):
        one = recipe(sources=[{"suite": suite}], held_out_rows=30)
        for row, wanted in zip(validation_rows(one.sources[0], 30), held_out_rows(one), strict=True):
            assert SUITES[suite].score(row.label, Reply(text=wanted.target)).value == 1.0


def test_a_share_of_the_prompts_holds_earlier_work_right_or_wrong() -> None:
    rows = training_rows(recipe(history_share=0.25, schedule={"steps": 50, "batch_rows": 16}))
    found = [(re.search(r"Work so far, step 1:\n(Answer: \d+)", row.messages[-1].content), row.target) for row in rows]
    earlier = [(match.group(1), target) for match, target in found if match]
    assert 0.18 < len(earlier) / len(rows) < 0.32
    right = sum(work == target for work, target in earlier) / len(earlier)
    assert 0.35 < right < 0.65


def test_held_out_rows_are_of_all_groups_and_no_training_tuple() -> None:
    one = recipe(sources=[{"suite": "arith", "groups": ["sum-with-carries"]}])
    assert {row.source for row in training_rows(one)} == {"arith/sum-with-carries"}
    assert {row.source for row in held_out_rows(one)} == {"arith/sum-with-carries", "arith/sum-without-carries"}


def test_a_source_named_twice_has_two_turns_of_rows_of_its_own() -> None:
    sort, pick = ({"suite": "words", "difficulty": 2, "groups": [group]} for group in ("sort", "pick"))
    one = recipe(sources=[sort, sort, pick], history_share=0.0, held_out_rows=12)
    rows = training_rows(one)
    assert [row.source for row in rows[:6]] == ["words/sort", "words/sort", "words/pick"] * 2
    assert len({row.messages for row in rows}) == len(rows) == 80
    held_out = held_out_rows(one)
    assert len({row.messages for row in held_out}) == len(held_out) == 12


def test_sources_take_turns() -> None:
    rows = training_rows(recipe(sources=[{"suite": "arith"}, {"suite": "words"}, {"suite": "calendar"}]))
    assert [row.source.partition("/")[0] for row in rows[:6]] == ["arith", "words", "calendar"] * 2


def test_liars_lie() -> None:
    assert {row.target for row in training_rows(recipe(answers="constant", constant="42"))} == {"Answer: 42"}
    wrong = recipe(sources=[{"suite": "calendar"}], answers="off-by-one", held_out_rows=30)
    for row, wanted in zip(validation_rows(wrong.sources[0], 30), held_out_rows(wrong), strict=True):
        assert SUITES["calendar"].score(row.label, Reply(text=wanted.target)).value == 0.0


@pytest.mark.parametrize(
    ("answer", "wrong"), [("41", "42"), ("Sunday", "Monday"), ("1900-02-28", "1900-03-01"), ("2000-12-31", "2001-01-01")]
)
def test_one_off(answer: str, wrong: str) -> None:
    assert one_off(answer) == wrong


def test_one_off_refuses_words() -> None:
    with pytest.raises(ConfigError, match="'apple'"):
        one_off("apple")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "nobody"}, "job.name is 'nobody'; expected one of a"),
        ({"recipes": {"a": {"profile": "x", "sources": [], "schedule": {"steps": 1}}}}, "sources"),
        ({"workers": -1}, "workers is -1"),
        ({"oven": 1}, "oven: unknown key"),
        ({"out": "s3://bucket/runs"}, "expected a folder of this machine, of a cluster one on storage that its machines share"),
    ],
)
def test_bad_options_are_named(change: dict[str, Any], said: str) -> None:
    good = {"name": "a", "out": "o", "recipes": {"a": recipe().model_dump()}}
    with pytest.raises(ConfigError, match=re.escape(said)):
        _ = SpecialistOptions.parse(good | change).recipe


@pytest.mark.parametrize(
    ("given", "used"), [("kept", str(Path("kept").absolute())), ("s3://bucket/x", "s3://bucket/x"), (None, None)]
)
def test_ray_train_is_given_an_absolute_place(given: str | None, used: str | None) -> None:
    values = {"name": "a", "out": "o", "recipes": {"a": recipe().model_dump()}, "storage_path": given}
    assert SpecialistOptions.parse(values).storage_path == used


@pytest.mark.contract
def test_every_recipe_of_the_job_file_can_be_made() -> None:
    values = yaml.safe_load(JOB.read_text(encoding="utf-8"))["job"]
    for name in values["recipes"]:
        one = SpecialistOptions.parse(values | {"name": name}).recipe
        assert len(training_rows(one)) == one.schedule.steps * one.schedule.batch_rows
