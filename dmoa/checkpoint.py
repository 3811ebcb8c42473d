"""The dmoa checkpoint: `gate.safetensors` (weights) and `gate.json` (everything else), in one folder.

Written whole, then renamed; loaded without pickle; checked against its own content hash and the pool's fingerprint.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from dmoa.core.gate import Gate, GateSpec, weights_version
from dmoa.core.label_model import LabelModel
from dmoa.engine_options import Node
from dmoa.errors import CheckpointError
from dmoa.reading import MAX_BYTES as MAX_RECORD_BYTES
from dmoa.reading import check_bytes, read_bounded, read_json
from dmoa.storage import uri_of
from dmoa.types import UNTRAINED
from dmoa.validation import describe, short

SCHEMA_VERSION = 1
FILES = ("gate.safetensors", "gate.json")
"""Of a checkpoint, in the order in which they are written."""
_WHAT = "a checkpoint is a folder with gate.safetensors and gate.json"
MAX_BYTES = 1 << 29
"""Of the weights: of a thousand agents and the widest state they take half of it."""
_MAX_HEADER_BYTES = 1 << 20
_JUDGE = "label_model."
"""Ahead of the names of the label model's arrays."""


class AnchorSet(Node):
    """The frozen sample of dense rows behind a gate's anchors."""

    means: tuple[float, ...]
    """Per agent, the mean raw score over the sample, every cluster weighing the same: what the anchored score subtracts.
    20 less for an agent of `constant`."""
    rows: int = Field(ge=0)
    """0: the means are those of the parent, whose training held dense rows."""
    clusters: int = Field(ge=1)
    """Clusters of embeddings that the rows were balanced over."""
    constant: tuple[str, ...] = ()
    """Agents that gave one reply to nearly all rows, and count as less sure than everybody else."""


class Checkpoint(BaseModel):
    """`gate.json`: what the weights beside it are, and where they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: int = SCHEMA_VERSION
    version: str
    """Content hash of sizes and weights, with the prefix `untrained-` for weights that no training has touched."""
    parent: str | None = None
    preset: str
    head: str
    sizes: dict[str, int]
    """hidden, embedding_dim, input_dim, agents."""
    temperature: float
    activation: dict[str, Any]
    """rule, mass (tau), max_agents, cascade, theta."""
    score: str
    anchor_set: AnchorSet | None = None
    encoder: str = "all-MiniLM-L6-v2"
    agents: list[str]
    pool_fingerprint: str
    trained_on: dict[str, Any] | None = None
    """Rollouts behind the weights; null: untrained."""
    supervision: str = Field(default="none", pattern=r"^(none|outcomes\([0-9]{1,18}\))$")
    """What the training was told of how good replies are: none, or outcomes(N), with so many outcomes of the user's; part of the
    version, which names a folder."""
    label_model: dict[str, Any] | None = None
    """With score posterior, what of the label model is no array; its arrays lie beside the weights."""
    metrics: dict[str, float] = Field(default_factory=dict)
    code_revision: str = ""
    spec: dict[str, Any]
    """The gate's specification as the code reads it back."""


def describe_gate(gate: Gate, *, fingerprint: str, trained_on: dict[str, Any] | None = None, **extra: Any) -> Checkpoint:
    """Return the record of a gate, its version included; `trained_on` says what supervision there was."""
    supervision = (trained_on or {}).get("supervision", "none")
    known = _fields(gate, is_trained=bool(trained_on), supervision=supervision)
    return Checkpoint(**known, pool_fingerprint=fingerprint, trained_on=trained_on, supervision=supervision, **extra)


def _fields(gate: Gate, *, is_trained: bool, supervision: str) -> dict[str, Any]:
    """Return the fields of a record that follow from the gate itself."""
    spec = gate.spec
    own, sizes, activation = (
        {name: getattr(spec, name) for name in names.split()}
        for names in ("preset head temperature score", "hidden embedding_dim input_dim", "rule mass max_agents cascade theta")
    )
    return own | {
        "version": _prefix(is_trained, supervision) + weights_version(gate),
        "sizes": sizes | {"agents": len(spec.agents)},
        "activation": activation,
        "label_model": None if gate.label_model is None else gate.label_model.numbers(),
        "agents": list(spec.agents),
        "spec": spec.to_json(),
    }


def _prefix(is_trained: bool, supervision: str) -> str:
    if not is_trained:
        return UNTRAINED
    return "" if supervision == "none" else f"{supervision.replace('(', '-').removesuffix(')')}-"


def artifact_name(version: str) -> str:
    """Return the name under which runs log the folder of a checkpoint: the one that made it, and those that begin with it."""
    return f"gate-{version}"


def files_of(gate: Gate, record: Checkpoint) -> dict[str, bytes]:
    """Return the files of a checkpoint by name."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in gate.state_dict().items()}
    if gate.label_model is not None:
        tensors |= {_JUDGE + name: torch.tensor(array) for name, array in gate.label_model.arrays().items()}
    return dict(zip(FILES, (serialize(tensors), record.model_dump_json(indent=2).encode() + b"\n"), strict=True))


def check_replaced(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds more than a checkpoint, all of which `save` replaces."""
    others = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise CheckpointError(f"{str(folder)!r} holds {shown}, and a checkpoint is to take its place; name another folder")


def save(folder: str | Path, gate: Gate, record: Checkpoint) -> Path:
    """Write a checkpoint folder whole, then rename it into place; an existing one is replaced. Returns the folder."""
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        for name, data in files_of(gate, record).items():
            (draft / name).write_bytes(data)  # which names a full disk; `save_file` does not
        if target.exists():
            old = target.parent / f".{target.name}.old.{secrets.token_hex(4)}"
            target.replace(old)
            draft.replace(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def load(folder: str | Path) -> tuple[Gate, Checkpoint]:
    """Read a checkpoint folder of this machine. Raises CheckpointError if a file is missing, and as `read_files`."""
    if uri := uri_of(folder):
        raise CheckpointError(
            f"checkpoint {uri!r}: expected a folder of this machine; copy that one here, or install it from there into a running "
            "swarm (`dmoa router install URI`)"
        )
    where, files = f"checkpoint {str(folder)!r}", {}
    for name, most in (("gate.json", MAX_RECORD_BYTES), ("gate.safetensors", MAX_BYTES)):
        try:
            files[name] = read_bounded(Path(folder) / name, most=most)
        except OSError as error:
            raise CheckpointError(f"{where}: {name}: {error}; {_WHAT}") from error
    return read_files(files, where)


def read_files(files: Mapping[str, bytes], where: str) -> tuple[Gate, Checkpoint]:
    """Return the gate that the files of a checkpoint hold; messages say `where` they come from.

    Raises CheckpointError if a file is damaged, or the weights do not match the recorded version.
    """
    if set(files) != set(FILES):
        raise CheckpointError(f"{where}: its files are {short(sorted(files))}; expected exactly {', '.join(FILES)}")
    data, text = (files[name] for name in FILES)
    name = FILES[1]
    try:
        check_bytes(text)
        tree = read_json(text)
        name = FILES[0]
        if (length := int.from_bytes(data[:8], "little")) > _MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {length} bytes, and that of a gate takes {_MAX_HEADER_BYTES} at most")
        tensors = deserialize(data)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{where}: {name}: {' '.join(str(error).split())}; {_WHAT}") from error
    seen = tree.get("schema_version", SCHEMA_VERSION) if isinstance(tree, dict) else SCHEMA_VERSION
    if seen != SCHEMA_VERSION:
        raise CheckpointError(
            f"{where}: schema_version is {short(seen)}, this dmoa reads {SCHEMA_VERSION}; "
            "use the dmoa that wrote it, or train again"
        )
    try:
        record = Checkpoint.model_validate(tree)
        return _restore(record, tensors), record
    except ValidationError as error:
        raise CheckpointError(f"{where}: gate.json: {describe(error, Checkpoint)}") from error
    except (ValueError, ArithmeticError, RuntimeError, TypeError) as error:  # errors of ours among them
        raise CheckpointError(f"{where}: {' '.join(str(error).split())}; the files are damaged or mixed") from error


def _restore(record: Checkpoint, tensors: dict[str, torch.Tensor]) -> Gate:
    """Build the gate; raises CheckpointError, ConfigError or RuntimeError where record and tensors do not fit."""
    own = {name: one for name, one in tensors.items() if record.label_model is None or not name.startswith(_JUDGE)}
    for name, one in tensors.items():
        wanted = torch.float32 if name in own else torch.float64
        if one.dtype != wanted or not one.isfinite().all():  # widened, others would take up to eight times their memory
            seen = "NaN or infinity" if one.dtype == wanted else one.dtype
            raise CheckpointError(f"gate.safetensors: {name} holds {seen}; expected finite numbers of {wanted}")
    arrays = {name.removeprefix(_JUDGE): tensor.numpy() for name, tensor in tensors.items() if name not in own}
    label_model = None if record.label_model is None else LabelModel.from_arrays(arrays, record.label_model)
    with torch.device("meta"):
        gate = Gate(GateSpec.from_json(record.spec), profile_AD=tensors.get("profile_AD"), label_model=label_model)
    if label_model is not None and label_model.num_agents != len(gate.spec.agents):
        raise CheckpointError(f"label model: of {label_model.num_agents} agents; expected {len(gate.spec.agents)}")
    # Copies, which lie as torch likes them; the gate itself takes no memory before the file is known to hold all of it.
    gate.load_state_dict({name: one.clone() for name, one in own.items()}, assign=True)
    expected = _fields(gate, is_trained=not record.version.startswith(UNTRAINED), supervision=record.supervision)
    for name, value in expected.items():
        seen = getattr(record, name)
        if seen != value:
            raise CheckpointError(f"{name} in gate.json is {short(seen)}, weights and spec say {short(value)}")
    anchors = gate.spec.anchors
    if record.anchor_set is not None and anchors is not None and record.anchor_set.means != anchors:
        raise CheckpointError(
            f"anchor_set.means in gate.json is {short(record.anchor_set.means)}, the spec says {short(anchors)}"
        )
    return gate


def check_pool(record: Checkpoint, *, fingerprint: str, agents: tuple[str, ...], preset: str) -> None:
    """Raise CheckpointError unless the checkpoint was made for this pool; the message says which agents differ.

    The `profile` head accepts another pool: its agents are described by their profiles. `preset` is the pool's: with
    another one the policy would build inputs that the gate cannot read.
    """
    if record.preset != preset:
        raise CheckpointError(
            f"checkpoint {record.version}: its preset is {record.preset!r}, the pool's gate.preset is {preset!r}; "
            f"set gate.preset to {record.preset!r} or choose another checkpoint"
        )
    if record.pool_fingerprint == fingerprint or record.head == "profile":
        return
    theirs = tuple(record.agents)
    if theirs == agents:
        detail = "the agents have the same names, but a model, adapter, profile, tool or sampling setting differs"
    elif set(theirs) == set(agents):
        detail = f"the same agents in another order, the checkpoint's is {', '.join(theirs)}"
    else:
        missing = ", ".join(name for name in theirs if name not in agents) or "none"
        added = ", ".join(name for name in agents if name not in theirs) or "none"
        detail = f"only in the checkpoint: {missing}; only in the pool: {added}"
    raise CheckpointError(
        f"checkpoint {record.version}: made for pool {record.pool_fingerprint[:12]}, this pool is {fingerprint[:12]}; {detail}; "
        "serve the pool it was trained for, or train a gate for this one"
    )
