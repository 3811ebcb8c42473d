"""The configuration tree: what it accepts, and what it says about what it does not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import dmoa
from dmoa.agents.pool import default_config_path, load_pool
from dmoa.config import Config, load, loads
from dmoa.engine_options import OpenaiOptions, ScriptedOptions, TransformersOptions
from dmoa.errors import ConfigError
from tests.examples import examples

ROOT = Path(dmoa.__file__).parent
REPOSITORY = ROOT.parent
POOL_FILES = sorted((ROOT / "configs").glob("*.yaml"))
BASE: dict[str, Any] = {
    "name": "pool",
    "llms": {"tiny": {"model": "scripted:tiny", "engine": "scripted"}},
    "agents": [
        {"name": "adder", "llm": "tiny", "profile": "Adds."},
        {"name": "sorter", "llm": "tiny", "profile": "Sorts."},
    ],
}


ENDPOINT: dict[str, Any] = {"model": "openai:x", "engine": "openai", "engine_kwargs": {"base_url": "https://api.example.com/v1"}}


def endpoint(**options: Any) -> dict[str, Any]:
    """A change that makes the LLM an endpoint with these options."""
    return {"llms__tiny": ENDPOINT | {"engine_kwargs": ENDPOINT["engine_kwargs"] | options}}


def tree(**changes: Any) -> dict[str, Any]:
    """BASE with values set at dotted paths."""
    result = copy.deepcopy(BASE)
    for path, value in changes.items():
        *keys, last = path.split("__")
        node: Any = result
        for key in keys:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[int(last) if isinstance(node, list) else last] = value
    return result


def refused(text: str, overrides: tuple[str, ...] = ()) -> str:
    """The one message with which a pool is refused."""
    with pytest.raises(ConfigError) as caught:
        loads(text, source="pool.yaml", overrides=overrides)
    return str(caught.value)


def test_defaults_are_those_of_the_contract() -> None:
    config = loads(yaml.safe_dump(BASE))
    assert config.agent_names == ("adder", "sorter")
    assert config.agent("sorter").sampling.max_tokens == 96
    assert (config.summarizer.mode, config.gate.preset, config.gate.head, config.gate.hidden) == (
        "select",
        "default",
        "linear",
        128,
    )
    assert (config.gate.temperature, config.gate.score, config.gate.checkpoint) == (0.1, "posterior", None)
    rule = config.gate.activation
    assert (rule.rule, rule.mass, rule.cascade, rule.max_agents) == ("top_mass", 0.8, True, 4)
    limits = config.limits
    assert (limits.max_steps, limits.budget_tokens, limits.deadline_s, limits.max_queued_requests) == (20, None, None, 64)
    assert (config.server.host, config.server.port, config.server.max_body_bytes) == ("127.0.0.1", 8000, 1048576)
    assert config.llms["tiny"].placement == "shared"
    with pytest.raises(KeyError):
        config.agent("nobody")


UNKNOWN_KEYS = [
    ("colour", "agents, gate, limits"),
    ("llms__tiny__colour", "model, engine, placement"),
    ("llms__tiny__autoscaling__colour", "min_replicas, max_replicas"),
    ("llms__tiny__engine_kwargs__colour", "delay_ms, delays_ms"),
    ("agents__1__colour", "name, llm, adapter"),
    ("agents__1__sampling__colour", "temperature, top_p"),
    ("agents__1__autoscaling__colour", "min_replicas, max_replicas"),
    ("tools__colour", "search_corpus"),
    ("summarizer__colour", "mode, llm, adapter"),
    ("summarizer__sampling__colour", "temperature, top_p"),
    ("gate__colour", "preset, head, hidden"),
    ("gate__activation__colour", "rule, mass"),
    ("limits__colour", "max_steps, budget_tokens"),
    ("router__colour", "state_uri, adaptation"),
    ("server__colour", "host, port"),
]


@pytest.mark.parametrize(("path", "allowed"), UNKNOWN_KEYS, ids=[path for path, _ in UNKNOWN_KEYS])
def test_unknown_keys_are_refused_at_every_level(path: str, allowed: str) -> None:
    message = refused(yaml.safe_dump(tree(**{path: 3})))
    *_, parent, key = ["", *path.split("__")]
    assert message.startswith("pool.yaml: ")
    assert key in message
    assert parent in message
    assert "unknown key (value 3)" in message
    assert set(allowed.split(", ")) <= set(message.partition("expected one of ")[2].partition(";")[0].split(", "))
    assert "remove it or fix its spelling" in message
    assert "\n" not in message


BAD_VALUES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"name": "Big Pool"}, ("name is 'Big Pool'", "expected 1-64 lower case", "expected")),
    ({"name": "pool\n"}, ("name is 'pool\\n'", "expected 1-64 lower case")),
    ({"name": ["pool"]}, ("name is ['pool']", "valid string", "expected")),
    ({"llms": {}}, ("llms is {}; expected at least 1 item",)),
    ({"llms__A b": {"model": "scripted:x", "engine": "scripted"}}, ("llms.A b", "is 'A b'", "expected 1-64")),
    ({"llms__tiny__model": "smollm"}, ("llms.tiny.model is 'smollm'", "embedded:NAME", "expected")),
    ({"llms__tiny__engine": "llamacpp"}, ("llms.tiny.engine is 'llamacpp'", "'transformers'")),
    ({"llms__tiny": ENDPOINT | {"engine_kwargs": {}}}, ("llms.tiny: engine_kwargs: base_url: missing; add it",)),
    ({"llms__tiny": ENDPOINT | {"model": "hub:a/b"}}, ("llms.tiny: model 'hub:a/b' on engine 'openai'", "change one of the two")),
    ({"llms__tiny__model": "openai:x"}, ("llms.tiny: model 'openai:x' on engine 'scripted'", "change one of the two")),
    ({"llms__tiny": ENDPOINT | {"gpus": 1}}, ("llms.tiny: gpus is 1", "runs its model elsewhere", "set gpus to 0")),
    ({"llms__tiny": ENDPOINT, "agents__1__adapter": "path:x"}, ("agents.1.adapter is 'path:x'", "set adapter to null")),
    (
        {"llms__tiny": ENDPOINT, "summarizer": {"mode": "llm", "llm": "tiny", "adapter": "path:x"}},
        ("summarizer.adapter is 'path:x'", "(llms.tiny) takes none: an endpoint serves", "add an LLM of that name"),
    ),
    (endpoint(top_logprobs=21), ("llms.tiny: engine_kwargs: top_logprobs is 21", "less than or equal to 20")),
    (endpoint(max_retries=-1), ("engine_kwargs: max_retries is -1",)),
    (endpoint(timeout_s=0), ("engine_kwargs: timeout_s is 0",)),
    (endpoint(vocab_size=1), ("engine_kwargs: vocab_size is 1",)),
    (endpoint(tool_parser="hermes"), ("tool_parser is an option of engine vllm, and this LLM's engine is openai",)),
    (endpoint(api_key="x"), ("engine_kwargs: api_key: unknown key", "expected one of base_url, api_key_env")),
    (endpoint(base_url="api.example.com"), ("engine_kwargs: base_url: 'api.example.com'", "http or https")),
    (endpoint(base_url="ftp://a/v1"), ("base_url: 'ftp://a/v1'", "is not an http or https URL with a host")),
    (endpoint(base_url="https:///v1"), ("base_url: 'https:///v1'",)),
    (endpoint(base_url="https://a:b/v1"), ("base_url: 'https://a:b/v1'",)),
    (endpoint(base_url="https://a b/v1"), ("base_url: 'https://a b/v1'",)),
    ({"llms__tiny__max_num_seqs": 0}, ("llms.tiny.max_num_seqs is 0", "greater than or equal to 1")),
    ({"llms__tiny__gpus": -1}, ("llms.tiny.gpus is -1",)),
    ({"llms__tiny__gpus": 1.5}, ("llms.tiny: gpus is 1.5", "expected a number up to 1, or a whole one")),
    ({"llms__tiny": {"gpus": 2}}, ("llms.tiny: gpus is 2; engine 'transformers' computes on one GPU", "use engine vllm")),
    ({"llms__tiny": {"gpus": 1, "engine_kwargs": {"device": "cpu"}}}, ("gpus is 1; engine_kwargs.device 'cpu' and dtype",)),
    ({"llms__tiny": {"gpus": 1, "engine_kwargs": {"dtype": "int8"}}}, ("dtype 'int8' run on the CPU; set gpus",)),
    ({"tracing": {"otlp_endpoint": "ftp://a"}}, ("tracing.otlp_endpoint is 'ftp://a'",)),
    ({"llms__tiny__engine_kwargs": {"tokens": 0}}, ("llms.tiny: engine_kwargs: tokens is 0",)),
    ({"llms__tiny__engine_kwargs": {"delays_ms": {"adder": -1}}}, ("delays_ms.adder is -1",)),
    ({"llms__tiny__autoscaling": {"min_replicas": 3}}, ("llms.tiny.autoscaling", "max_replicas is 1", "min_replicas 3")),
    ({"llms__tiny__autoscaling": {"min_replicas": -1}}, ("llms.tiny.autoscaling.min_replicas is -1",)),
    ({"agents__1__autoscaling": {"cold": "skip"}}, ("agents.1.autoscaling: cold is 'skip'", "set min_replicas to 0")),
    ({"agents__1__autoscaling": {"cold": "sleep"}}, ("agents.1.autoscaling.cold is 'sleep'", "or 'warm_on_rank'")),
    ({"agents__1__autoscaling": {"upscale_delay_s": -1}}, ("agents.1.autoscaling.upscale_delay_s is -1",)),
    ({"llms__tiny__autoscaling": {"max_queued_calls": 0}}, ("llms.tiny.autoscaling.max_queued_calls is 0",)),
    ({"llms__tiny__autoscaling": {"max_queued_calls": 1}}, ("tiny.autoscaling.max_queued_calls is 1", "at least 2")),
    ({"agents": []}, ("agents is []; expected at least 1 item",)),
    ({"agents": {"adder": {}}}, ("agents is {'adder': {}}", "tuple")),
    ({"agents__0": "adder"}, ("agents.0 is 'adder'", "expected")),
    ({"agents__1__name": "adder"}, ("agents.1.name: 'adder' is taken by an earlier agent", "names must differ")),
    ({"agents__1__name": "pool"}, ("agents.1.name: 'pool' is taken by the pool", "choose another")),
    ({"agents__1__name": "summarizer"}, ("agents.1.name: 'summarizer' is taken by", "choose another")),
    ({"agents__1__llm": "huge"}, ("agents.1.llm: 'huge' is not defined", "expected one of tiny; add it under llms or fix")),
    ({"agents__1__profile": ""}, ("agents.1.profile is ''; expected at least 1 character",)),
    ({"agents__1__tools": ["hammer"]}, ("agents.1.tools.0 is 'hammer'", "'calculator', 'search' or 'python'")),
    ({"agents__1__adapter": "arithmetic"}, ("agents.1.adapter is 'arithmetic'", "expected builtin:NAME")),
    ({"agents__1__sampling": {"temperature": 2.5}}, ("agents.1.sampling.temperature is 2.5", "less than or")),
    ({"agents__1__sampling": {"top_p": 0}}, ("agents.1.sampling.top_p is 0", "greater than 0")),
    ({"agents__1__sampling": {"stop": [""]}}, ("agents.1.sampling.stop.0 is ''", "at least 1 character")),
    ({"agents__1__tags": ["Math"]}, ("agents.1.tags.0 is 'Math'",)),
    ({"summarizer": {"mode": "llm"}}, ("summarizer: mode 'llm' needs `llm`", "or use mode 'select'")),
    ({"summarizer": {"mode": "llm", "llm": "huge"}}, ("summarizer.llm: 'huge' is not defined", "expected one of tiny")),
    ({"summarizer": {"mode": "llm", "llm": "tiny", "adapter": "x"}}, ("summarizer.adapter is 'x'", "builtin:NAME")),
    ({"summarizer": {"mode": "vote"}}, ("summarizer.mode is 'vote'", "'select' or 'llm'")),
    ({"gate": {"preset": "paper", "head": "profile"}}, ("gate: preset 'paper'", "head is 'profile'", "use head 'linear'")),
    ({"gate": {"temperature": 0}}, ("gate.temperature is 0", "greater than 0")),
    ({"gate": {"temperature": float("nan")}}, ("gate.temperature is nan", "finite")),
    ({"gate": {"activation": {"mass": 1.5}}}, ("gate.activation.mass is 1.5", "less than or equal to 1")),
    ({"gate": {"activation": {"max_agents": 0}}}, ("gate.activation.max_agents is 0",)),
    ({"gate": None}, ("gate is None",)),
    ({"limits": {"max_steps": 0}}, ("limits.max_steps is 0", "greater than or equal to 1")),
    ({"limits": {"deadline_s": float("inf")}}, ("limits.deadline_s is inf", "finite")),
    ({"limits": {1: 2}}, ("limits.1 is 1", "keys should be strings")),
    ({"router": {"adaptation": "sometimes"}}, ("router.adaptation is 'sometimes'", "'observe'")),
    ({"router": {"adaptation": "on", "feedback": "off"}}, ("router.adaptation is 'on'", "set feedback to 'on'")),
    ({"router": {"adaptation": "canary", "guards": {"skip": "canary"}}}, ("router.guards.skip names 'canary'", "to 'on'")),
    ({"router": {"guards": {"skip": ["finite"]}}}, ("router.guards.skip.0 is 'finite'", "'drift'")),
    ({"server": {"port": 70000}}, ("server.port is 70000", "less than or equal to 65535")),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), BAD_VALUES, ids=[parts[0] for _, parts in BAD_VALUES])
def test_a_bad_value_names_field_value_what_is_allowed_and_what_to_do(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = refused(yaml.safe_dump(tree(**changes)))
    assert message.startswith("pool.yaml: ")
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert "errors.pydantic.dev" not in message


SECRETS = ["https://user:hunter2@a/v1", "https://hunter2@a/v1", "https://a/v1?key=hunter2", "https://a/v1#hunter2"]


@pytest.mark.parametrize(
    "options", [*({"base_url": url} for url in SECRETS), {"api_key_env": "sk-hunter2"}, {"api_key_env": "hunter2"}]
)
def test_what_may_be_a_secret_is_refused_without_showing_it(options: dict[str, str]) -> None:
    message = refused(yaml.safe_dump(tree(**endpoint(**options))))
    assert message.startswith(f"pool.yaml: llms.tiny: engine_kwargs: {next(iter(options))}: ")
    assert "hunter2" not in message


@pytest.mark.parametrize("url", SECRETS)
def test_a_collectors_key_is_no_part_of_its_address(url: str) -> None:
    message = refused(yaml.safe_dump(tree(tracing={"otlp_endpoint": url})))
    assert "tracing: otlp_endpoint: the URL has a user part, a query or a fragment" in message
    assert "OTEL_EXPORTER_OTLP_HEADERS" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "more",
    [
        {"auth_tokens": {"prod": "hunter2"}},
        {"server": {"auth_tokens": {"prod": "hunter2"}}},
        {"server": {"port": {"passwords": ["hunter2"]}}},
        {"limits": {"max_steps": "api_key: hunter2"}},
    ],
)
def test_a_secret_in_an_unknown_place_is_refused_without_showing_it(more: dict[str, Any]) -> None:
    assert "hunter2" not in refused(yaml.safe_dump(tree() | more))


@pytest.mark.parametrize("override", ["name.api_key=hunter2", "agents.9.api_key=hunter2", "api_key=[hunter2", "a..token=hunter2"])
def test_a_secret_in_an_override_is_refused_without_showing_it(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loads(yaml.safe_dump(tree()), overrides=[override])
    assert "hunter2" not in str(caught.value)


def test_an_endpoint_has_defaults_and_needs_no_key_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    options = loads(yaml.safe_dump(tree(**endpoint(api_key_env="NO_SUCH_KEY")))).llms["tiny"].options
    assert isinstance(options, OpenaiOptions)
    assert (options.timeout_s, options.max_retries, options.top_logprobs, options.vocab_size) == (120.0, 2, 20, 128000)
    assert (options.api_key_env, options.continue_final_message) == ("NO_SUCH_KEY", False)


def test_who_may_be_cold_and_what_holds_for_an_agent() -> None:
    asleep = {"min_replicas": 0, "max_replicas": 2, "cold": "warm_on_rank", "max_queued_calls": 1}
    config = loads(yaml.safe_dump(tree(llms__tiny__placement="dedicated", agents__1__autoscaling=asleep)))
    adder, sorter = (config.scaling_of(agent) for agent in config.agents)
    assert (adder.min_replicas, adder.cold, adder.max_queued_calls) == (1, "wait", None)
    assert (sorter.min_replicas, sorter.cold, sorter.max_queued_calls) == (0, "warm_on_rank", 1)
    shared = loads(
        yaml.safe_dump(tree(llms__tiny__autoscaling={"min_replicas": 0, "cold": "skip"}, agents__1__autoscaling=asleep))
    )
    assert {shared.scaling_of(agent).cold for agent in shared.agents} == {"skip"}


def test_autoscaling_that_scales_nothing_is_told() -> None:
    more = {"max_replicas": 4}
    assert loads(yaml.safe_dump(tree())).unused_scaling() == ()
    shared = loads(yaml.safe_dump(tree(llms__tiny__autoscaling=more, agents__1__autoscaling=more)))
    assert shared.unused_scaling() == (
        "agents.1.autoscaling is not used: 'tiny' is in shared placement; set llms.tiny.autoscaling, "
        "or make its placement dedicated",
    )
    dedicated = loads(
        yaml.safe_dump(tree(llms__tiny__placement="dedicated", llms__tiny__autoscaling=more, agents__1__autoscaling=more))
    )
    assert dedicated.unused_scaling() == (
        "llms.tiny.autoscaling is not used: its placement is dedicated; set the autoscaling of its agents",
    )


def test_a_missing_field_is_named() -> None:
    text = yaml.safe_dump({"name": "pool", "llms": BASE["llms"]})
    assert refused(text) == "pool.yaml: agents: missing; add it"


def test_every_problem_is_named_once() -> None:
    message = refused(yaml.safe_dump(tree(agents__0__profile="", agents__1__profile="", gate__hidden=0)))
    assert [message.count(path) for path in ("agents.0.profile is", "agents.1.profile is", "gate.hidden is")] == [1, 1, 1]
    assert "agents is" not in message  # refused entries do not also make the list too short


BAD_TEXTS = [
    ("a: b: c", "not valid YAML"),
    ("name: [", "not valid YAML"),
    ("name: \x00", "not valid YAML"),
    ("name: 2001-99-99", "not valid YAML: month must be in 1..12"),
    ("name: 0b_", "not valid YAML"),
    ("[" * 5000, "line 1: more than 100 brackets within each other; write out what is meant"),
    ("", "None is not a pool; write a mapping with the keys name, llms, agents"),
    ("- name: pool", "[{'name': 'pool'}] is not a pool; write a mapping"),
    ("just words", "'just words' is not a pool; write a mapping"),
]


@pytest.mark.parametrize(("text", "part"), BAD_TEXTS, ids=range(len(BAD_TEXTS)))
@pytest.mark.contract
def test_a_text_that_is_no_pool_is_refused(text: str, part: str) -> None:
    message = refused(text)
    assert message.startswith("pool.yaml: ")
    assert part in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read") as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "give the path of a pool YAML file" in str(caught.value)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load(tmp_path / "binary.yaml")


def test_overrides_set_values_sections_and_list_entries() -> None:
    overrides = ("gate.temperature=0.5", "agents.1.sampling.stop=[END, STOP]", "limits={max_steps: 3}", "server.host=0.0.0.0")
    config = loads(yaml.safe_dump(BASE), overrides=overrides)
    assert config.gate.temperature == 0.5
    assert config.agents[1].sampling.stop == ("END", "STOP")
    assert config.agents[0].sampling.stop == ()
    assert config.limits.max_steps == 3
    assert config.server.host == "0.0.0.0"


def test_an_override_fills_a_section_that_the_file_leaves_empty() -> None:
    assert loads(yaml.safe_dump(BASE) + "gate:\n", overrides=["gate.hidden=7"]).gate.hidden == 7


def test_an_override_changes_one_of_the_sections_that_share_an_alias() -> None:
    text = yaml.safe_dump(tree(agents=[])).replace("agents: []", "") + (
        "agents:\n"
        "  - {name: adder, llm: tiny, profile: Adds., sampling: &s {temperature: 0.1}}\n"
        "  - {name: sorter, llm: tiny, profile: Sorts., sampling: *s}\n"
    )
    config = loads(text, overrides=["agents.0.sampling.temperature=0.9"])
    assert [agent.sampling.temperature for agent in config.agents] == [0.9, 0.1]


BAD_OVERRIDES = [
    ("gate.temperature", "write it as a.b=value"),
    ("=3", "write it as a.b=value"),
    ("gate..hidden=3", "write it as a.b=value"),
    ("gate.hidden=2001-99-99", "not valid YAML"),
    ("gate.hidden={", "not valid YAML"),
    ("name.first=x", "'first' lies under the value 'pool'"),
    ("gate.hidden.size=x", "gate.hidden"),
    ("agents.9.llm=tiny", "'9' is not an entry of this list; expected an index below 2"),
    ("agents.first.llm=tiny", "'first' is not an entry of this list"),
    ("agents.-1=tiny", "'-1' is not an entry of this list"),
    ("agents.\N{SUPERSCRIPT TWO}=tiny", "is not an entry of this list"),
    ("gate.temperatur=0.1", "gate.temperatur: unknown key (value 0.1)"),
    ("gate.hidden=0", "gate.hidden is 0"),
]


@pytest.mark.parametrize(("override", "part"), BAD_OVERRIDES, ids=[o for o, _ in BAD_OVERRIDES])
def test_a_bad_override_is_refused(override: str, part: str) -> None:
    assert part in refused(yaml.safe_dump(tree(gate__hidden=8)), (override,))


def test_the_job_section_belongs_to_jobs() -> None:
    assert loads(yaml.safe_dump(tree(job={"anything": 1}))) == loads(yaml.safe_dump(BASE))


def test_adaptation_off_may_be_written_without_quotes() -> None:
    assert loads(yaml.safe_dump(BASE) + "router: {adaptation: off}\n").router.adaptation == "off"


def test_engine_options_are_typed_per_engine() -> None:
    config = loads(yaml.safe_dump(tree(llms__real={"engine_kwargs": {"threads": 2}}, llms__tiny__engine_kwargs={"tokens": 5})))
    assert config.llms["real"].options == TransformersOptions(threads=2)
    assert config.llms["tiny"].options == ScriptedOptions(tokens=5)


@pytest.mark.parametrize("path", POOL_FILES, ids=lambda p: p.name)
def test_every_packaged_pool_loads_and_survives_json(path: Path) -> None:
    config = load(path)
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_the_default_pool_has_the_three_groups_of_the_paper() -> None:
    assert default_config_path() in POOL_FILES
    config = load_pool(None)
    assert len(config.agents) >= 6
    tags = {tag for agent in config.agents for tag in agent.tags}
    assert {"math", "code", "open"} <= tags
    assert any("calculator" in agent.tools for agent in config.agents)


def test_configuration_is_frozen() -> None:
    config = loads(yaml.safe_dump(BASE))
    with pytest.raises(ValueError, match="frozen"):
        config.gate.hidden = 1  # type: ignore[misc]


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 10**20),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.sampled_from(["select", "llm", "paper", "profile", "builtin:x", "scripted:y", "adder", "off"]),
)


def paths(node: Any) -> list[tuple[Any, ...]]:
    """Every path into a tree of dictionaries and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path for key, child in items for path in ((key,), *((key, *rest) for rest in paths(child)))]


FULL = loads(default_config_path().read_text(encoding="utf-8")).model_dump(mode="json")
PATHS = paths(FULL)


@settings(max_examples=examples(100))
@given(st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(["set", "drop", "add"]), ODD), min_size=1, max_size=3))
def test_any_tree_loads_or_is_refused_in_one_line(changes: list[tuple[tuple[Any, ...], str, Any]]) -> None:
    mutated = copy.deepcopy(FULL)
    for path, what, value in changes:
        mutate(mutated, path, what, value)
    config, message = None, ""
    try:
        config = loads(yaml.safe_dump(mutated, allow_unicode=True))
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    if config is not None:
        assert Config.model_validate_json(config.model_dump_json()) == config


def mutate(node: Any, path: tuple[Any, ...], what: str, value: Any) -> None:
    """Set, drop or add a value at a path, as far as earlier mutations left the path in place."""
    *keys, last = path
    for key in keys:
        is_there = key in node if isinstance(node, dict) else isinstance(node, list) and isinstance(key, int) and key < len(node)
        node = node[key] if is_there else None
    if isinstance(node, dict) and what == "drop":
        node.pop(last, None)
    elif isinstance(node, dict):
        node[last if what == "set" else f"{last}x"] = value
    elif isinstance(node, list) and isinstance(last, int) and last < len(node):
        node[last] = value


def test_endpoints_are_called_from_the_ingress_unless_told_otherwise() -> None:
    more = {"max_replicas": 4}
    config = loads(yaml.safe_dump(tree(**endpoint(), agents__1__autoscaling=more)))
    assert config.llms["tiny"].placement == "ingress"
    assert config.scaling_of(config.agents[1]).max_replicas == 1
    assert config.unused_scaling() == (
        "agents.1.autoscaling is not used: 'tiny' is in ingress placement; set llms.tiny.autoscaling, "
        "or make its placement dedicated",
    )
    assert loads(yaml.safe_dump(tree(**endpoint(), llms__tiny__placement="shared"))).llms["tiny"].placement == "shared"
    assert loads(yaml.safe_dump(tree(**endpoint(), llms__tiny__autoscaling=more))).llms["tiny"].placement == "shared"
    with pytest.raises(ConfigError, match="engine 'transformers' runs a model"):
        loads(
            yaml.safe_dump(tree(llms__tiny__placement="ingress", llms__tiny__engine="transformers", llms__tiny__model="hub:a/b"))
        )


def test_a_summarizers_model_is_asked_in_mode_llm_alone() -> None:
    """In mode select it may stay named: nothing is asked of it, so that it needs no price, and may be recorded."""
    text = """
name: p
llms:
  a: {model: "scripted:a", engine: scripted, price: {prompt_per_1m: 1, completion_per_1m: 1}}
  b: {model: "recorded:b", engine: recorded, engine_kwargs: {replies: ~nobody-of-that-name/b}}
  c: {model: "scripted:c", engine: scripted}
agents: [{name: one, llm: a, profile: Works.}]
limits: {budget_price: 1}
summarizer: {llm: c}
"""
    assert loads(text).unpriced == ()
    assert loads(text, overrides=["summarizer.llm=b"]).summarizer.llm == "b"
    with pytest.raises(ConfigError, match=r"llms.c has no price"):
        loads(text, overrides=["summarizer.mode=llm"])
    with pytest.raises(ConfigError, match=r"summarizer.llm is 'b', whose replies are recorded; .*; use mode 'select'"):
        loads(text, overrides=["summarizer.mode=llm", "summarizer.llm=b"])
