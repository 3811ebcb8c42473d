"""`dmoa chat`: turns remember earlier turns, commands, errors of one turn, here and through a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
    lines = ["/policy vote", "one", "/policy single", "two", "/fly"]
    result = talk(dmoa, "--config", pool, "--json", tmp_path / "c.json", lines=lines)
    assert result.exit_code == 1
    assert "'vote'; expected one of dmoa, single" in result.stderr
    assert "/fly is not a command" in result.stderr
    assert len(json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["turns"]) == 1


def test_a_chat_through_a_server(dmoa: Any, url: str, tmp_path: Path) -> None:
    result = talk(dmoa, "--url", url, "--policy", "single", "--json", tmp_path / "c.json", lines=["What is 12 + 7?"] * 2)
    assert result.exit_code == 0, result.stderr
    first, second = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["turns"]
    assert prompt_tokens(second) > prompt_tokens(first)
    assert first["answer"] == "The answer is 19."
