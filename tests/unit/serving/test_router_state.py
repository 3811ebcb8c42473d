"""What the router keeps beyond its own life, on a file system in a temporary folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dmoa.checkpoint import Checkpoint, describe_gate
from dmoa.core.gate import Gate, init_gate
from dmoa.errors import CheckpointError, ConfigError
from dmoa.serving.actors import default_state_uri
from dmoa.serving.router.state import RouterState
from dmoa.testing import gate_spec


def made(seed: int = 0) -> tuple[Gate, Checkpoint]:
    gate = init_gate(gate_spec(("a", "b")), seed=seed)
    return gate, describe_gate(gate, fingerprint="f" * 64, trained_on={"rows": seed})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "router" / "state"


@pytest.fixture
def state(root: Path) -> RouterState:
    return RouterState(root.as_uri())


def test_versions_come_back_bit_for_bit(state: RouterState, root: Path) -> None:
    kept = [made(seed) for seed in range(3)]
    for gate, record in kept:
        state.save_version(gate, record)
    reopened = RouterState(root.as_uri() + "/")
    for gate, record in kept:
        found = reopened.load_version(record.version)
        assert found is not None
        assert found[1] == record
        assert all((found[0].state_dict()[name] == tensor).all() for name, tensor in gate.state_dict().items())
    assert sorted(path.name for path in (root / "versions").iterdir()) == sorted(record.version for _, record in kept)


def test_what_was_never_kept_is_absent(state: RouterState) -> None:
    assert state.load() is None
    assert state.load_version("0" * 16) is None


def test_a_version_is_written_once_and_without_drafts(state: RouterState, root: Path) -> None:
    gate, record = made()
    state.save_version(gate, record)
    folder = root / "versions" / record.version
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(stamps) == ["gate.json", "gate.safetensors"]
    state.save_version(gate, record)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps


def test_a_version_of_which_only_half_was_written_is_absent_and_can_be_written_again(state: RouterState, root: Path) -> None:
    gate, record = made()
    state.save_version(gate, record)
    (root / "versions" / record.version / "gate.json").unlink()  # it is written last
    assert state.load_version(record.version) is None
    state.save_version(gate, record)
    assert state.load_version(record.version) is not None


def test_the_record_is_written_after_the_weights(state: RouterState, root: Path) -> None:
    gate, record = made()
    folder = root / "versions" / record.version
    (folder / "gate.json" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"gate\.json"):
        state.save_version(gate, record)
    assert (folder / "gate.safetensors").is_file()
    assert state.load_version(record.version) is None


def test_the_files_of_a_version_are_those_of_a_checkpoint(state: RouterState, root: Path) -> None:
    gate, record = made()
    state.save_version(gate, record)
    files = state.read_version(record.version)
    folder = root / "versions" / record.version
    assert files == {name: (folder / name).read_bytes() for name in ("gate.safetensors", "gate.json")}
    with pytest.raises(FileNotFoundError):
        state.read_version("0" * 16)


def test_a_damaged_version_is_refused(state: RouterState, root: Path) -> None:
    gate, record = made()
    state.save_version(gate, record)
    weights = root / "versions" / record.version / "gate.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="is damaged; remove it to begin anew") as caught:
        state.load_version(record.version)
    assert f"router state '{root}/versions/{record.version}'" in str(caught.value)


def test_the_state_comes_back_as_it_was_last_kept(state: RouterState, root: Path) -> None:
    state.save({"current": "v1"})
    state.save({"current": "v2", "history": ["v1"], "installed_unix_s": 1.5})
    assert RouterState(root.as_uri()).load() == {"current": "v2", "history": ["v1"], "installed_unix_s": 1.5}
    assert sorted(path.name for path in root.iterdir()) == ["state.json", "state.json.last"]


DAMAGED = [b"", b'{"current": ', b"[1]", b"null", b"\xff\xff", b'{"serial": []}', b"[" * 100_000]


@pytest.mark.parametrize("data", DAMAGED, ids=[repr(one[:14]) for one in DAMAGED])
def test_of_a_damaged_state_the_one_beside_it_is_taken_and_without_that_it_is_refused(
    state: RouterState, root: Path, data: bytes
) -> None:
    state.save({"current": "v1"})
    (root / "state.json").write_bytes(data)
    reopened = RouterState(root.as_uri())
    assert reopened.load() == {"current": "v1"}
    assert "state.json" in str(reopened.lost)
    assert (root / "state.json").read_bytes() == (root / "state.json.last").read_bytes()  # written back
    for name in ("state.json", "state.json.last"):
        (root / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"state\.json.*; remove its folder to begin anew"):
        RouterState(root.as_uri()).load()


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_bytes(b"[" * 100_000), "recursion"),
        (lambda path: path.write_text('{"serial": Infinity}'), "Infinity is not JSON; expected a finite number"),
        (lambda path: path.write_text('{"source": [1e999]}'), "1e999 is not JSON; expected a finite number"),
        (lambda path: path.write_text('{"serial": "x"}'), "invalid literal"),
        (lambda path: path.write_bytes(b"x") and os.truncate(path, 8 << 30), "no file of at most"),
        (os.mkfifo, "no file of at most"),
        (_endless, "no file of at most"),
    ],
)
def test_a_state_that_is_no_state_is_refused_by_its_name(
    state: RouterState, root: Path, damage: Callable[[Path], object], told: str
) -> None:
    root.mkdir(parents=True)
    damage(root / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json") as caught:
        state.load()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["../../secrets", "/etc", "", "a\0b", "\ud800", 5, ["x"], "x" * 5000])
def test_a_version_that_is_no_name_is_refused_before_a_file_is_opened(state: RouterState, version: str) -> None:
    with pytest.raises(CheckpointError, match=r"a version is .*; expected letters") as caught:
        state.load_version(version)
    assert len(str(caught.value)) < 1000


def test_a_version_that_holds_another_is_refused(state: RouterState, root: Path) -> None:
    for seed in range(2):
        state.save_version(*made(seed))
    first, second = (root / "versions" / made(seed)[1].version for seed in range(2))
    first.rename(root / "versions" / "aside")
    second.rename(first)
    with pytest.raises(CheckpointError, match=f"version in gate.json is '{second.name}'"):
        state.load_version(first.name)


def test_weights_that_are_a_pipe_are_not_waited_for(state: RouterState, root: Path) -> None:
    gate, record = made()
    state.save_version(gate, record)
    weights = root / "versions" / record.version / "gate.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(OSError, match=r"gate\.safetensors"):
        state.load_version(record.version)


def test_a_state_is_counted_upwards_over_restarts(root: Path) -> None:
    for serial in range(1, 4):
        state = RouterState(root.as_uri())
        state.load()
        state.save({"current": "v"})
        assert json.loads((root / "state.json").read_text())["serial"] == serial


def test_drafts_of_writers_that_died_are_swept_away(state: RouterState, root: Path) -> None:
    gate, record = made()
    state.save_version(gate, record)
    state.save({"current": record.version})
    kept = sorted(path for path in root.rglob("*") if path.is_file())
    feedback = root / "feedback" / ".feedback.json.0a1b2c3d.draft"  # another writer's, who may be at work
    for draft in (
        root / ".state.json.0a1b2c3d.draft",
        root / "versions" / record.version / ".gate.json.00000000.draft",
        feedback,
    ):
        draft.parent.mkdir(exist_ok=True)
        draft.write_bytes(b"half")
    state.sweep()
    assert sorted(path for path in root.rglob("*") if path.is_file()) == sorted([*kept, feedback])


def test_what_lies_behind_a_link_and_what_the_router_did_not_write_stays(state: RouterState, root: Path, tmp_path: Path) -> None:
    state.save_version(*made())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    draft = elsewhere / ".gate.json.0a1b2c3d.draft"
    notes = root / ".notes.draft"
    for path in (draft, notes):
        path.write_bytes(b"mine")
    (root / "versions" / "linked").symlink_to(elsewhere)
    state.sweep()
    assert (draft.exists(), notes.exists()) == (True, True)
    state.keep_versions(())
    assert [path.name for path in (root / "versions").iterdir()] == ["linked"]
    assert draft.exists()
    (root / "versions").rename(tmp_path / "versions")
    (root / "versions").symlink_to(tmp_path / "versions")
    hers = tmp_path / "versions" / ".gate.json.0a1b2c3d.draft"
    hers.write_bytes(b"hers")
    state.sweep()
    assert hers.exists()


@pytest.mark.parametrize("uri", ["", "relative/folder", "ftp://host/dir", "file://host/dir", "nonsense:"])
def test_a_place_that_no_file_system_serves_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RouterState(uri)
    assert f"router.state_uri is {uri!r}; expected file:///DIR, s3://..., gs://..." in str(caught.value)


def test_the_default_place_is_a_folder_of_this_user_per_app() -> None:
    one, other = default_state_uri("one"), default_state_uri("other")
    assert one.startswith("file:///")
    assert one.endswith("/router/one")
    assert one != other
