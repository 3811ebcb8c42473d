"""What a replica raised at its start, as Serve tells it, becomes one line with agents, model and cause."""

from __future__ import annotations

import pytest

from dmoa.config import Config
from dmoa.errors import ConfigError
from dmoa.serving.failures import explain, last_words, loading, news, raised

OURS = """The deployment failed to start 1 times in a row. This may be due to a problem with its constructor. Error:
ray::ServeReplica:dmoa:llm-t.initialize_and_get_metadata() (pid=7, ip=192.0.2.2, actor_id=ab, repr=<ray.serve>)
  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 449, in result
    return self.__get_result()
RuntimeError: Traceback (most recent call last):
  File "/srv/dmoa/agents/loading.py", line 65, in load_model
    raise ConfigError(
dmoa.errors.ConfigError: llms.t.model: '/m' is not a folder with a language model"""
OTHERS = """Error:
Traceback (most recent call last):
  File "x.py", line 1, in f
torch.OutOfMemoryError: CUDA out of memory.
Tried to allocate 2 GiB;   api_key=sk-abcdefghijklmnopqrstuvwxyz123456"""
NO_ROOM = """Deployment 'llm-t' in application 'dmoa' has 1 replicas that have taken more than 30s to be scheduled. This may be
due to waiting for the cluster to auto-scale or for a runtime environment to be installed. Resources required for each replica:
{"CPU": 1.0, "GPU": 0.5}, total resources available: {"CPU": 3.0}. Use `ray status` for more details."""
POOL = Config.model_validate(
    {
        "name": "pool",
        "llms": {
            "s": {"model": "scripted:x", "engine": "scripted", "placement": "dedicated"},
            "t": {"model": "path:/m", "engine": "transformers"},
        },
        "agents": [{"name": f"a{number}", "llm": "st"[number > 0], "profile": "Adds."} for number in range(3)],
    }
)


def test_the_last_exception_is_found() -> None:
    assert raised(OURS) == ("ConfigError", "llms.t.model: '/m' is not a folder with a language model")
    found = raised(OTHERS)
    assert found is not None
    kind, words = found
    assert kind == "torch.OutOfMemoryError"
    assert words.startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB; ")
    assert "abcdefghijklmnopqrstuvwxyz" not in words


@pytest.mark.parametrize(
    "text", ["", "1 replicas that have taken more than 30s to initialize.\nThis may be caused by a slow __init__"]
)
def test_other_messages_are_no_exception(text: str) -> None:
    assert raised(text) is None


def test_last_words_are_one_line() -> None:
    assert last_words(OURS) == "llms.t.model: '/m' is not a folder with a language model"
    assert last_words("Failed to update\nthe deployments ['llm-t'].") == "Failed to update the deployments ['llm-t']."
    assert last_words(ConfigError()) == "ConfigError"
    assert len(last_words("ValueError: " + "x" * 5000)) == 600


def test_a_deployment_is_told_by_its_agents() -> None:
    assert explain(POOL, "agent-a0", "E: x") == "agent a0 (llms.s.model 'scripted:x'): no replica started: E: x"
    assert explain(POOL, "llm-t", "E: x") == "agents a1, a2 (llms.t.model 'path:/m'): no replica started: E: x"
    assert explain(POOL, "llm-t", "llms.t.model: x") == "agents a1, a2: no replica started: llms.t.model: x"
    assert explain(POOL, "encoder", "E: x") == "encoder: it did not start: E: x"


def test_a_deployment_that_is_ready_is_told_of_once() -> None:
    told: set[str] = set()
    states = {"agent-a0": "HEALTHY", "llm-t": "UPDATING", "encoder": "UPDATING"}
    assert news(POOL, states, told) == ["ready: agent a0 (1 of 3)"]
    assert news(POOL, states, told) == []
    assert loading(POOL, states) == "agents a1, a2 (llms.t.model 'path:/m'); encoder"
    assert loading(POOL, {"encoder": "HEALTHY"}) == ""
    assert news(POOL, dict.fromkeys(states, "HEALTHY"), told) == ["ready: agents a1, a2 (3 of 3)", "ready: encoder (3 of 3)"]


def test_a_replica_without_room_is_told_with_what_it_needs() -> None:
    states = {"llm-t": "UPDATING", "encoder": "UPDATING"}
    told = loading(POOL, states, {"llm-t": NO_ROOM, "encoder": ""})
    room = 'for which Ray has no room yet: a replica needs {"CPU": 1.0, "GPU": 0.5}, free are {"CPU": 3.0}'
    assert told == f"agents a1, a2 (llms.t.model 'path:/m'), {room}; encoder"
    told = loading(POOL, states, {"llm-t": "replicas to be scheduled,\nin other words", "encoder": ""})
    assert "no room yet: replicas to be scheduled, in other words; encoder" in told
