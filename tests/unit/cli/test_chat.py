"""`dmoa chat`: turns remember earlier turns, commands, errors of one turn, here and through a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def talk(dmoa: Any, *args: object, lines: list[str]) -> Any:
    return dmoa("chat", *args, input="".join(line + "\n" for line in lines))


def prompt_tokens(turn: Any) -> int:
    return sum(agent["prompt_tokens"] for agent in turn["dmoa"]["steps"][0]["agents"])


def test_earlier_turns_go_with_the_question_until_cleared(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    lines = ["What is 12 + 7?", "What is 12 + 7?", "", "/clear", "What is 12 + 7?"]
    result = talk(dmoa, "--config", pool, "--policy", "single", "--json", tmp_path / "c.json", lines=lines)
    assert result.exit_code == 0, result.stderr
    first, second, third = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["turns"]
    assert prompt_tokens(second) > prompt_tokens(first)
    assert prompt_tokens(third) == prompt_tokens(first)
    turns = result.stdout.split("step 1 ")[1:]
    assert [turn.count("answer\nThe answer is 19.\nstopped by") for turn in turns] == [1, 1, 1], "an answer follows its step"
    assert "\n\n" not in result.stdout


def test_quit_ends_the_chat(dmoa: Any, pool: Path) -> None:
    result = talk(dmoa, "--config", pool, "-q", lines=["/quit", "What is 12 + 7?"])
    assert (result.exit_code, result.stdout) == (0, "")


def test_steps_are_hidden_and_shown(dmoa: Any, pool: Path) -> None:
    result = talk(dmoa, "--config", pool, "--max-steps", 1, lines=["/steps", "one", "/steps", "two"])
    assert result.stdout.count("step 1 ") == 1
    assert result.stdout.index("answer\n") < result.stdout.index("step 1 ")


def test_the_policy_can_be_changed(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    result = talk(dmoa, "--config", pool, "--json", tmp_path / "c.json", lines=["one", "/policy single", "two"])
    assert result.exit_code == 0
    turns = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["turns"]
    assert [turn["dmoa"]["policy"] for turn in turns] == ["dmoa", "single"]


def test_a_failed_turn_does_not_end_the_chat(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    lines = ["/agent guesser", "one", "/policy single", "two", "/fly"]
    fails = ("--set", "llms.fake.engine_kwargs.failing=[guesser]")
    result = talk(dmoa, "--config", pool, *fails, "--json", tmp_path / "c.json", lines=lines)
    assert result.exit_code == 1
    assert "dmoa: guesser answers" in result.stderr
    assert "/fly is not a command" in result.stderr
    assert len(json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["turns"]) == 1


def test_a_chat_through_a_server(dmoa: Any, url: str, tmp_path: Path) -> None:
    result = talk(dmoa, "--url", url, "--policy", "single", "--json", tmp_path / "c.json", lines=["What is 12 + 7?"] * 2)
    assert result.exit_code == 0, result.stderr
    first, second = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["turns"]
    assert prompt_tokens(second) > prompt_tokens(first)
    assert first["answer"] == "The answer is 19."


def test_help_history_and_one_agent(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    lines = ["/history", "one", "/agent adder", "two", "/agent", "three", "/history", "/help"]
    result = talk(dmoa, "--config", pool, "--json", tmp_path / "c.json", lines=lines)
    turns = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["turns"]
    assert [turn["dmoa"]["policy"] for turn in turns] == ["dmoa", "single", "dmoa"]
    assert [agent["name"] for agent in turns[1]["dmoa"]["steps"][0]["agents"]] == ["adder"]
    assert "nothing was asked yet" in result.stderr
    assert "1. one\n2. two\n3. three" in result.stderr
    assert result.stderr.count("/clear forgets the conversation") == 2


def test_a_server_without_the_policy_or_agent_is_told_before_a_question(dmoa: Any, url: str) -> None:
    for option, named in (("--policy", "expected one of dmoa, single"), ("--agent", "expected one of ")):
        result = talk(dmoa, "--url", url, option, "vote", lines=["What is 12 + 7?"])
        assert (result.exit_code, result.stdout) == (2, ""), result.stderr
        assert f"{option} is 'vote'; {named}" in result.stderr


@pytest.mark.parametrize("has_server", [False, True])
def test_what_nobody_answers_by_is_told_at_once_and_changes_nothing(
    dmoa: Any, pool: Path, url: str, has_server: bool, tmp_path: Path
) -> None:
    where = ("--url", url) if has_server else ("--config", pool)
    lines = ["/policy vote", "/agent nobody", "one", "/policy single", "/policy vote", "two"]
    result = talk(dmoa, *where, "--json", tmp_path / "c.json", lines=lines)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("--policy is 'vote'; expected one of dmoa, single") == 2
    assert "--agent is 'nobody'; expected one of " in result.stderr
    assert "vote answers" not in result.stderr
    turns = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["turns"]
    assert [turn["dmoa"]["policy"] for turn in turns] == ["dmoa", "single"]
