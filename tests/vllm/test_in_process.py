"""Commands that need no server start a vLLM of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

POOL = {
    "name": "alone",
    "llms": {
        "m": {
            "model": "embedded:smollm2-135m",
            "engine": "vllm",
            "max_num_seqs": 4,
            "engine_kwargs": {"dtype": "float32", "max_model_len": 512, "entropy": "listed"},
        }
    },
    "agents": [
        {"name": "base", "llm": "m", "profile": "General assistant.", "sampling": {"max_tokens": 12}},
        {
            "name": "words",
            "llm": "m",
            "adapter": "builtin:words",
            "profile": "Handles lists of words.",
            "sampling": {"max_tokens": 12},
        },
    ],
    "gate": {"activation": {"rule": "fixed", "max_agents": 2}},
    "limits": {"max_steps": 1},
}


@pytest.mark.accept
def test_a_question_is_answered_without_a_server(tmp_path: Path) -> None:
    config, found = tmp_path / "pool.yaml", tmp_path / "reply.json"
    config.write_text(yaml.safe_dump(POOL), encoding="utf-8")
    dmoa = str(Path(sys.executable).with_name("dmoa"))
    command = [dmoa, "run", "Sort these words: pear fig apple.", "--config", str(config), "--json", str(found), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    reply = json.loads(found.read_text(encoding="utf-8"))
    (step,) = reply["dmoa"]["steps"]
    assert {agent["name"]: agent["status"] for agent in step["agents"]} == {"base": "ok", "words": "ok"}
    for agent in step["agents"]:
        assert agent["entropy_kind"] == "truncated"
        assert agent["entropy_tokens"] == agent["completion_tokens"] > 0
        assert agent["entropy_slack_nats"] > 0
