"""The README and the guides: commands, pools, links, paths and code in them are real, and what is generated is complete."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from dmoa.agents.pool import load_pool
from dmoa.cli.main import app
from dmoa.config import loads
from dmoa.types import Answer

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "dmoa" / "docs").glob("*.md"))
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "cluster" / "README.md", ROOT / "jobs" / "study" / "README.md", *GUIDES)
}
README = DOCUMENTS["README.md"]
EXECUTED = "<!-- executed by the tests -->"
MAX_README_LINES = 180
TOPICS = ("configuration", "serving", "api", "learning", "guards", "evaluation", "extending", "operations", "limits")
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

    document: str
    language: str
    text: str
    is_executed: bool


def read_blocks() -> list[Block]:
    pattern = re.compile(rf"(?P<mark>{re.escape(EXECUTED)}\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
    return [
        Block(document, match["language"], match["text"], match["mark"] is not None)
        for document, text in DOCUMENTS.items()
        for match in pattern.finditer(text)
    ]


BLOCKS = read_blocks()


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def dmoa_commands() -> list[list[str]]:
    """The arguments of every `dmoa` in the shell blocks, without variables before it, comments and other commands behind it."""
    found = []
    for line in "".join(block.text for block in of("sh")).replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        for command in split(words):
            if command and Path(command[0]).name == "dmoa":
                found.append(command[1:])
    return found


def split(words: list[str]) -> list[list[str]]:
    """The commands that `&&` joins."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return found


def inline_commands() -> list[str]:
    prose = "\n".join(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S) for text in DOCUMENTS.values())
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose) if span.startswith("dmoa ")]


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
    made = command.make_context(command.name, list(rest), parent=context.parent)  # raises for what is unknown or missing
    assert made.command is command


@pytest.mark.parametrize("text", sorted(set(inline_commands())))
def test_commands_in_the_text_exist(text: str) -> None:
    command, _, rest = resolve(shlex.split(text)[1:])
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= known
    if command.name == "docs" and rest and rest[0].islower():
        assert rest[0] in TOPICS


def test_a_wrong_command_would_be_noticed() -> None:
    assert len(dmoa_commands()) >= 40
    assert len(inline_commands()) >= 20
    with pytest.raises(AssertionError, match="no command"):
        resolve(["rnu", "x"])
    command, context, rest = resolve(["run", "x", "--polciy", "single"])
    with pytest.raises(Exception, match="polciy"):
        command.make_context("run", rest, parent=context.parent)


def make_targets() -> set[str]:
    found = re.findall(r"(?:`|^)make ([a-z-]+)", "\n".join(DOCUMENTS.values()), re.M)
    assert {"demo", "test", "check", "accept"} <= set(found)
    return set(found)


@pytest.mark.parametrize("target", sorted(make_targets()))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def pools() -> dict[str, str]:
    return {yaml.safe_load(block.text)["name"]: block.text for block in of("yaml")}


@pytest.mark.parametrize("name", sorted(pools()))
def test_pools_load(name: str) -> None:
    assert loads(pools()[name], source="a guide").agents


def test_the_scripted_pool_answers(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(pools()["tiny"], encoding="utf-8")
    done = CliRunner().invoke(app, ["run", "What is 12 + 7?", "--config", str(tmp_path / "tiny.yaml"), "--max-steps", "2", "-q"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == "The answer is 19."


@pytest.mark.parametrize("block", [block for block in of("python") if not block.is_executed], ids=lambda block: block.document)
def test_python_that_needs_a_server_compiles(block: Block) -> None:
    assert compile(block.text, block.document, "exec")


def test_the_client_example_asks_the_default_pool() -> None:
    example = next(block.text for block in of("python") if "OpenAI(" in block.text)
    assert f'model="{load_pool(None).name}"' in example


def executed(document: str) -> dict[str, Any]:
    """Run the marked blocks of a document in order and return the names that they define."""
    names: dict[str, Any] = {"__name__": "guide"}
    texts = [block.text for block in BLOCKS if block.is_executed and block.document == document]
    assert texts
    for text in texts:
        exec(compile(text, document, "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("document", sorted({block.document for block in BLOCKS if block.is_executed}))
def test_marked_blocks_run(document: str) -> None:
    assert executed(document)


async def test_the_example_of_a_pool_in_one_process_answers(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(POOL, encoding="utf-8")
    answer: Answer = await executed("dmoa/docs/serving.md")["ask"]("Who is first?", "single", str(tmp_path / "pool.yaml"))
    assert (answer.text, answer.stop_reason, answer.policy) == ("FIRST", "single", "single")


def test_the_bad_input_example_is_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pool.yaml").write_text(POOL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shown = next(line for block in of("text") for line in block.text.splitlines() if "gate.temprature: unknown key" in line)
    done = CliRunner().invoke(app, ["run", "x", "--config", "pool.yaml", "--set", "gate.temprature=0.2"])
    assert (done.exit_code, done.stderr.strip()) == (2, shown)


def headings(text: str) -> set[str]:
    """The anchors of a document's headings."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links() -> list[tuple[str, str]]:
    return [(name, target) for name, text in DOCUMENTS.items() for target in re.findall(r"\]\(([^)\s]+)\)", text)]


@pytest.mark.parametrize(("document", "target"), links())
def test_links_between_documents_resolve(document: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    file = (ROOT / document).parent / path if path else ROOT / document
    assert file.is_file()
    assert not anchor or anchor in headings(file.read_text(encoding="utf-8"))


def test_the_readme_leads_to_every_document() -> None:
    assert len(links()) >= 10
    reached = {target for document, target in links() if document == "README.md"}
    assert set(DOCUMENTS) - {"README.md"} <= reached
    assert {f"dmoa docs {topic}" for topic in TOPICS} <= set(inline_commands())


def named_files() -> set[str]:
    """Files and folders of the package and the repository that a document names in backquotes."""
    spans = {span for text in DOCUMENTS.values() for span in re.findall(r"`((?:dmoa|jobs|cluster|tests)/[\w./-]+)`", text)}
    assert len(spans) >= 10
    return spans


@pytest.mark.parametrize("path", sorted(named_files()))
def test_files_that_documents_name_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_readme_fits_a_few_screens_in_its_order() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES
    order = ["Two commands", "What they print", "The flow", "Use it", "Results", "Limits", "Where to read on"]
    assert re.findall(r"^## (.+)$", README, re.M) == order


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_no_machine_and_no_registry_is_named(document: str) -> None:
    text = DOCUMENTS[document]
    assert re.findall(r"https?://(?!127\.0\.0\.1|[\w-]+\.example\.com/)\S+", text) == []
    assert re.findall(r"(?<![\w.:])/(?:home|root|work|tmp|Users)/\S*", text) == []
