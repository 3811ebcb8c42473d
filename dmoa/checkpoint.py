"""The dmoa checkpoint: `gate.safetensors` (weights) and `gate.json` (everything else), in one folder.

Written whole, then renamed; loaded without pickle; checked against its own content hash and the pool's fingerprint.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmoa.core.gate import Gate, GateSpec, weights_version
from dmoa.errors import CheckpointError
from dmoa.explain import describe
from dmoa.types import UNTRAINED

SCHEMA_VERSION = 1


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
    anchor_set: dict[str, Any] | None = None
    encoder: str = "all-MiniLM-L6-v2"
    agents: list[str]
    pool_fingerprint: str
    trained_on: dict[str, Any] | None = None
    """Rollouts behind the weights; null: untrained."""
    metrics: dict[str, float] = Field(default_factory=dict)
    code_revision: str = ""
    spec: dict[str, Any]
    """The gate's specification as the code reads it back."""


def describe_gate(gate: Gate, *, fingerprint: str, trained_on: dict[str, Any] | None = None, **extra: Any) -> Checkpoint:
    """Return the record of a gate, its version included."""
    spec = gate.spec
    version = weights_version(gate)
    return Checkpoint(
        version=version if trained_on else UNTRAINED + version,
        preset=spec.preset,
        head=spec.head,
        sizes={
            "hidden": spec.hidden,
            "embedding_dim": spec.embedding_dim,
            "input_dim": spec.input_dim,
            "agents": len(spec.agents),
        },
        temperature=spec.temperature,
        activation={
            "rule": spec.rule,
            "mass": spec.mass,
            "max_agents": spec.max_agents,
            "cascade": spec.cascade,
            "theta": spec.theta,
        },
        score=spec.score,
        agents=list(spec.agents),
        pool_fingerprint=fingerprint,
        trained_on=trained_on,
        spec=spec.to_json(),
        **extra,
    )


def save(folder: str | Path, gate: Gate, record: Checkpoint) -> Path:
    """Write a checkpoint folder whole, then rename it into place; an existing one is replaced. Returns the folder."""
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        tensors = {name: tensor.detach().contiguous() for name, tensor in gate.state_dict().items()}
        save_file(tensors, str(draft / "gate.safetensors"))
        (draft / "gate.json").write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
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
    """Read a checkpoint folder.

    Raises CheckpointError if a file is missing or damaged, or the weights do not match the recorded version.
    """
    root = Path(folder)
    try:
        record = Checkpoint.model_validate_json((root / "gate.json").read_text(encoding="utf-8"))
        tensors = load_file(str(root / "gate.safetensors"))
    except ValidationError as error:
        raise CheckpointError(f"checkpoint {str(root)!r}: gate.json: {describe(error)}") from error
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"checkpoint {str(root)!r}: {error}; a checkpoint is a folder with gate.safetensors and gate.json"
        ) from error
    if record.schema_version != SCHEMA_VERSION:
        raise CheckpointError(
            f"checkpoint {str(root)!r}: schema_version is {record.schema_version}, this dmoa reads {SCHEMA_VERSION}; "
            "use the dmoa that wrote it, or train again"
        )
    return _restore(root, record, tensors), record


def _restore(root: Path, record: Checkpoint, tensors: dict[str, torch.Tensor]) -> Gate:
    spec = GateSpec.from_json(record.spec)
    gate = Gate(spec, profile_AD=tensors.get("profile_AD"))
    try:
        gate.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint {str(root)!r}: weights do not fit gate.json: {' '.join(str(error).split())}"
        ) from error
    found = weights_version(gate)
    if found != record.version.removeprefix(UNTRAINED):
        raise CheckpointError(
            f"checkpoint {str(root)!r}: the weights hash to {found}, gate.json says {record.version}; "
            "the files are damaged or mixed"
        )
    return gate


def check_pool(record: Checkpoint, *, fingerprint: str, agents: tuple[str, ...]) -> None:
    """Raise CheckpointError unless the checkpoint was made for this pool; the message says which agents differ.

    The `profile` head accepts another pool: its agents are described by their profiles.
    """
    if record.pool_fingerprint == fingerprint or record.head == "profile":
        return
    theirs = tuple(record.agents)
    if theirs == agents:
        detail = "the agents have the same names, but a model, adapter, profile, tool or sampling setting differs"
    else:
        missing = ", ".join(name for name in theirs if name not in agents) or "none"
        added = ", ".join(name for name in agents if name not in theirs) or "none"
        detail = f"only in the checkpoint: {missing}; only in the pool: {added}"
    raise CheckpointError(
        f"checkpoint {record.version}: made for pool {record.pool_fingerprint[:12]}, this pool is {fingerprint[:12]}; {detail}; "
        "serve the pool it was trained for, or train a gate for this one"
    )
