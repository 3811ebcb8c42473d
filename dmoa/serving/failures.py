"""Waits until every replica of an app has started, and tells in a line which one cannot: agents, model and cause."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping

from dmoa.config import AgentConfig, Config, callable_agents
from dmoa.engines import named
from dmoa.errors import ConfigError, DmoaError
from dmoa.serving.placement import deployment_names
from dmoa.validation import redact_text

_LOG = logging.getLogger("dmoa.serve")
_PAUSE_S, REMIND_S = 0.2, 15.0
_MAX_CAUSE_CHARS = 600
_RAISED = re.compile(r"^(?:ray\.exceptions\.RayTaskError\()?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt))\)?: ")
"""How the last line of a traceback begins."""
_OURS = "dmoa.errors."
_UNPLACED = "to be scheduled"
"""In what Serve says of a replica that Ray has had no room for in half a minute."""
_ROOM = re.compile(r"each replica: (.*?), total resources available: (.*?)\.(?: Use|$)")


def news(config: Config, states: Mapping[str, str], told: set[str]) -> list[str]:
    """Return a line for every deployment that is ready and was not told of, and note it in `told`; `states`: Serve's, by name."""
    ready = [name for name, state in states.items() if state == "HEALTHY"]
    new = [name for name in ready if name not in told]
    told.update(new)
    return [f"ready: {subject(config, name)} ({len(ready)} of {len(states)})" for name in new]


def loading(config: Config, states: Mapping[str, str], messages: Mapping[str, str] | None = None) -> str:
    """Return the deployments that are not ready, their models and, by Serve's `messages`, what they lack; empty where all are."""
    left = [name for name, state in states.items() if state != "HEALTHY"]
    return "; ".join(subject(config, name) + _model(config, name) + _no_room((messages or {}).get(name, "")) for name in left)


def wait_running(config: Config, app: str, say: Callable[[str], None] = lambda line: None) -> None:
    """Return once every replica of an app that is being deployed runs; `say` takes a line for each deployment that is ready,
    and what is loading at first and where nothing was said for `REMIND_S`.

    Raises ConfigError as soon as one has refused its configuration, which another attempt does not change, and DmoaError once
    Serve gives the app up.
    """
    from ray import serve

    told, ready = set[str](), set[str]()
    started, spoke = time.monotonic(), float("-inf")
    while True:
        found = serve.status().applications.get(app)
        if found is None:
            raise DmoaError(f"app {app!r}: it is gone; another command has deleted it while it started")
        states = {name: str(part.status.value) for name, part in found.deployments.items()}
        messages = {name: part.message for name, part in found.deployments.items()}
        for line in news(config, states, ready):
            say(line)
            spoke = time.monotonic()
        if (now := time.monotonic()) - spoke >= REMIND_S and (left := loading(config, states, messages)):
            say(f"loading{'' if spoke < started else f', after {now - started:.0f} s'}: {left}")
            spoke = now
        causes = {name: cause for name, message in messages.items() if (cause := raised(message))}
        for name, (kind, words) in causes.items():
            if kind == ConfigError.__name__:
                raise ConfigError(explain(config, name, words))
        if found.status == "RUNNING":
            return
        if found.status == "DEPLOY_FAILED":
            lines = [explain(config, name, words) for name, (_, words) in causes.items()]
            raise DmoaError("; ".join(lines) or f"app {app!r} cannot start: {last_words(found.message)}")
        for name in causes.keys() - told:
            told.add(name)
            _LOG.warning("%s; Serve tries again", explain(config, name, causes[name][1]))
        time.sleep(_PAUSE_S)


def subject(config: Config, deployment: str) -> str:
    """Return what a deployment is to an operator: its agents by name, or its own name."""
    hosted = _hosted(config, deployment)
    return f"{'agents' if len(hosted) > 1 else 'agent'} {named(hosted)}" if hosted else deployment


def explain(config: Config, deployment: str, cause: str) -> str:
    """Return the sentence about a deployment whose replica did not start."""
    whose, model = subject(config, deployment), _model(config, deployment)
    if not model:
        return f"{whose}: it did not start: {cause}"
    return f"{whose}{'' if cause.startswith('llms.') else model}: no replica started: {cause}"


def _model(config: Config, deployment: str) -> str:
    """Return the model of the agents of a deployment in brackets, empty for one without agents."""
    llm = next((agent.llm for agent in _hosted(config, deployment)), None)
    return "" if llm is None else f" (llms.{llm}.model {config.llms[llm].model!r})"


def _hosted(config: Config, deployment: str) -> list[AgentConfig]:
    names = deployment_names(config)
    return [agent for agent in callable_agents(config) if names.get(agent.name) == deployment]


def _no_room(message: str) -> str:
    """Return what a replica needs and what is free where Serve says that there is no room for it, else nothing."""
    message = " ".join(message.split())
    if _UNPLACED not in message:
        return ""
    found = _ROOM.search(message)
    why = f"a replica needs {found[1]}, free are {found[2]}" if found else _cut(message)
    return f", for which Ray has no room yet: {why}"


def raised(text: str) -> tuple[str, str] | None:
    """Return the exception that a text with a traceback ends in, its name without module and its words; None without one."""
    lines = text.strip().splitlines()
    for number in range(len(lines) - 1, -1, -1):
        found = _RAISED.match(lines[number])
        if found:
            kind = found[1]
            words = " ".join(" ".join([lines[number][found.end() :], *lines[number + 1 :]]).split())
            said = words if kind.startswith(_OURS) else f"{kind.rpartition('.')[2]}: {words}"
            return (kind.removeprefix(_OURS), _cut(said))
    return None


def last_words(error: object) -> str:
    """Return what an error or a text with a traceback says in the end, in one line."""
    found = raised(str(error))
    return found[1] if found else _cut(" ".join(str(error).split())) or type(error).__name__


def _cut(text: str) -> str:
    told = redact_text(text)
    return told if len(told) <= _MAX_CAUSE_CHARS else f"{told[: _MAX_CAUSE_CHARS - 3]}..."
