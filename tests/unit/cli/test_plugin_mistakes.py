"""What authors of policies and engines are told of their mistakes: one line and status 2, with -v where it happened."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dmoa.agents.call_cache import call_identities
from dmoa.agents.pool import check_keys
from dmoa.config import Config, load
from dmoa.engine_options import ENGINES
from dmoa.errors import ConfigError
from dmoa.policies.registry import POLICIES
from dmoa.serving.placement import plan_of
from tests.unit.cli.conftest import Invoke

pytestmark = pytest.mark.usefixtures("as_before")

POLICY = """
from dmoa import policy
from dmoa.types import Activation, StepPlan, Stop

@policy("relay", "One after the other.")
class Relay:
    {name}

    def __init__(self, context):
        {init}

    async def next_step(self, state):
        {step}
"""


def policy_file(
    folder: Path, *, name: str = 'name = "relay"', init: str = "pass", step: str = "return Stop(reason='final')"
) -> Path:
    path = folder / "relay.py"
    path.write_text(POLICY.format(name=name, init=init, step=step), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"step": "return StepPlan(activations=(Activation(agent='addr'),))"},
            "next_step of step 1: agent 'addr' is not in the pool; expected adder, guesser, echo; did you mean 'adder'?",
        ),
        ({"name": "pass"}, "it has no `name`; write `name = 'relay'` in its class"),
        ({"step": "return {}['who']"}, "next_step of step 1 raised KeyError('who'); mend it, -v shows where"),
        ({"step": "return None"}, "next_step of step 1 is None; expected a Stop, or a StepPlan that asks somebody"),
        ({"step": "return StepPlan(activations=())"}, "expected a Stop, or a StepPlan that asks somebody"),
        ({"step": "return Stop(reason='done')"}, "next_step of step 1: reason is 'done'; expected summarizer, agreement, sure"),
        (
            {"step": "return StepPlan(activations=(Activation(agent='adder'),), fold='votes')"},
            "fold is 'votes'; expected summarizer, pass, vote, surest, keep; write one of these; did you mean 'vote'?",
        ),
        (
            {"step": "return StepPlan(activations=(Activation(agent='adder'),), ends_with='done')"},
            "stages, schedule, None; write one of these",
        ),
        (
            {"step": "return StepPlan(activations=('adder',))"},
            "activations.0 is 'adder'; expected a dictionary or an instance of Act",
        ),
        (
            {"step": "return StepPlan(activations=Activation(agent='adder'))"},
            "next_step of step 1: activations is Activation(agent",
        ),
        (
            {"step": "return StepPlan(activations=(Activation(agent='adder', history='19'),))"},
            "next_step of step 1: activations.0.history is '19'; expected a valid tuple; mend the plan",
        ),
        (
            {"step": "return StepPlan(activations=(Activation(agent='adder'),), quorum=0)"},
            "quorum is 0; expected a number greater",
        ),
        (
            {"step": "return StepPlan(activations=(Activation(agent='adder'),), mass='all')"},
            "mass is 'all'; expected a valid number",
        ),
        ({"step": "return StepPlan(activations=(Activation(agent='adder'),), decision=5)"}, "step 1: decision is 5; expected"),
        (
            {"step": "return StepPlan(activations=(Activation(agent='adder', temperature=float('nan')),))"},
            "activations.0: temperature is nan; expected a number from 0 to 2; mend the plan",
        ),
        (
            {"step": "return StepPlan(activations=(Activation(agent='adder', propensity=0.0),))"},
            "activations.0: propensity is 0.0; expected a number above 0, 1 at most",
        ),
        (
            {
                "step": "return StepPlan(activations=(Activation(agent='adder'),), fold='pass', ends_with='single')\n"
                "    def ended(self, state):\n        return len(state.steps)"
            },
            "ended is 1; expected the answer, a text",
        ),
        ({"init": "context.nothing"}, "building it raised AttributeError(\"'PolicyContext' object has no attribute 'nothing'\")"),
    ],
)
def test_a_policy_that_breaks_its_contract(parts: dict[str, str], said: str, dmoa: Invoke, pool: Path, tmp_path: Path) -> None:
    path = policy_file(tmp_path, **parts)
    found = dmoa("run", "Hi", "--config", pool, "--policy", f"{path}:Relay")
    assert found.exit_code == 2, found.output
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"dmoa: policy 'relay' ({path}:Relay): ")
    assert said in line


def test_the_place_of_a_mistake_is_shown_with_v(dmoa: Invoke, pool: Path, tmp_path: Path) -> None:
    path = policy_file(tmp_path, step="return {}['who']")
    found = dmoa("run", "Hi", "--config", pool, "--policy", f"{path}:Relay", "-v")
    assert found.exit_code == 2
    assert re.search(rf'File "{path}", line \d+, in next_step', found.stderr)
    assert "dmoa: policy 'relay'" in found.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["run", "serve", pytest.param("evaluate", marks=pytest.mark.contract)])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "'{path}' lacks a name; it is written FILE.py:NAME; in it Relay stands under @policy; name it {path}:Relay"),
        (":Rely", "'{path}' has no Rely; in it Relay stands under @policy; name it {path}:Relay; did you mean 'Relay'?"),
    ],
)
def test_a_policy_that_is_not_named_rightly(command: str, name: str, said: str, dmoa: Invoke, pool: Path, tmp_path: Path) -> None:
    path = policy_file(tmp_path)
    policy = f"{path}{name}"
    args = {
        "run": ("Hi", "--policy", policy),
        "serve": ("--dry-run", "--policy", policy),
        "evaluate": ("--benchmarks", "arith", "--policies", policy),
    }
    found = dmoa(command, "--config", pool, *args[command])
    assert found.exit_code == 2, found.output
    option = "--policies" if command == "evaluate" else "--policy"
    assert found.stderr.splitlines()[-1] == f"dmoa: {option}: {said.format(path=path)}"


def test_what_an_engines_file_defines_is_told_where_the_pool_names_none(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"llms.voice: engine: .*shout.py' lacks a name; it is written FILE.py:NAME; in it Shout"
    ):
        load(engine_pool(tmp_path), ["llms.voice.engine=shout.py"])


def test_an_engines_file_is_looked_for_in_two_folders(dmoa: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = engine_pool(tmp_path)
    found = dmoa("run", "Hi", "--config", path, "--set", "llms.voice.engine=none.py:Shout")
    assert found.exit_code == 2
    said = f"there is no 'none.py' in '{tmp_path}' nor in '{tmp_path / 'here'}'"
    assert f"llms.voice: engine: cannot load 'none.py:Shout': FileNotFoundError: {said}" in found.stderr


ENGINE = """
from dmoa import engine
from dmoa.engine_options import EngineOptions
from dmoa.types import Generation

class ShoutOptions(EngineOptions):
    url: str = ""
    split: tuple[int, int] | None = None

    @property
    def endpoint(self):
        return self.url

    @property
    def key_variable(self):
        return "SHOUT_KEY" if self.url else None

    @property
    def gpu_split(self):
        return self.split

    @property
    def gpu_kind(self):
        return "H100"

@engine("shout", options=ShoutOptions, model_prefix="shout", is_light=True, is_scripted=True)
class Shout:
    label = "shout"

    def __init__(self, context):
        {init}

    async def generate(self, request):
        raise RuntimeError("out of voice")

    async def stream(self, request):
        raise RuntimeError("out of voice")
        yield

    async def close(self):
        pass
"""
ENGINE_POOL = """
name: loud
llms:
  voice: {model: "shout:any", engine: "shout.py:Shout"}
agents:
  - {name: first, llm: voice, profile: Repeats the question.}
"""


def engine_pool(folder: Path, init: str = "pass") -> Path:
    (folder / "shout.py").write_text(ENGINE.format(init=init), encoding="utf-8")
    (folder / "pool.yaml").write_text(ENGINE_POOL, encoding="utf-8")
    return folder / "pool.yaml"


def test_an_engine_that_raises_is_to_be_mended_and_waiting_does_not_help(dmoa: Invoke, tmp_path: Path) -> None:
    path = engine_pool(tmp_path)
    found = dmoa("run", "Hi", "--config", path, "--policy", "single")
    assert found.exit_code == 1
    (line,) = found.stderr.splitlines()
    assert (
        line == "dmoa: no agent of the pool answered (first: failed, RuntimeError: out of voice); mend what failed, or ask again"
    )
    found = dmoa("run", "Hi", "--config", path, "--policy", "single", "-v")
    assert f'File "{tmp_path / "shout.py"}"' in found.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("finish_reason='done'", "finish_reason of its Generation is 'done'; expected stop, length, cancelled, error; mend"),
        ("text=None", "text of its Generation is None; expected a value of type str; mend"),
        ("usage=TokenUsage(completion_tokens=None)", "usage.completion_tokens of its Generation is None; expected a count; mend"),
        ("usage=TokenUsage(prompt_tokens=-1)", "usage.prompt_tokens of its Generation is -1; expected a count; mend"),
        ("usage=3", "usage of its Generation is 3; expected a value of type TokenUsage; mend"),
        ("entropy=0.5", "entropy of its Generation is 0.5; expected a value of type EntropySum; mend"),
    ],
)
def test_an_engine_that_gives_what_is_no_reply(changes: str, said: str, dmoa: Invoke, tmp_path: Path) -> None:
    path = engine_pool(tmp_path)
    text = (tmp_path / "shout.py").read_text(encoding="utf-8")
    given = "dict(text='x', finish_reason='stop', entropy=EntropySum(), usage=TokenUsage())"
    body = f"yield Generation(**{given} | dict({changes}))\n\n    async def close"
    text = text.replace('raise RuntimeError("out of voice")\n        yield\n\n    async def close', body)
    (tmp_path / "shout.py").write_text(text.replace("Generation\n", "EntropySum, Generation, TokenUsage\n", 1), encoding="utf-8")
    found = dmoa("run", "Hi", "--config", path, "--policy", "single")
    assert found.exit_code == 1, found.output
    (line,) = found.stderr.splitlines()
    assert f"first: failed, engine shout: {said} the engine" in line


def test_options_that_are_no_record_of_an_engines(dmoa: Invoke, tmp_path: Path) -> None:
    path = engine_pool(tmp_path)
    text = (tmp_path / "shout.py").read_text(encoding="utf-8")
    (tmp_path / "shout.py").write_text(text.replace("ShoutOptions(EngineOptions)", "ShoutOptions"), encoding="utf-8")
    found = dmoa("run", "Hi", "--config", path, "--policy", "single")
    assert found.exit_code == 2, found.output
    (line,) = found.stderr.splitlines()
    assert "@engine('shout'): options is <class '" in line
    assert "expected a subclass of EngineOptions; mend the file" in line


def test_an_engine_that_cannot_be_built(dmoa: Invoke, tmp_path: Path) -> None:
    path = engine_pool(tmp_path, init="1 / 0")
    found = dmoa("run", "Hi", "--config", path, "--policy", "single")
    assert found.exit_code == 2, found.output
    said = f"llms.voice.engine: '{tmp_path}/shout.py:Shout': building it raised ZeroDivisionError('division by zero'); mend it"
    assert said in found.stderr.splitlines()[-1]


def test_a_cached_reply_is_of_the_engines_content_wherever_its_file_is(tmp_path: Path) -> None:
    def identity(folder: Path, init: str = "pass") -> str:
        """As in a process that has not seen the file."""
        folder.mkdir(exist_ok=True)
        found = call_identities(load(engine_pool(folder, init)))["first"]
        del ENGINES["shout"]
        return found

    before = identity(tmp_path / "a")
    assert identity(tmp_path / "a") == identity(tmp_path / "b") == before
    assert identity(tmp_path / "a", "self.is_edited = True") != before


def with_options(folder: Path, **options: Any) -> Config:
    overrides = [f"llms.voice.engine_kwargs.{name}={json.dumps(value)}" for name, value in options.items()]
    return load(engine_pool(folder), [*overrides, *(["llms.voice.gpus=8"] if "split" in options else [])])


def test_an_engine_of_a_file_says_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dmoa: Invoke) -> None:
    (item,) = plan_of(with_options(tmp_path)).deployments
    assert (item.is_remote, item.gpus_together, item.accelerator_type) == (False, 0, None)
    (item,) = plan_of(with_options(tmp_path, split=[4, 2])).deployments
    assert (item.tensor_parallel, item.pipeline_parallel, item.gpus_together, item.accelerator_type) == (4, 2, 4, "H100")
    config = with_options(tmp_path, url="https://a.example.com")
    assert plan_of(config).deployments[0].is_remote
    monkeypatch.delenv("SHOUT_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"^llms\.voice\..*the variable SHOUT_KEY is not set"):
        check_keys(config)
    shown = dmoa(
        "serve", "--dry-run", "--config", tmp_path / "pool.yaml", "--set", "llms.voice.engine_kwargs.url=https://a.example.com"
    )
    assert "endpoint" in shown.stdout
    monkeypatch.setenv("SHOUT_KEY", "sk-secret")
    check_keys(config)


@pytest.mark.contract  # loads Ray Serve
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning")
def test_a_server_may_be_given_policies_of_files(
    dmoa: Invoke, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = dmoa("serve", "--dry-run", "--config", pool, "--policy", "relay.py:Relay")
    assert found.exit_code == 0, found.output
    assert POLICIES["relay"].summary == "One after the other."
    from dmoa.serving.app import build_app

    given = POLICIES.references(["relay"])
    assert given == (f"{tmp_path}/relay.py:Relay",)
    ingress = build_app(load(pool), policy_files=given)._bound_deployment
    assert ingress.init_args[-1] == given
