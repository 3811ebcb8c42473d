"""Checkpoints: written whole, read back bit for bit, refused when damaged, mixed or made for another pool."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmoa.agents.pool import default_config_path
from dmoa.checkpoint import SCHEMA_VERSION, Checkpoint, check_pool, describe_gate, load, save
from dmoa.core.gate import Gate, init_gate, weights_version
from dmoa.errors import CheckpointError
from dmoa.testing import DIM, gate_spec
from dmoa.workflows.console import Common
from tests.unit.core.test_label_model import by_hand

AGENTS = ("adder", "sorter", "dater")
FINGERPRINT = "f" * 64


def gate_of(seed: int = 0, **changes: Any) -> Gate:
    return init_gate(gate_spec(AGENTS, temperature=0.1, theta=-1.5, **changes), seed=seed)


def profile_gate() -> Gate:
    profile_AD = torch.from_numpy(np.random.default_rng(0).standard_normal((3, DIM)).astype(np.float32))
    return init_gate(gate_spec(AGENTS, head="profile"), seed=0, profile_AD=profile_AD)


def saved(folder: Path, gate: Gate | None = None) -> Path:
    gate = gate or gate_of()
    return save(folder, gate, describe_gate(gate, fingerprint=FINGERPRINT, trained_on={"rows": 40}))


def edit(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / "gate.json").read_text())
    (folder / "gate.json").write_text(json.dumps(tree | changes))


@pytest.mark.parametrize("gate", [gate_of(), gate_of(preset="paper"), profile_gate()], ids=["default", "paper", "profile"])
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path, gate: Gate) -> None:
    record = describe_gate(
        gate, fingerprint=FINGERPRINT, trained_on={"rows": 40}, parent="p", metrics={"loss": 0.25}, code_revision="abc"
    )
    folder = save(tmp_path / "deep" / "gate", gate, record)
    assert folder == tmp_path / "deep" / "gate"
    loaded, loaded_record = load(folder)
    assert loaded_record == record
    assert loaded.spec == gate.spec
    before, after = gate.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    assert weights_version(loaded) == record.version


def test_the_record_says_what_the_contract_asks_for(tmp_path: Path) -> None:
    tree = json.loads((saved(tmp_path / "gate") / "gate.json").read_text())
    assert tree["schema_version"] == SCHEMA_VERSION == 1
    assert tree["sizes"] == {"hidden": 3, "embedding_dim": DIM, "input_dim": 2 * DIM + 4, "agents": 3}
    assert tree["activation"] == {"rule": "top_mass", "mass": 0.8, "max_agents": 4, "cascade": False, "theta": -1.5}
    assert (tree["preset"], tree["head"], tree["temperature"], tree["score"]) == ("default", "linear", 0.1, "raw")
    assert (tree["agents"], tree["pool_fingerprint"], tree["trained_on"]) == (list(AGENTS), FINGERPRINT, {"rows": 40})
    names = {"version", "parent", "anchor_set", "encoder", "metrics", "code_revision"}
    assert names <= set(tree)


def anchored(folder: Path, means: tuple[float, ...] = (0.25, -1.5, 1e-17)) -> Path:
    gate = gate_of(core="reset", score="anchored", anchors=(0.25, -1.5, 1e-17))
    anchor_set = {"means": means, "rows": 60, "clusters": 3}
    return save(folder, gate, describe_gate(gate, fingerprint=FINGERPRINT, trained_on={"rows": 40}, anchor_set=anchor_set))


def test_core_anchors_and_their_sample_are_kept(tmp_path: Path) -> None:
    gate, record = load(anchored(tmp_path / "gate"))
    assert (gate.spec.core, gate.spec.anchors) == ("reset", (0.25, -1.5, 1e-17))
    assert record.anchor_set is not None
    assert (record.anchor_set.means, record.anchor_set.rows, record.anchor_set.clusters) == (gate.spec.anchors, 60, 3)
    tree = json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert tree["anchor_set"] == {"means": [0.25, -1.5, 1e-17], "rows": 60, "clusters": 3, "constant": []}


def test_a_checkpoint_without_the_newer_keys_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "gate")
    assert set(json.loads((folder / "gate.json").read_text())["spec"]) & {"core", "anchors"} == set()
    assert (load(folder)[0].spec.core, load(folder)[0].spec.anchors) == ("gru", None)


def test_anchors_must_be_those_of_their_sample(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"anchor_set\.means in gate\.json is \(0\.25, -1\.5, 0\.5\), the spec says"):
        load(anchored(tmp_path / "gate", means=(0.25, -1.5, 0.5)))


def test_the_version_names_the_content() -> None:
    gate = gate_of()
    version = describe_gate(gate, fingerprint="", trained_on={"rows": 1}).version
    assert version == describe_gate(gate_of(), fingerprint="other", trained_on={"rows": 2}).version
    assert describe_gate(gate, fingerprint="").version == f"untrained-{version}"
    assert describe_gate(gate_of(mass=0.7), fingerprint="", trained_on={"rows": 1}).version != version
    for name, tensor in gate.state_dict().items():
        other = gate_of()
        with torch.no_grad():
            flat = other.state_dict()[name].view(-1)
            flat[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(torch.inf))
        assert describe_gate(other, fingerprint="", trained_on={"rows": 1}).version != version, name


def test_saving_again_replaces_and_leaves_no_drafts(tmp_path: Path) -> None:
    first = saved(tmp_path / "gate")
    (first / "stale.txt").write_text("left over")
    version = load(first)[1].version
    saved(tmp_path / "gate", gate_of(seed=1))
    assert load(first)[1].version != version
    assert [path.name for path in tmp_path.iterdir()] == ["gate"]
    assert sorted(path.name for path in first.iterdir()) == ["gate.json", "gate.safetensors"]


def test_a_failed_save_keeps_the_old_one_and_leaves_no_drafts(tmp_path: Path) -> None:
    folder = saved(tmp_path / "gate")
    gate = gate_of(seed=1)
    record = describe_gate(gate, fingerprint=FINGERPRINT, trained_on={"rows": object()})  # nothing that JSON can hold
    with pytest.raises(ValueError, match="serialize"):
        save(folder, gate, record)
    assert [path.name for path in tmp_path.iterdir()] == ["gate"]
    assert load(folder)[1].trained_on == {"rows": 40}


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def flip_last_bit(folder: Path) -> None:
    data = bytearray((folder / "gate.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "gate.safetensors").write_bytes(bytes(data))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(str(folder / "gate.safetensors"))
    del tensors["head_bias"]
    save_file(tensors, str(folder / "gate.safetensors"))


def reshape_tensor(folder: Path) -> None:
    tensors = load_file(str(folder / "gate.safetensors"))
    tensors["head_bias"] = torch.zeros(7)
    save_file(tensors, str(folder / "gate.safetensors"))


def cast(name: str, kind: torch.dtype) -> Callable[[Path], None]:
    """Put a tensor of another type in a weight's place, or beside the weights."""

    def damage(folder: Path) -> None:
        tensors = load_file(str(folder / "gate.safetensors"))
        tensors[name] = tensors.get(name, torch.zeros(9)).to(kind)
        save_file(tensors, str(folder / "gate.safetensors"))

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def change(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


def change_spec(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, spec=json.loads((folder / "gate.json").read_text())["spec"] | changes)


def header(data: bytes, length: int | None = None) -> Callable[[Path], None]:
    """Put a header of ours into the weights, which claims to have a length."""
    whole = (len(data) if length is None else length).to_bytes(8, "little") + data
    return lambda folder: (folder / "gate.safetensors").write_bytes(whole) and None


def endless(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return damage


def sparse(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def not_a_number(folder: Path) -> None:
    """Weights whose version is right."""
    gate, record = load(folder)
    with torch.no_grad():
        gate.head_bias[0] = float("nan")
    save(folder, gate, describe_gate(gate, fingerprint=record.pool_fingerprint, trained_on={"seed": 0}))


def supervised_by(words: str) -> Callable[[Path], None]:
    """Weights whose version is right, and begins with a supervision's name: it names the folder that a router keeps them in."""

    def damage(folder: Path) -> None:
        gate, record = load(folder)
        version = f"{words}-{weights_version(gate)}"
        edit(folder, version=version, supervision=words, trained_on={"supervision": words})
        assert record.version != version

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (drop("gate.safetensors"), "gate.safetensors"),
    "no record": (drop("gate.json"), "gate.json"),
    "weights cut short": (cut("gate.safetensors", 0.5), "a checkpoint is a folder with"),
    "weights empty": (cut("gate.safetensors", 0.0), "a checkpoint is a folder with"),
    "record cut short": (cut("gate.json", 0.5), "a checkpoint is a folder with"),
    "record no JSON object": (write("gate.json", "[1]"), "gate.json"),
    "record too deep": (write("gate.json", "[" * 100_000), "a checkpoint is a folder with"),
    "weights that are NaN": (not_a_number, "gate.safetensors: head_bias holds NaN or infinity"),
    "a version that leads out of its folder": (supervised_by("../../../elsewhere"), "supervision is '../../../elsewhere'"),
    "a version in a folder of its own": (supervised_by("a/b"), "supervision is 'a/b'"),
    "a version without a name": (supervised_by(""), "supervision is ''"),
    "weights of bytes": (cast("head_bias", torch.int8), "head_bias holds torch.int8; expected finite numbers of torch.float32"),
    "bytes that are no weights": (cast("more", torch.uint8), "more holds torch.uint8; expected finite numbers of torch.float32"),
    "a header of 1 GB": (header(b"{}", 1 << 30), "gate.safetensors: its header claims 1073741824 bytes"),
    "a header of a million tensors": (
        header(b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(40_000)) + b"}"),
        "gate.safetensors: its header claims",
    ),
    "a record without end": (endless("gate.json"), "gate.json' is no regular file"),
    "weights without end": (endless("gate.safetensors"), "gate.safetensors' is no regular file"),
    "a record of 8 GB": (sparse("gate.json", 8 << 30), "gate.json: it is larger than 4 MiB"),
    "theta that no float holds": (change_spec(theta=10**400), "theta is 1000"),
    "anchors that no float holds": (change_spec(anchors=[10**400] * 3), "anchors is [1000"),
    "one bit of a weight": (flip_last_bit, "version in gate.json is"),
    "a tensor missing": (drop_tensor, "head_bias"),
    "a tensor of another shape": (reshape_tensor, "head_bias"),
    "another version": (change(version="0" * 16), "version in gate.json is '0000000000000000', weights and spec say"),
    "another mass than its spec": (change(activation={"mass": 0.1}), "activation in gate.json is {'mass': 0.1}"),
    "other agents than its spec": (change(agents=["x", "y", "z"]), "agents in gate.json is ['x', 'y', 'z']"),
    "another theta in the spec": (change_spec(theta=0.0), "version in gate.json"),
    "anchors that its version does not know": (change_spec(anchors=[0.0, 0.0, 0.0]), "version in gate.json"),
    "another core": (change_spec(core="linear"), "weight_ih"),
    "an anchor set with an unknown key": (
        change(anchor_set={"means": [0.0], "rows": 1, "clusters": 1, "mode": 1}),
        "anchor_set.mode: unknown key (value 1); expected one of means, rows, clusters, constant; remove it",
    ),
    "a spec of another size": (change_spec(hidden=4), "weight_ih"),
    "a spec too big for any memory": (change_spec(embedding_dim=10**15), "embedding_dim is 1000000000000000; expected"),
    "a profile head without profiles": (change_spec(head="profile"), "profile"),
    "an unknown key in the spec": (change_spec(colour=1), "unknown keys ['colour']"),
    "an unknown key": (change(colour=1), "colour: unknown key (value 1); expected one of schema_version, version"),
    "a wrong type": (change(temperature="hot"), "temperature is 'hot'"),
    "a newer schema": (change(schema_version=2, colour=1), "schema_version is 2, this dmoa reads 1; use the dmoa that wrote it"),
    "a schema that is no number": (change(schema_version=None), "schema_version is None, this dmoa reads 1"),
}


def judged(**changes: Any) -> Gate:
    """A gate with a label model, in which arrays are another."""
    gate = gate_of()
    gate.label_model = replace(by_hand([0.8, 0.6, 0.7]), **changes)
    return gate


ARRAYS = sorted(by_hand([0.8, 0.6, 0.7]).arrays())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ARRAYS)
def test_a_label_model_that_is_not_finite_is_refused_by_its_array(tmp_path: Path, name: str, number: float) -> None:
    array = judged().label_model.arrays()[name]  # type: ignore[union-attr]
    array.flat[-1] = number
    folder = saved(tmp_path / "gate", judged(**{name: array}))  # its version is right
    with pytest.raises(CheckpointError, match=rf"gate\.safetensors: label_model\.{name} holds NaN or infinity"):
        load(folder)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_label_model_of_another_shape_is_refused_by_its_array(tmp_path: Path, name: str) -> None:
    array = judged().label_model.arrays()[name]  # type: ignore[union-attr]
    folder = saved(tmp_path / "gate", judged(**{name: array[..., None]}))
    with pytest.raises(CheckpointError, match=rf"label model: {name} has the shape \[.*1\]; expected \[[ACD, ]+\]"):
        load(folder)
    if name != "centre_CD":
        folder = saved(tmp_path / "gate", judged(**{name: np.concatenate([array, array])}))
        with pytest.raises(CheckpointError, match=r"label model: \w+ has the shape .*; expected"):
            load(folder)


def test_a_label_model_of_other_agents_is_refused(tmp_path: Path) -> None:
    gate = gate_of()
    gate.label_model = by_hand([0.8, 0.6])
    with pytest.raises(CheckpointError, match="label model: of 2 agents; expected 3"):
        load(saved(tmp_path / "gate", gate))
    assert load(saved(tmp_path / "good", judged()))[0].label_model is not None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 400, '"x"'])
def test_numbers_of_a_label_model_that_are_none_are_refused(tmp_path: Path, number: str) -> None:
    folder = saved(tmp_path / "gate", judged())
    text = (folder / "gate.json").read_text()
    (folder / "gate.json").write_text(re.sub(r'"noise": [\d.]+', f'"noise": {number}', text))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = saved(tmp_path / "gate")
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a checkpoint is a folder with gate\.safetensors and gate\.json"):
        load(tmp_path / "nothing")


def record_of(head: str = "linear") -> Checkpoint:
    return describe_gate(profile_gate() if head == "profile" else gate_of(), fingerprint=FINGERPRINT, trained_on={"rows": 1})


def test_a_checkpoint_elsewhere_is_refused_with_what_to_do() -> None:
    named = Common(config=default_config_path()).load(Path("s3://bucket/gate")).gate.checkpoint
    assert named == "s3://bucket/gate"
    with pytest.raises(CheckpointError, match=r"'s3://bucket/gate': expected a folder of this machine; .*`dmoa router install"):
        load(named)


def test_the_pool_that_a_checkpoint_was_made_for_may_use_it() -> None:
    check_pool(record_of(), fingerprint=FINGERPRINT, agents=AGENTS, preset="default")


def test_another_pool_is_told_which_agents_differ() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_pool(record_of(), fingerprint="0" * 64, agents=("adder", "writer", "dater"), preset="default")
    message = str(caught.value)
    assert "only in the checkpoint: sorter; only in the pool: writer" in message
    assert "made for pool ffffffffffff, this pool is 000000000000" in message
    assert "serve the pool it was trained for, or train a gate for this one" in message
    with pytest.raises(CheckpointError, match="same names, but a model, adapter, profile, tool or sampling setting differs"):
        check_pool(record_of(), fingerprint="0" * 64, agents=AGENTS, preset="default")
    with pytest.raises(CheckpointError, match="the same agents in another order"):
        check_pool(record_of(), fingerprint="0" * 64, agents=AGENTS[::-1], preset="default")


def test_a_profile_gate_may_serve_any_pool() -> None:
    check_pool(record_of("profile"), fingerprint="0" * 64, agents=("writer",), preset="default")


def test_a_gate_of_another_preset_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"its preset is .default., the pool.s gate\.preset is .paper.; set"):
        check_pool(record_of("profile"), fingerprint=FINGERPRINT, agents=AGENTS, preset="paper")
