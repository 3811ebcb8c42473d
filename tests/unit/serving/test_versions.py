"""Gate versions of a router: installs, rollbacks, history, and what a restart or a redeployment takes up."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import serve
from ray.experimental import internal_kv

from dmoa import checkpoint
from dmoa.agents.pool import build_pool_gate, fingerprint
from dmoa.checkpoint import FILES, describe_gate
from dmoa.config import Config
from dmoa.core.gate import Gate, GateSpec, init_gate
from dmoa.errors import CheckpointError, PoolChangedError
from dmoa.routing import Decided, build_gate
from dmoa.serving.actors import pack_record, unpack_record
from dmoa.serving.rollover import pool_version
from dmoa.serving.router.actor import RouterActor
from dmoa.serving.router.state import RouterState
from dmoa.serving.router.versions import MAX_NOTE_CHARACTERS, GateVersions, HistoryEntry, _line
from tests.examples import examples
from tests.logged import Logged

AGENTS = ("adder", "sorter")
X = 2 * 384 + 4


def pool(gate: dict[str, Any] | None = None, **changes: Any) -> Config:
    return Config.model_validate(
        {
            "name": "pool",
            "llms": {"tiny": {"model": "scripted:x", "engine": "scripted"}},
            "agents": [{"name": name, "llm": "tiny", "profile": f"You are {name}."} for name in AGENTS],
            "gate": {"hidden": 8} | (gate or {}),
        }
        | changes
    )


def trained(folder: Path, seed: int, config: Config | None = None, **spec: Any) -> Path:
    """Write the checkpoint of a gate that counts as trained."""
    config = config or pool()
    gate = build_gate(config.gate.model_copy(update={"seed": seed}), config.agent_names)
    gate.spec = replace(gate.spec, **spec)
    record = describe_gate(gate, fingerprint=fingerprint(config), trained_on={"rows": seed})
    return checkpoint.save(folder / f"checkpoint-{seed}", gate, record)


def version_of(folder: Path) -> str:
    return checkpoint.load(folder)[1].version


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


def opened(root: Path, config: Config | None = None, configured: str | None = None, **options: int) -> GateVersions:
    return GateVersions(RouterState(root.as_uri()), config or pool(), configured, **options)


def actions(found: GateVersions) -> list[tuple[str, str, str | None]]:
    return [(entry["action"], entry["version"], entry["previous"]) for entry in found.history()]


def test_a_new_router_begins_with_what_is_configured(root: Path) -> None:
    found = opened(root)
    assert found.version == found.configured == build_pool_gate(pool())[1].version
    assert actions(found) == [("configured", found.version, None)]
    assert found.since_unix_s == found.history()[0]["unix_s"]


def test_an_installed_version_is_current_recorded_and_taken_up_after_a_restart(root: Path, tmp_path: Path) -> None:
    found = opened(root)
    first = found.version
    folder = trained(tmp_path, 1, theta=-1.5)
    change = found.install(files_of(folder), "why not", [np.zeros(X, np.float32)])
    assert (change.version, change.previous, change.is_change) == (version_of(folder), first, True)
    assert change.gate.spec.theta == -1.5
    assert change.shadow is not None
    assert change.shadow.inputs == 1
    assert change.to_json()["shadow"]["inputs"] == 1
    for again in (found, opened(root)):
        assert (again.version, again.configured) == (version_of(folder), first)
        assert actions(again) == [("configured", first, None), ("install", version_of(folder), first)]
        assert again.history()[-1]["note"] == "why not"
        weights = again.gate.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in checkpoint.load(folder)[0].state_dict().items())


def test_what_was_installed_moves_along_to_an_empty_place(root: Path, tmp_path: Path) -> None:
    found = opened(root)
    first, folder = found.version, trained(tmp_path, 1)
    found.install(files_of(folder), "why not", [])
    (root / "versions" / "gone").mkdir()  # never finished
    there = RouterState((tmp_path / "there").as_uri())
    there.take_over(RouterState(root.as_uri()))
    moved = GateVersions(there, pool(), None)
    assert (moved.version, moved.history()) == (version_of(folder), found.history())
    assert moved.rollback(None, "").version == first
    there.take_over(RouterState(root.as_uri()))
    assert GateVersions(there, pool(), None).version == first, "what is there already stays"


def test_a_place_that_is_gone_is_not_taken_over_but_for_what_is_remembered(root: Path, tmp_path: Path, logged: Logged) -> None:
    here = RouterState(root.as_uri())
    GateVersions(here, pool(), None).install(files_of(trained(tmp_path, 1)), "", [])
    shutil.rmtree(root)
    there = RouterState((tmp_path / "there").as_uri())
    there.take_over(here)
    assert GateVersions(there, pool(), None).version == version_of(tmp_path / "checkpoint-1")
    (root / "state.json").write_text("{")
    (root / "state.json.last").write_text("{")
    RouterState((tmp_path / "elsewhere").as_uri()).take_over(RouterState(root.as_uri()))
    assert "is not taken over, and" in logged.text
    assert not (tmp_path / "elsewhere" / "state.json").exists()


def test_installing_the_current_version_changes_nothing(root: Path, tmp_path: Path) -> None:
    found = opened(root)
    files = files_of(trained(tmp_path, 1))
    found.install(files, "", [])
    before = found.history()
    change = found.install(files, "again", [])
    assert (change.is_change, change.version, change.previous) == (False, found.version, found.version)
    assert found.history() == before


def break_weights(folder: Path) -> None:
    gate, record = checkpoint.load(folder)
    with torch.no_grad():
        gate.head_bias[0] = float("nan")
    checkpoint.save(folder, gate, describe_gate(gate, fingerprint=record.pool_fingerprint, trained_on={"rows": 1}))


def another_width(folder: Path) -> None:
    gate, record = checkpoint.load(folder)
    narrow = init_gate(replace(gate.spec, embedding_dim=4), seed=1)
    checkpoint.save(folder, narrow, describe_gate(narrow, fingerprint=record.pool_fingerprint, trained_on={"rows": 1}))


def another_pool(folder: Path) -> None:
    gate, _ = checkpoint.load(folder)
    checkpoint.save(folder, gate, describe_gate(gate, fingerprint="0" * 64, trained_on={"rows": 1}))


def another_preset(folder: Path) -> None:
    gate = Gate(GateSpec.from_config(pool({"preset": "paper"}).gate, AGENTS))
    checkpoint.save(folder, gate, describe_gate(gate, fingerprint=fingerprint(pool()), trained_on={"rows": 1}))


def half_written(folder: Path) -> None:
    weights = folder / "gate.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])


REFUSED = [
    (break_weights, "head_bias holds NaN or infinity; expected finite numbers"),
    (another_width, "embedding_dim is 4, the encoder of this pool gives 384"),
    (another_pool, "made for pool 000000000000, this pool is "),
    (another_preset, "its preset is 'paper', the pool's gate.preset is 'default'"),
    (half_written, "^the checkpoint: "),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED, ids=[damage.__name__ for damage, _ in REFUSED])
def test_a_refused_gate_leaves_the_current_one_untouched(root: Path, tmp_path: Path, damage: Any, message: str) -> None:
    found = opened(root)
    found.install(files_of(trained(tmp_path, 1)), "", [])
    folder = trained(tmp_path, 2)
    damage(folder)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    history, version = found.history(), found.version
    with pytest.raises(CheckpointError, match=message) as caught:
        found.install(files_of(folder), "", [])
    assert "/tmp" not in str(caught.value)
    assert (found.history(), found.version) == (history, version)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("names", [(), ("gate.json",), ("gate.json", "gate.safetensors", "../../etc/passwd")])
def test_only_the_two_files_of_a_checkpoint_are_taken(root: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(
        CheckpointError, match=r"the checkpoint: its files are .*; expected exactly gate\.safetensors, gate\.json"
    ):
        opened(root).install(dict.fromkeys(names, b""), "", [])


def test_rolling_back_twice_goes_back_twice(root: Path, tmp_path: Path) -> None:
    found = opened(root)
    first = found.version
    one, two = trained(tmp_path, 1), trained(tmp_path, 2)
    for folder in (one, two):
        found.install(files_of(folder), "", [])
    assert found.rollback(None, "worse").version == found.version == version_of(one)
    found = opened(root)  # a restart in between
    change = found.rollback(None, "worse still")
    assert (change.version, change.previous, change.shadow) == (first, version_of(one), None)
    assert [entry["note"] for entry in found.history()[-2:]] == ["worse", "worse still"]
    with pytest.raises(CheckpointError, match=rf"rollback: nothing was current before gate {first}; known are "):
        found.rollback(None, "")
    assert found.version == first


def test_rolling_back_to_a_named_version(root: Path, tmp_path: Path) -> None:
    found = opened(root)
    first = found.version
    one, two = trained(tmp_path, 1), trained(tmp_path, 2)
    for folder in (one, two):
        found.install(files_of(folder), "", [])
    assert found.rollback(first, "").version == first
    assert found.rollback(version_of(two), "").version == version_of(two)  # forward again, by name
    assert found.rollback(None, "").version == first
    unknown = trained(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"was never current here; known are .*; see `dmoa router history`"):
        found.rollback(version_of(unknown), "")
    (root / "versions" / version_of(one) / "gate.json").unlink()
    with pytest.raises(CheckpointError, match="is no longer kept; install its checkpoint again"):
        found.rollback(version_of(one), "")
    assert found.version == first


LETTERS = "abcd"


@given(st.lists(st.one_of(st.sampled_from(LETTERS), st.none()), max_size=30))
@settings(max_examples=examples(200))
def test_the_line_of_versions_is_a_stack(moves: list[str | None]) -> None:
    """Installs push, rollbacks without a version pop: against a plain list."""
    history = [HistoryEntry(version="start", action="configured", previous=None, note="", unix_s=0.0)]
    stack = ["start"]
    for move in moves:
        if move is None and len(stack) < 2:
            continue
        if move is None:
            assert _line(history)[-2] == stack[-2]
            stack.pop()
            # Where the version below appears higher up as well, a rollback by name reaches the higher one.
            history.append(HistoryEntry(version=stack[-1], action="rollback", previous=None, note="", unix_s=0.0))
        elif move != stack[-1]:
            stack.append(move)
            history.append(HistoryEntry(version=move, action="install", previous=None, note="", unix_s=0.0))
        assert _line(history) == stack


def test_another_configured_checkpoint_takes_the_place_of_what_was_installed(root: Path, tmp_path: Path) -> None:
    one, two, three = (trained(tmp_path, seed) for seed in (1, 2, 3))
    deployed = pool({"checkpoint": str(one)})
    found = opened(root, deployed, version_of(one))
    found.install(files_of(two), "", [])
    assert opened(root, deployed, version_of(one)).version == version_of(two)  # the same deployment again
    moved = trained(tmp_path / "elsewhere", 1)
    assert opened(root, pool({"checkpoint": str(moved)}), version_of(moved)).version == version_of(two)  # the same content
    again = opened(root, pool({"checkpoint": str(three)}), version_of(three))
    assert (again.version, again.configured) == (version_of(three), version_of(three))
    assert actions(again)[-1] == ("configured", version_of(three), version_of(two))
    assert again.rollback(None, "").version == version_of(two)  # what was there before can be had back


def test_a_checkpoint_trained_again_in_its_folder_is_another_one(root: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path, 1)
    deployed = pool({"checkpoint": str(folder)})
    found = opened(root, deployed, version_of(folder))
    found.install(files_of(trained(tmp_path, 2)), "", [])
    checkpoint.save(folder, *checkpoint.load(trained(tmp_path, 3)))
    assert opened(root, deployed, version_of(folder)).version == version_of(folder)


def test_another_pool_begins_anew(root: Path, tmp_path: Path, logged: Logged) -> None:
    found = opened(root)
    opened(root)
    assert logged.text == "", "the same pool again"
    found.install(files_of(trained(tmp_path, 1)), "", [])
    other = pool(name="other", agents=[{"name": name, "llm": "tiny", "profile": "Other."} for name in AGENTS])
    again = opened(root, other)
    assert actions(again) == [("configured", build_pool_gate(other)[1].version, None)]
    (line,) = logged.messages
    assert f"{root.as_uri()} held the gates of pool 'pool' ({fingerprint(pool())[:12]})" in line
    assert f"those of pool 'other' ({fingerprint(other)[:12]})" in line


def test_a_current_version_that_is_gone_is_missed(root: Path, tmp_path: Path) -> None:
    change = opened(root).install(files_of(trained(tmp_path, 1)), "", [])
    (root / "versions" / change.version / "gate.json").unlink()
    with pytest.raises(CheckpointError, match=rf"gate {change.version} was current, and its files are gone; put versions/"):
        opened(root)


LOSSES = {
    "the whole place": lambda root, version: shutil.rmtree(root),
    "an empty place": lambda root, version: (shutil.rmtree(root), root.mkdir()),
    "a cut state": lambda root, version: [(root / name).write_bytes(b'{"cur') for name in STATES],
    "a file in its way": lambda root, version: (shutil.rmtree(root), root.write_text("no folder")),
    "the version": lambda root, version: shutil.rmtree(root / "versions" / version),
    "half of the weights": lambda root, version: (root / "versions" / version / FILES[0]).write_bytes(b"x"),
}
STATES = ("state.json", "state.json.last")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_router_that_comes_back_takes_from_memory_what_its_place_lost(root: Path, tmp_path: Path, loss: str) -> None:
    memory: dict[str, bytes] = {}
    found = GateVersions(RouterState(root.as_uri(), memory), pool(), None)
    change = found.install(files_of(trained(tmp_path, 1)), "mine", [])
    LOSSES[loss](root, change.version)
    state = RouterState(root.as_uri(), memory, is_patient=True)
    again = GateVersions(state, pool(), None)
    assert (again.version, again.history()) == (change.version, found.history())
    assert all(torch.equal(found.gate.state_dict()[name], tensor) for name, tensor in again.gate.state_dict().items())
    assert state.lost is not None
    if root.is_file():  # what was not written back is, once it can be
        state.heal()
        assert state.lost is not None
        root.unlink()
    state.heal()
    assert state.lost is None
    assert opened(root).history() == found.history()  # without the memory, from the place alone


def test_an_older_state_that_comes_back_is_not_taken_up(root: Path, tmp_path: Path) -> None:
    """The place is unmounted, a gate installed meanwhile, then it is there again with what it held before."""
    memory: dict[str, bytes] = {}
    found = GateVersions(RouterState(root.as_uri(), memory), pool(), None)
    old = shutil.copytree(root, tmp_path / "old")
    change = found.install(files_of(trained(tmp_path, 1)), "", [])
    shutil.rmtree(root)
    old.rename(root)
    state = RouterState(root.as_uri(), memory)
    assert GateVersions(state, pool(), None).version == change.version
    assert "it is older than it was" in str(state.lost)


def test_a_new_deployment_remembers_nothing(root: Path, tmp_path: Path) -> None:
    found = opened(root)
    first = found.version
    found.install(files_of(trained(tmp_path, 1)), "", [])
    shutil.rmtree(root)
    assert opened(root).version == first


def test_a_restart_does_not_need_the_configured_checkpoint(root: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path, 1)
    version = version_of(folder)
    deployed = pool({"checkpoint": str(folder)})
    opened(root, deployed, version)
    for path in folder.iterdir():
        path.unlink()
    assert opened(root, deployed, version).version == version  # on another node, say


def test_a_gate_with_the_profile_head_is_taken_over_from_another_pool(root: Path) -> None:
    other = pool({"head": "profile"}, agents=[{"name": "writer", "llm": "tiny", "profile": "Writes."}])
    gate, _ = build_pool_gate(other)
    record = describe_gate(gate, fingerprint=fingerprint(other), trained_on={"rows": 1})
    folder = checkpoint.save(root.parent / "profile", gate, record)
    found = opened(root, pool({"head": "profile"}))
    change = found.install(files_of(folder), "", [])
    assert change.gate.spec.agents == AGENTS
    assert change.version != record.version
    assert opened(root, pool({"head": "profile"})).version == change.version


def test_history_and_versions_stay_bounded(root: Path, tmp_path: Path) -> None:
    found = opened(root, max_history=3)
    folders = [trained(tmp_path, seed) for seed in range(1, 6)]
    for folder in folders:
        found.install(files_of(folder), "n" * 10_000, [])
    kept = [version_of(folder) for folder in folders[-3:]]
    assert [entry["version"] for entry in found.history()] == kept
    assert sorted(path.name for path in (root / "versions").iterdir()) == sorted(kept)
    assert {len(entry["note"]) for entry in found.history()} == {MAX_NOTE_CHARACTERS}
    assert opened(root).configured == build_pool_gate(pool())[1].version  # longer remembered than its entry


@pytest.mark.parametrize("history", ['"x"', '[{"version": 1}]', '[{"who": "me"}]'])
def test_a_damaged_history_is_refused(root: Path, history: str) -> None:
    found = opened(root)
    state = RouterState(root.as_uri()).load()
    assert state is not None
    for name in ("state.json", "state.json.last"):
        (root / name).write_text(json.dumps(state | {"history": json.loads(history)}))
    with pytest.raises(CheckpointError, match=r"router state: history.*; remove its folder to begin anew"):
        opened(root)
    assert found.version


def test_a_state_that_cannot_be_written_changes_nothing(root: Path, tmp_path: Path) -> None:
    found = opened(root)
    first, history = found.version, found.history()
    (root / "state.json").unlink()
    (root / "state.json" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"state\.json"):
        found.install(files_of(trained(tmp_path, 1)), "", [])
    assert (found.version, found.history()) == (first, history)
    assert not [path for path in root.rglob("*") if path.name.endswith(".draft")]


def test_a_copy_that_cannot_be_written_does_not_part_what_is_said_from_what_is_kept(root: Path, tmp_path: Path) -> None:
    state = RouterState(root.as_uri())
    found = GateVersions(state, pool(), None)
    (root / "state.json.last").unlink()
    (root / "state.json.last" / "in the way").mkdir(parents=True)
    changed = found.install(files_of(trained(tmp_path, 1)), "", [])
    assert found.version == changed.version == opened(root).version
    assert "state.json.last" in str(state.lost)
    shutil.rmtree(root / "state.json.last")
    state.heal()
    assert (state.lost, json.loads((root / "state.json.last").read_text())["current"]) == (None, changed.version)


class _Cluster:
    """A cluster's key-value store."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}

    def internal_kv_get(self, key: bytes, namespace: bytes | None) -> bytes | None:
        return self.kept.get(key)

    def internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes | None) -> int:
        self.kept[key] = value
        return 1

    def internal_kv_del(self, prefix: bytes, by_prefix: bool, namespace: bytes | None) -> int:
        return len([self.kept.pop(key) for key in list(self.kept) if key.startswith(prefix)])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a router actor asks of its cluster, without one."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(was_current_actor_reconstructed=False))
    monkeypatch.setattr(internal_kv, "global_gcs_client", _Cluster())
    monkeypatch.setattr(serve, "get_deployment_handle", lambda name, app: SimpleNamespace(options=lambda **_: name))


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("is_same_pool", [True, False])
async def test_a_deploy_with_another_place_serves_the_gate_that_was_installed(tmp_path: Path, is_same_pool: bool) -> None:
    """Of the same pool: another pool's gates stay where they are."""
    here, there = (pool(router={"state_uri": (tmp_path / name).as_uri()}) for name in ("here", "there"))
    if not is_same_pool:
        singers = [{"name": name, "llm": "tiny", "profile": "Sing."} for name in AGENTS]
        there = pool(router=there.router.model_dump(), agents=singers)
    actor = RouterActor(here.model_dump_json(), "app", watch_interval_s=60.0)
    await actor.install(files_of(trained(tmp_path, 1)))
    current = await actor.configure(there.model_dump_json())
    assert (current == version_of(tmp_path / "checkpoint-1"), len(await actor.history())) == (is_same_pool, 1 + is_same_pool)


@pytest.mark.usefixtures("cluster")
async def test_an_agent_stays_masked_for_as_long_as_the_longest_report_says(tmp_path: Path) -> None:
    llms = {"tiny": {"model": "scripted:x", "engine": "scripted", "placement": "ingress"}}
    config = pool(llms=llms, router={"state_uri": tmp_path.as_uri(), "probe_interval_s": 0.1})
    actor = RouterActor(config.model_dump_json(), "app", watch_interval_s=60.0)
    began, reports = asyncio.get_running_loop().time(), ((0.0, 0.05), (0.0, 1.0), (0.5, 0.05))
    for masked_s, other_s in reports:
        await actor.report_unavailable("adder", "its last replies came too late", masked_s)
        await actor.report_unavailable("sorter", "its last replies came too late", other_s)
    async with asyncio.timeout(5):
        while (await actor.status()).masked:
            left = (await actor.status()).masked
            await asyncio.sleep(0.02)
    assert left == ("sorter",)
    assert asyncio.get_running_loop().time() - began >= 1.0


@pytest.mark.usefixtures("cluster")
async def test_an_ingress_of_the_pool_before_is_not_told_of_the_new_ones_gate(tmp_path: Path) -> None:
    config, other = (pool({"seed": seed}, router={"state_uri": tmp_path.as_uri(), "decide": "ingress"}) for seed in (1, 2))
    actor = RouterActor(config.model_dump_json(), "app", watch_interval_s=60.0)
    seen = unpack_record(await actor.look(pack_record((None, Decided())), pool_version(config)))
    waiting = asyncio.create_task(actor.look(pack_record((seen, Decided())), pool_version(config)))
    await asyncio.sleep(0)
    await actor.configure(other.model_dump_json())
    with pytest.raises(PoolChangedError):
        await waiting


@pytest.mark.usefixtures("cluster")
async def test_an_agent_of_the_ingress_that_was_late_takes_part_again(tmp_path: Path) -> None:
    llms = {"tiny": {"model": "scripted:x", "engine": "scripted", "placement": "ingress"}}
    config = pool(llms=llms, router={"state_uri": tmp_path.as_uri(), "probe_interval_s": 0.1})
    actor = RouterActor(config.model_dump_json(), "app", watch_interval_s=60.0)
    for _ in range(2):
        await actor.report_unavailable("adder", "its last replies came too late", 0.05)
        assert (await actor.status()).masked == ("adder",)
        async with asyncio.timeout(5):
            while (await actor.status()).masked:  # noqa: ASYNC110 another task of the actor changes it
                await asyncio.sleep(0.02)
