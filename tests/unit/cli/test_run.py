"""`dmoa run`: steps and answer, JSON, traces and their replay, through a server, and every kind of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml

from dmoa.errors import DmoaError
from dmoa.workflows.backends import fetch_trace

QUESTION = "What is 12 + 7?"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def schema(dmoa: Any, name: str) -> Any:
    result = dmoa("schema", name)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_prints_every_step_and_the_answer(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    result = dmoa("run", QUESTION, "--config", pool, "--json", tmp_path / "reply.json")
    assert result.exit_code == 0, result.stderr
    reply = read_json(tmp_path / "reply.json")
    steps = reply["dmoa"]["steps"]
    lines = result.stdout.splitlines()
    heads = [line for line in lines if line.startswith("step ")]
    assert len(heads) == len(steps) >= 1
    for head, step in zip(heads, steps, strict=True):
        assert f"k {step['k']}" in head
        assert f"mass {step['mass']:.3f}" in head
    rows = [line for line in lines if line.startswith(("* ", "  "))]
    for agent in steps[0]["agents"]:
        row = next(line for line in rows if f" {agent['name']} " in line)
        assert f"{agent['probability']:.3f}" in row
        assert row.startswith("*") == (agent["status"] == "ok")
        if agent["entropy_nats"] is not None:
            assert f"{agent['entropy_nats']:.3f} nats/token" in row
    assert lines[lines.index("answer") + 1] == reply["answer"]
    assert f"stopped by {reply['dmoa']['stop_reason']} after {len(steps)} step" in result.stdout


def test_the_bar_of_an_agent_is_as_long_as_its_probability(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    result = dmoa("run", QUESTION, "--config", pool, "--max-steps", 1, "--json", tmp_path / "reply.json")
    for agent in read_json(tmp_path / "reply.json")["dmoa"]["steps"][0]["agents"]:
        row = next(line for line in result.stdout.splitlines() if f" {agent['name']} " in line)
        assert abs(row.count("█") - 20 * agent["probability"]) <= 0.51


def test_json_holds_the_dmoa_object_of_the_schema(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    dmoa("run", QUESTION, "--config", pool, "--json", tmp_path / "reply.json")
    reply = read_json(tmp_path / "reply.json")
    jsonschema.validate(reply["dmoa"], schema(dmoa, "reply"))
    assert reply["question"] == QUESTION
    assert reply["answer"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(reply["dmoa"] | {"steps": "none"}, schema(dmoa, "reply"))


def test_every_output_says_that_the_gate_is_untrained(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    note = ": routing is arbitrary until it is trained"
    assert note in dmoa("run", QUESTION, "--config", pool).stdout
    quiet = dmoa("run", QUESTION, "--config", pool, "-q", "--json", tmp_path / "reply.json")
    assert note in quiet.stderr
    record = read_json(tmp_path / "reply.json")["dmoa"]
    assert record["untrained"] is True
    assert record["gate_version"].startswith("untrained-")
    single = dmoa("run", QUESTION, "--config", pool, "--policy", "single")
    assert note not in single.stdout + single.stderr, "no gate decided"


def test_quiet_prints_the_answer_alone(dmoa: Any, pool: Path) -> None:
    result = dmoa("run", QUESTION, "--config", pool, "--agent", "adder", "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "The answer is 19.\n", "")


def test_verbose_shows_what_the_agents_said(dmoa: Any, pool: Path) -> None:
    said = "guesser: The answer is 18."
    assert said in dmoa("run", QUESTION, "--config", pool, "--set", "gate.activation.rule=fixed", "-v").stdout
    assert said not in dmoa("run", QUESTION, "--config", pool, "--set", "gate.activation.rule=fixed").stdout


def test_the_pool_comes_from_the_environment_where_no_option_names_one(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    result = dmoa("run", QUESTION, "--json", tmp_path / "reply.json", env={"DMOA_CONFIG": str(pool)})
    assert result.exit_code == 0
    assert read_json(tmp_path / "reply.json")["dmoa"]["pool"] == "tiny"


def test_a_model_text_cannot_drive_the_terminal(dmoa: Any, pool: Path) -> None:
    reply = yaml.safe_dump({"adder": "safe \x1b[31mred\x07"}, default_flow_style=True).strip()
    result = dmoa("run", QUESTION, "--config", pool, "--agent", "adder", "--set", f"llms.fake.engine_kwargs.replies={reply}")
    assert result.exit_code == 0, result.stderr
    assert "safe [31mred" in result.stdout
    assert "\x1b" not in result.stdout
    assert "\x07" not in result.stdout


def test_limits_of_the_command_line_lower_the_pools(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    dmoa("run", QUESTION, "--config", pool, "--max-steps", 1, "--json", tmp_path / "one.json")
    assert len(read_json(tmp_path / "one.json")["dmoa"]["steps"]) == 1
    slow = ("--set", "llms.fake.engine_kwargs.delays_ms={guesser: 60000}", "--set", "gate.activation.rule=fixed")
    result = dmoa("run", QUESTION, "--config", pool, *slow, "--deadline", 0.3, "--json", tmp_path / "late.json")
    assert result.exit_code == 0, result.stderr
    record = read_json(tmp_path / "late.json")["dmoa"]
    assert record["stop_reason"] == "deadline"
    assert {a["name"]: a["status"] for a in record["steps"][0]["agents"]}["guesser"] == "late"


@pytest.mark.contract
def test_runs_in_process_without_ray_or_a_model(pool: Path) -> None:
    code = (
        "import sys\nfrom dmoa.cli.main import app\n"
        f"app(['run', 'hi', '--config', {str(pool)!r}], standalone_mode=False)\n"
        "print('loaded:', *[name for name in ('ray', 'transformers', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


# Traces and replay


@pytest.fixture
def traces(dmoa: Any, pool: Path, tmp_path: Path) -> Path:
    """Three queries in one file, of different lengths."""
    path = tmp_path / "traces" / "all.jsonl"
    for question, steps in ((QUESTION, 3), ("Sort pear, fig.", 1), ("Why?", 2)):
        result = dmoa("run", question, "--config", pool, "--max-steps", steps, "--trace", path, "-q")
        assert result.exit_code == 0, result.stderr
    return path


def test_an_export_without_a_line_says_what_one_takes(dmoa: Any, traces: Path, tmp_path: Path) -> None:
    result = dmoa("export", "--format", "dpo", "--traces", traces, "--out", tmp_path / "pairs.jsonl")
    assert "0 lines of dpo: a pair takes replies of one step that a gate of score posterior" in result.stderr


def test_a_trace_is_appended_and_fits_its_schema(dmoa: Any, traces: Path) -> None:
    lines = [json.loads(line) for line in traces.read_text(encoding="utf-8").splitlines()]
    assert [line["query"]["text"] for line in lines] == [QUESTION, "Sort pear, fig.", "Why?"]
    for line in lines:
        jsonschema.validate(line, schema(dmoa, "trace"))


def test_replay_repeats_every_decision(dmoa: Any, pool: Path, traces: Path, tmp_path: Path) -> None:
    result = dmoa("run", "--replay", traces, "--config", pool, "--json", tmp_path / "replay.json")
    assert result.exit_code == 0, result.stderr
    assert "replayed 3 traces together: identical" in result.stdout
    assert "routing is arbitrary until it is trained" in result.stdout
    report = read_json(tmp_path / "replay.json")
    assert report["identical"] is True
    recorded = [json.loads(line) for line in traces.read_text(encoding="utf-8").splitlines()]
    assert [row["decisions"] for row in report["traces"]] == [len(line["routes"]) for line in recorded]


def _probability(route: dict[str, Any]) -> None:
    route["probability_A"][0] += 1e-6


def _ranking(route: dict[str, Any]) -> None:
    route["ranking"].reverse()


def _k(route: dict[str, Any]) -> None:
    route["k"] += 1


def _mass(route: dict[str, Any]) -> None:
    route["mass"] *= 0.999


def _hidden(route: dict[str, Any]) -> None:
    route["hidden_H"][-1] += 1e-6


def _input(route: dict[str, Any]) -> None:
    route["input_X"][0] += 0.5


@pytest.mark.parametrize(
    ("tamper", "field"),
    [
        (_probability, "probability_A"),
        (_ranking, "ranking"),
        (_k, "k"),
        (_mass, "mass"),
        (_hidden, "hidden_H"),
        (_input, "hidden_H"),
    ],
)
def test_replay_finds_one_changed_number(
    dmoa: Any, pool: Path, traces: Path, tmp_path: Path, tamper: Callable[[dict[str, Any]], None], field: str
) -> None:
    lines = [json.loads(line) for line in traces.read_text(encoding="utf-8").splitlines()]
    tamper(lines[1]["routes"][0])
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    result = dmoa("run", "--replay", traces, "--config", pool, "--json", tmp_path / "replay.json")
    assert result.exit_code == 1
    assert "1 of 3 traces differ" in result.stdout
    rows = read_json(tmp_path / "replay.json")["traces"]
    assert [row["identical"] for row in rows] == [True, False, True]
    assert any(difference.startswith(f"step 0: {field} was ") for difference in rows[1]["differences"])


def test_replay_with_another_gate_is_bad_input(dmoa: Any, pool: Path, traces: Path) -> None:
    result = dmoa("run", "--replay", traces, "--config", pool, "--set", "gate.seed=1")
    assert result.exit_code == 2
    assert "gate_version is untrained-" in result.stderr
    assert result.stdout == ""


def test_replay_of_a_damaged_file_names_the_line(dmoa: Any, pool: Path, traces: Path) -> None:
    with traces.open("a", encoding="utf-8") as file:
        file.write("{oops\n")
    result = dmoa("run", "--replay", traces, "--config", pool)
    assert result.exit_code == 2
    assert "line 4: not valid JSON" in result.stderr


def test_replay_of_nothing_repeats_nothing(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    result = dmoa("run", "--replay", tmp_path / "empty.jsonl", "--config", pool)
    assert result.exit_code == 2
    assert "empty.jsonl': it is empty; give a file of JSON lines that dmoa wrote" in result.stderr


def test_a_trace_that_cannot_be_written_is_told_of_before_anybody_is_asked(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    result = dmoa("run", QUESTION, "--config", pool, "--trace", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--trace: cannot write" in result.stderr


def test_a_trace_may_go_into_a_named_pipe(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    is_over = threading.Event()

    def follow() -> None:
        while not is_over.is_set():
            read.append((tmp_path / "pipe").read_bytes())  # until whoever writes closes it

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    assert dmoa("run", QUESTION, "--config", pool, "--trace", tmp_path / "pipe").exit_code == 0
    is_over.set()
    with suppress(OSError):  # nobody reads any more
        os.close(os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK))
    reader.join(10.0)
    assert json.loads(read[0])["query"]["text"] == QUESTION


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("run", QUESTION, "--trace", "s3://bucket/t.jsonl"),
            "--trace is 's3://bucket/t.jsonl'; expected a place",
        ),
        (("run", QUESTION, "--json", "s3://bucket/r.json"), "--json is 's3://bucket/r.json'; expected a place of this machine"),
        (
            ("export", "--format", "sft", "--traces", "t.jsonl", "--out", "gs://bucket/x.jsonl"),
            "cannot write 'gs:/bucket/x.jsonl': gs://bucket/x.jsonl is a URI; expected a file of this machine",
        ),
        (
            ("adapt", "--online", "--out", "s3://bucket/learner"),
            "--out is 's3://bucket/learner'; expected a place",
        ),
    ],
)
def test_no_folder_is_made_of_the_name_of_a_place_elsewhere(
    arguments: tuple[str, ...], message: str, dmoa: Any, pool: Path, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "t.jsonl").write_bytes(traces.read_bytes())
    monkeypatch.chdir(tmp_path / "apart")
    result = dmoa(*arguments, *(("--config", pool) if arguments[0] == "run" else ()))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert [path.name for path in Path().iterdir()] == ["t.jsonl"]


def test_a_trace_behind_a_line_that_a_killed_run_left_is_a_line_of_its_own(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"schema_version": 1, "trace_id": "to')
    for _ in range(2):
        assert dmoa("run", QUESTION, "--config", pool, "--policy", "single", "--trace", path).exit_code == 0
    torn, *whole = path.read_text().splitlines()
    assert torn == '{"schema_version": 1, "trace_id": "to'
    assert [json.loads(line)["query"]["text"] for line in whole] == [QUESTION, QUESTION]


def test_replay_without_a_gate_says_so(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    dmoa("run", QUESTION, "--config", pool, "--policy", "single", "--trace", tmp_path / "t.jsonl")
    result = dmoa("run", "--replay", tmp_path / "t.jsonl", "--config", pool)
    assert result.exit_code == 0
    assert "no gate decided" in result.stdout


# Through a server


async def test_a_trace_of_another_dmoa_is_one_message() -> None:
    async def trace(trace_id: str) -> dict[str, Any]:
        return {"trace_id": trace_id, "colour": "red"}

    server: Any = SimpleNamespace(url="http://x", trace=trace)
    with pytest.raises(DmoaError, match=r"^http://x: its trace is not understood .*; use the dmoa of the server$"):
        await fetch_trace(server, "t1")


def test_a_server_gives_the_same_routing_as_this_process(dmoa: Any, pool: Path, url: str, tmp_path: Path) -> None:
    here = dmoa("run", QUESTION, "--config", pool, "--json", tmp_path / "here.json")
    there = dmoa("run", QUESTION, "--url", url, "--json", tmp_path / "there.json")
    assert (here.exit_code, there.exit_code) == (0, 0), there.stderr
    assert (there.stdout + there.stderr).lower().count("step 1") == 1, "a server's steps are printed once"
    a, b = read_json(tmp_path / "here.json"), read_json(tmp_path / "there.json")
    assert a["answer"] == b["answer"]

    def routing(reply: Any) -> Any:
        return [
            [(agent["name"], agent["probability"], agent["status"]) for agent in step["agents"]]
            for step in reply["dmoa"]["steps"]
        ]

    assert routing(a) == routing(b)
    assert [line for line in here.stdout.splitlines() if line.startswith("* ")] != []


def test_a_servers_trace_replays_here(dmoa: Any, pool: Path, url: str, tmp_path: Path) -> None:
    result = dmoa("run", QUESTION, "--url", url, "--max-steps", 2, "--trace", tmp_path / "t.jsonl")
    assert result.exit_code == 0, result.stderr
    assert dmoa("run", "--replay", tmp_path / "t.jsonl", "--config", pool).exit_code == 0


def test_an_agent_of_a_server_can_be_asked_alone(dmoa: Any, url: str) -> None:
    result = dmoa("run", QUESTION, "--url", url, "--agent", "adder", "-q")
    assert (result.exit_code, result.stdout) == (0, "The answer is 19.\n")


def test_what_a_server_refuses_is_bad_input(dmoa: Any, url: str) -> None:
    for option, allowed in (("--agent", "adder"), ("--policy", "single")):
        result = dmoa("run", QUESTION, "--url", url, option, "nobody")
        assert result.exit_code == 2
        assert "nobody" in result.stderr
        assert allowed in result.stderr


def test_a_server_that_is_not_there_is_a_failure(dmoa: Any) -> None:
    result = dmoa("run", QUESTION, "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr


# Bad input and failures


def changed(pool: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    tree = yaml.safe_load(pool.read_text(encoding="utf-8"))
    change(tree)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def _unknown_key(tree: dict[str, Any]) -> None:
    tree["gate"]["temprature"] = 0.3


def _bad_range(tree: dict[str, Any]) -> None:
    tree["gate"]["activation"]["mass"] = 1.5


def _missing_adapter(tree: dict[str, Any]) -> None:
    tree["agents"][1]["adapter"] = "path:/nowhere/adapter"


def _undefined_llm(tree: dict[str, Any]) -> None:
    tree["agents"][2]["llm"] = "gpt"


def _same_name(tree: dict[str, Any]) -> None:
    tree["agents"][2]["name"] = "adder"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_unknown_key, ["gate.temprature", "0.3", "unknown key", "remove it"]),
        (_bad_range, ["gate.activation.mass", "1.5", "expected a number less than or equal to 1"]),
        (_missing_adapter, ["agents.guesser.adapter", "path:/nowhere/adapter", "available:", "fix the name"]),
        (_undefined_llm, ["agents.2.llm", "'gpt'", "expected one of fake", "add it under llms or fix the name"]),
        (_same_name, ["agents.2.name", "'adder'", "names must differ"]),
    ],
)
def test_a_bad_pool_is_one_message_and_status_2(
    dmoa: Any, pool: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: list[str]
) -> None:
    result = dmoa("run", QUESTION, "--config", changed(pool, tmp_path, change))
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("dmoa: ")
    for text in said:
        assert text in line


@pytest.mark.parametrize("command", [("run", "hi"), ("chat",), ("serve",), ("demo",), ("doctor",)])
def test_every_command_refuses_a_bad_pool(dmoa: Any, pool: Path, command: tuple[str, ...]) -> None:
    result = dmoa(*command, "--config", pool, "--set", "gate.hidden=0")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    for text in ("gate.hidden is 0", "greater than or equal to 1"):
        assert text in line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--policy", "vote"), ["--policy", "'vote'", "expected one of dmoa, single"]),
        (("--agent", "oracle"), ["--agent", "'oracle'", "expected one of adder, guesser, echo"]),
        (("--agent", "adder", "--policy", "dmoa"), ["--agent", "'adder'", "leave one of them out"]),
        (("--checkpoint", "/nowhere/gate"), ["checkpoint '/nowhere/gate'", "gate.safetensors and gate.json"]),
        (("--set", "gate.hidden"), ["--set 'gate.hidden'", "write it as a.b=value"]),
        (("--replay", "t.jsonl"), ["QUESTION: no effect with --replay", "leave it out"]),
        (("--url", "ftp://x"), ["--url", "no effect"]),
        (("--max-steps", "0"), ["--max-steps", "greater than or equal to 1"]),
        (("--nonsense",), ["--nonsense"]),
    ],
)
def test_a_bad_option_is_one_message_and_status_2(dmoa: Any, pool: Path, args: tuple[str, ...], said: list[str]) -> None:
    result = dmoa("run", QUESTION, "--config", pool, *args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    for text in said:
        assert text in result.stderr


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_an_empty_question_is_bad_input(dmoa: Any, pool: Path, question: str) -> None:
    result = dmoa("run", question, "--config", pool)
    assert result.exit_code == 2
    assert "question: it is empty" in result.stderr
    assert dmoa("run", "--config", pool).exit_code == 2


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "http://h:99999",
        "http://h:80O0",
        "http://h:0",
        "http://h:-1",
        "http://[::1",
        "http://[::1]x:80",
        "http://",
    ],
)
def test_a_url_is_checked_before_it_is_called(dmoa: Any, url: str) -> None:
    result = dmoa("run", QUESTION, "--url", url)
    assert result.exit_code == 2
    assert f"--url is {url!r}; give the server's address, such as http://127.0.0.1:8000" in result.stderr


def test_agents_that_all_fail_are_a_failure(dmoa: Any, pool: Path) -> None:
    failing = "llms.fake.engine_kwargs.failing=[adder, guesser, echo]"
    result = dmoa("run", QUESTION, "--config", pool, "--set", failing)
    assert result.exit_code == 1
    assert "no agent of the pool answered" in result.stderr
    assert "Traceback" not in result.output


def test_a_result_that_cannot_be_written_is_bad_input(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for option in ("--json", "--trace"):
        result = dmoa("run", QUESTION, "--config", pool, option, tmp_path / "file" / "x.json")
        assert result.exit_code == 2
        assert f"{option}: cannot write" in result.stderr
