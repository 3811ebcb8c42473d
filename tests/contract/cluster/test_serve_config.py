"""The Serve config: the shipped one is the built one, Serve accepts it, and its builder keeps an open server shut."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmoa.agents.pool import load_pool, vllm_builds
from dmoa.config import from_tree
from dmoa.errors import ConfigError
from tests.contract.cluster.manifests import CLUSTER, ROOT, SERVICE, one

with warnings.catch_warnings():
    # Serve's own records, as they are loaded (Ray 2.60).
    warnings.filterwarnings("ignore", message="Using extra keyword arguments", category=DeprecationWarning)
    from ray.serve import Application
    from ray.serve.schema import ServeDeploySchema

    from dmoa.serving.deploy import BUILDER, build_pool, serve_config

SHIPPED = CLUSTER / "serve.yaml"
POOL: dict[str, Any] = {
    "name": "tiny",
    "llms": {"fake": {"model": "scripted:fake", "engine": "scripted"}},
    "agents": [{"name": "echo", "llm": "fake", "profile": "Repeats the question."}],
    "server": {"host": "127.0.0.1", "port": 8123},
}


def run_build(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run cluster/build.py in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["build.py", *arguments])
    try:
        runpy.run_path(str(CLUSTER / "build.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_shipped_config_and_service_are_the_built_ones(tmp_path: Path) -> None:
    built, manifest = tmp_path / "serve.yaml", tmp_path / "rayservice.yaml"
    manifest.write_text("spec:\n  serveConfigV2: |\n    old: true\n\n    more\n  rest: 1\n", encoding="utf-8")
    command = [sys.executable, str(CLUSTER / "build.py"), "--out", str(built), "--manifest", str(manifest)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr
    text = built.read_text(encoding="utf-8")
    again = "build it again: python cluster/build.py"
    assert SHIPPED.read_text(encoding="utf-8") == text, again
    assert one(SERVICE)["spec"]["serveConfigV2"] == text, again
    assert yaml.safe_load(manifest.read_text(encoding="utf-8")) == {"spec": {"serveConfigV2": text, "rest": 1}}


def test_shipped_config_deploys_the_shipped_pool() -> None:
    tree = one(SHIPPED)
    schema = ServeDeploySchema.model_validate(tree)
    (application,) = schema.applications
    assert from_tree(application.args, source="serve.yaml") == load_pool(CLUSTER / "pools" / "paper.yaml")
    assert application.import_path == BUILDER == f"{build_pool.__module__}:{build_pool.__name__}"
    assert tree["http_options"] == {"host": "0.0.0.0", "port": 8000}


def test_shipped_config_builds_an_application_where_vllm_is(monkeypatch: pytest.MonkeyPatch) -> None:
    (application,) = one(SHIPPED)["applications"]
    monkeypatch.setenv("DMOA_API_KEYS", "secret")
    if len(vllm_builds()) == 1:
        assert isinstance(build_pool(application["args"]), Application)
    else:
        with pytest.raises(ConfigError, match=r"llms\.gpt-oss-120b\.engine is 'vllm'"):
            build_pool(application["args"])


def test_overrides_change_the_built_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = tmp_path / "pool.yaml"
    pool.write_text(yaml.safe_dump(POOL), encoding="utf-8")
    out = tmp_path / "serve.yaml"
    changes = ("--set", "server.port=8200", "--set", "limits.max_steps=3")
    assert run_build(monkeypatch, "--pool", str(pool), "--out", str(out), *changes) == 0
    tree = one(out)
    assert tree["http_options"]["port"] == 8200
    assert tree["applications"][0]["args"]["limits"] == {"max_steps": 3}


def test_bad_pool_exits_2_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "serve.yaml"
    assert run_build(monkeypatch, "--out", str(out), "--set", "gate.hiden=3") == 2
    assert "gate.hiden" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("pool", "out", "message"),
    [
        ("nope.yaml", "serve.yaml", "build: --pool: cannot read 'nope.yaml': "),
        ("binary.yaml", "serve.yaml", "build: --pool: cannot read 'binary.yaml': "),
        ("specialists", "missing/serve.yaml", "missing/serve.yaml"),
    ],
)
def test_a_file_that_cannot_be_read_or_written_exits_2(
    pool: str, out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary.yaml").write_bytes(b"\xff\xfe")
    assert run_build(monkeypatch, "--pool", pool, "--out", out) == 2
    told = capsys.readouterr().err
    assert (told.count("\n"), told.startswith("build: "), message in told) == (1, True, True)


def test_a_packaged_pool_is_built_by_its_name_and_the_next_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "serve.yaml"
    assert run_build(monkeypatch, "--pool", "specialists", "--out", str(out)) == 0
    assert one(out)["applications"][0]["args"]["name"] == "specialists"
    assert f"build: wrote {out} (on a Ray of your own: `serve deploy {out}`)" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["metadata: {{ .Values.name }}: {", "ports: [{name: serve, containerPort: '${PORT}'}]"])
def test_manifest_that_is_a_template_is_filled_in_as_text(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, out = tmp_path / "rayservice.yaml", tmp_path / "serve.yaml"
    manifest.write_text(f"{head}\nspec:\n  serveConfigV2: |\n    old\n", encoding="utf-8")
    assert run_build(monkeypatch, "--manifest", str(manifest), "--out", str(out)) == 0
    assert manifest.read_text(encoding="utf-8").startswith(f"{head}\nspec:\n  serveConfigV2: |\n    # Built")


def test_texts_that_another_yaml_reads_otherwise_stand_in_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go's YAML, which KubeRay has, takes 1e3 for a number, n for false, and U+2028 for the end of a line."""
    profile, open_server = "One line\u2028and its next.", {"host": "0.0.0.0"}
    agents = [{"name": name, "llm": "fake", "profile": profile, "tags": ["0o17"]} for name in ("1e3", "n")]
    tree = {**POOL, "agents": agents, "server": open_server}
    pool, out, manifest = tmp_path / "pool.yaml", tmp_path / "serve.yaml", tmp_path / "rayservice.yaml"
    pool.write_text(json.dumps(tree), encoding="utf-8")
    manifest.write_text(SERVICE.read_text(encoding="utf-8"), encoding="utf-8")
    assert run_build(monkeypatch, "--pool", str(pool), "--out", str(out), "--manifest", str(manifest)) == 0
    text = one(manifest)["spec"]["serveConfigV2"]
    assert text == out.read_text(encoding="utf-8")
    assert yaml.safe_load(text)["applications"][0]["args"] == tree
    for quoted in ('name: "1e3"', 'name: "n"', '- "0o17"', 'profile: "One line\\Land its next."'):
        assert quoted in text


def test_manifest_without_a_place_for_the_config_exits_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "rayservice.yaml"
    manifest.write_text("spec: {}\n", encoding="utf-8")
    assert run_build(monkeypatch, "--out", str(tmp_path / "serve.yaml"), "--manifest", str(manifest)) == 2
    assert "serveConfigV2" in capsys.readouterr().err
    assert not (tmp_path / "serve.yaml").exists()
    assert manifest.read_text(encoding="utf-8") == "spec: {}\n"


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ("server.host=127.0.0.1", "server.host is '127.0.0.1', where a pod is reached by itself alone"),
        ("server.port=8123", "server.port is 8123; the manifest's pods, its Service and the NetworkPolicy have 8000"),
    ],
)
def test_service_that_nobody_would_reach_is_refused(
    server: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, out = tmp_path / "rayservice.yaml", tmp_path / "serve.yaml"
    text = "kind: Namespace\n---\n" + SERVICE.read_text(encoding="utf-8")
    manifest.write_text(text, encoding="utf-8")
    arguments = ("--manifest", str(manifest), "--out", str(out), "--set", server)
    assert run_build(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert manifest.read_text(encoding="utf-8") == text
    assert run_build(monkeypatch, *arguments[2:]) == 0  # alone, for a Ray of one's own


def test_builder_binds_the_pool_and_leaves_its_arguments_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DMOA_API_KEYS", raising=False)
    args = json.loads(json.dumps(POOL))
    assert isinstance(build_pool(args), Application)
    assert args == POOL


def test_builder_refuses_a_reachable_server_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    open_pool = {**POOL, "server": {"host": "0.0.0.0"}}
    monkeypatch.delenv("DMOA_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"server\.host is '0\.0\.0\.0'"):
        build_pool(open_pool)
    monkeypatch.setenv("DMOA_API_KEYS", "secret")
    assert isinstance(build_pool(open_pool), Application)


def test_config_holds_no_key_and_refuses_a_bad_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMOA_API_KEYS", "s3cr3t-of-the-test")
    assert "s3cr3t" not in json.dumps(serve_config(POOL, source="pool.yaml"))
    with pytest.raises(ConfigError, match=r"pool\.yaml: agents"):
        serve_config({**POOL, "agents": []}, source="pool.yaml")


def test_paths_of_a_pool_stay_as_they_are_written(tmp_path: Path) -> None:
    """Those that reading a pool makes of them are the building machine's."""
    text = (CLUSTER / "pools" / "recorded.yaml").read_text(encoding="utf-8")
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded" / "replies.jsonl").write_text("{}")
    (tmp_path / "pool.yaml").write_text(text, encoding="utf-8")
    tree = {**yaml.safe_load(text), "job": {"out": "x"}}
    (application,) = serve_config(tree, source=str(tmp_path / "pool.yaml"))["applications"]
    assert application["args"] == yaml.safe_load(text)
