"""The README: commands, pools, paths and code in it are real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from dmoa.agents.pool import load_pool
from dmoa.cli.bench import _HOMES
from dmoa.cli.main import app
from dmoa.config import AgentConfig, AutoscalingConfig, Config, LlmConfig, SamplingConfig, loads
from dmoa.policies.registry import POLICIES
from dmoa.trace import ReplyAgent, ReplyDmoa, ReplyStep
from dmoa.types import Answer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXECUTED = "<!-- executed by tests/contract/test_readme.py -->"
POOL = """
name: tiny
llms:
  fake:
    model: scripted:fake
    engine: scripted
    engine_kwargs: {replies: {first: "FIRST", second: "SECOND"}}
agents:
  - {name: first, llm: fake, profile: Answers., sampling: {max_tokens: 32}}
  - {name: second, llm: fake, profile: Answers too., sampling: {max_tokens: 32}}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    text: str
    is_executed: bool
    heading: str


def read_blocks() -> list[Block]:
    found = []
    pattern = re.compile(rf"(?P<mark>{re.escape(EXECUTED)}\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
    for match in pattern.finditer(README):
        heading = re.findall(r"^## (.+)$", README[: match.start()], re.M)[-1]
        found.append(Block(match["language"], match["text"], match["mark"] is not None, heading))
    return found


BLOCKS = read_blocks()


def shell_lines() -> list[str]:
    lines = "".join(block.text for block in BLOCKS if block.language == "sh").replace("\\\n", " ")
    printed = [line for block in BLOCKS if block.language == "text" for line in block.text.splitlines()]
    return [*lines.splitlines(), *(line.strip() for line in printed if line.strip().startswith("dmoa run "))]


def dmoa_commands() -> list[list[str]]:
    """The arguments of every `dmoa` in the shell blocks, without variables before it and comments behind it."""
    found = []
    for line in shell_lines():
        words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if words and Path(words[0]).name == "dmoa":
            found.append(words[1:])
    return found


def inline_commands() -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    return [span for span in re.findall(r"`([^`]+)`", prose) if span.startswith("dmoa ")]


def resolve(words: list[str]) -> tuple[Any, Any, list[str]]:
    """Return the innermost command, its context and what is left of the words; fails for a name that does not exist."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("dmoa", [], resilient_parsing=True)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{words[0]!r} is no command; there are {', '.join(command.commands)}"
        command = command.commands[words[0]]
        context = type(context)(command, info_name=words[0], parent=context)
        words = words[1:]
    return command, context, words


@pytest.mark.parametrize("words", dmoa_commands(), ids=" ".join)
def test_commands_in_blocks_are_accepted(words: list[str]) -> None:
    command, context, rest = resolve(words)
    command.make_context(command.name, list(rest), parent=context.parent)  # raises for unknown options and missing arguments


@pytest.mark.parametrize("text", sorted(set(inline_commands())))
def test_commands_in_the_text_exist(text: str) -> None:
    command, _, rest = resolve(shlex.split(text)[1:])
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= known


def test_a_wrong_command_would_be_noticed() -> None:
    assert len(dmoa_commands()) >= 15
    assert len(inline_commands()) >= 10
    with pytest.raises(AssertionError, match="no command"):
        resolve(["rnu", "x"])
    command, context, rest = resolve(["run", "x", "--polciy", "single"])
    with pytest.raises(Exception, match="polciy"):
        command.make_context("run", rest, parent=context.parent)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z]+)\b", README))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def pools() -> list[str]:
    return [block.text for block in BLOCKS if block.language == "yaml"]


@pytest.mark.parametrize("text", pools(), ids=lambda text: yaml.safe_load(text)["name"])
def test_pools_load(text: str) -> None:
    assert loads(text, source="README.md").agents


def test_the_scripted_pool_answers(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(next(text for text in pools() if yaml.safe_load(text)["name"] == "tiny"))
    done = CliRunner().invoke(app, ["run", "What is 12 + 7?", "--config", str(tmp_path / "tiny.yaml"), "--max-steps", "2", "-q"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == "The answer is 19."


def everything() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(next(text for text in pools() if yaml.safe_load(text)["name"] == "everything"))
    return tree


def sections(config: Config, tree: Mapping[str, Any]) -> Iterator[tuple[str, type[BaseModel], Mapping[str, Any]]]:
    """Every section of the annotated pool that must be complete, with the record that it becomes."""
    yield "pool", Config, tree
    for name in ("tools", "summarizer", "gate", "limits", "router", "server"):
        yield name, type(getattr(config, name)), tree[name]
    yield "gate.activation", type(config.gate.activation), tree["gate"]["activation"]
    yield "summarizer.sampling", SamplingConfig, tree["summarizer"]["sampling"]
    llm, agent = tree["llms"]["smollm2"], tree["agents"][0]
    yield "llms.smollm2", LlmConfig, llm
    yield "llms.smollm2.autoscaling", AutoscalingConfig, llm["autoscaling"]
    yield "agents.0", AgentConfig, agent
    yield "agents.0.sampling", SamplingConfig, agent["sampling"]
    yield "agents.0.autoscaling", AutoscalingConfig, agent["autoscaling"]
    for name, part in tree["llms"].items():
        yield f"llms.{name}.engine_kwargs", type(config.llms[name].options), part["engine_kwargs"]


def test_the_annotated_pool_names_every_field() -> None:
    tree = everything()
    config = loads(yaml.safe_dump(tree))
    for where, record, section in sections(config, tree):
        assert set(section) == set(record.model_fields), where


def test_the_annotated_values_are_the_defaults() -> None:
    tree = everything()
    shown = loads(yaml.safe_dump(tree))
    bare = loads(
        yaml.safe_dump({"name": "x", "llms": {"smollm2": {}}, "agents": [{"name": "solver", "llm": "smollm2", "profile": "x"}]})
    )
    for name in ("tools", "summarizer", "gate", "limits", "router", "server"):
        assert getattr(shown, name) == getattr(bare, name), name
    assert shown.llms["smollm2"].options == bare.llms["smollm2"].options
    same = {"engine_kwargs": {}}
    assert shown.llms["smollm2"].model_copy(update=same) == bare.llms["smollm2"]
    assert shown.agents[0].model_copy(update={"profile": "x"}) == bare.agents[0]


def tree_paths() -> list[str]:
    """The paths of the annotated tree: names up to two spaces, each line indented by two for every folder around it."""
    block = next(block for block in BLOCKS if block.heading == "The tree")
    found: list[str] = []
    folders: list[str] = []
    for line in block.text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {2,}", line.strip())[0].split()
        folders = folders[:depth]
        found += ["/".join([*folders, name.rstrip("/")]) for name in names]
        if len(names) == 1 and names[0].endswith("/"):
            folders.append(names[0].rstrip("/"))
    return found


@pytest.mark.parametrize("path", tree_paths())
def test_paths_of_the_tree_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_tables_of_benches_and_of_the_reply_are_complete() -> None:
    benches = README.partition("## Benches and acceptance")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (P\d+|growth|prefill) \|", benches, re.M) == list(_HOMES)
    reply = README.partition("**The `dmoa` object.**")[2].partition("**Traces")[0]
    for record in (ReplyDmoa, ReplyStep, ReplyAgent):
        for name in record.model_fields:
            assert re.search(rf"`{name}(\[\])?`", reply), f"{record.__name__}.{name}"


@pytest.fixture
def policy_example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the README's policy and its trial define; the registry forgets the policy afterwards."""
    monkeypatch.setitem(POLICIES, "review", POLICIES["single"])
    names: dict[str, Any] = {"__name__": "readme"}
    examples = [block.text for block in BLOCKS if block.is_executed]
    assert len(examples) == 2
    for text in examples:
        exec(compile(text, "README.md", "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool.yaml"
    path.write_text(POOL, encoding="utf-8")
    return path


async def test_the_policy_example_asks_all_then_one(policy_example: dict[str, Any], pool: Path) -> None:
    answer: Answer = await policy_example["ask"]("Who is first?", "review", str(pool))
    assert [set(step.active) for step in answer.steps] == [{"first", "second"}, {"first"}]
    assert (answer.text, answer.stop_reason, answer.policy) == ("FIRST", "single", "review")


async def test_the_policy_example_ends_early_on_agreement(policy_example: dict[str, Any], tmp_path: Path) -> None:
    agreed = tmp_path / "agreed.yaml"
    agreed.write_text(POOL.replace("SECOND", "FIRST"), encoding="utf-8")
    answer: Answer = await policy_example["ask"]("Who is first?", "review", str(agreed))
    assert (len(answer.steps), answer.text, answer.stop_reason) == (1, "FIRST", "agreement")


async def test_the_policy_example_survives_its_reviewer(policy_example: dict[str, Any], tmp_path: Path) -> None:
    lost = tmp_path / "lost.yaml"
    lost.write_text(POOL.replace("replies:", "failing: [first], replies:"), encoding="utf-8")
    answer: Answer = await policy_example["ask"]("Who is first?", "review", str(lost))
    assert (answer.text, answer.degraded) == ("SECOND", True)


def test_the_command_line_knows_a_registered_policy(policy_example: dict[str, Any], pool: Path) -> None:
    assert policy_example["ReviewPolicy"].name in load_and_list()
    done = CliRunner().invoke(app, ["run", "Who is first?", "--config", str(pool), "--policy", "review", "-q"])
    assert (done.exit_code, done.stdout.strip()) == (0, "FIRST")


def load_and_list() -> str:
    return CliRunner().invoke(app, ["policies"]).stdout


def test_the_openai_example_compiles_and_uses_the_default_pool() -> None:
    example = next(block.text for block in BLOCKS if block.language == "python" and not block.is_executed)
    compile(example, "README.md", "exec")
    assert f'model="{load_pool(None).name}"' in example


def test_the_bad_input_example_is_what_the_command_prints(pool: Path) -> None:
    shown = next(line for block in BLOCKS for line in block.text.splitlines() if "gate.temprature: unknown key" in line)
    command = [sys.executable, "-c", "from dmoa.cli.main import main; main()", "run", "x", "--config", pool.name]
    done = subprocess.run(
        [*command, "--set", "gate.temprature=0.2"], cwd=pool.parent, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.strip()) == (2, shown)


def test_no_machine_and_no_registry_is_named() -> None:
    assert re.findall(r"https?://(?!127\.0\.0\.1|[\w-]+\.example\.com/)\S+", README) == []
    assert re.findall(r"(?<![\w.:])/(?:home|root|work|tmp|Users)/\S*", README) == []
