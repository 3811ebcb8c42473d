"""Reads rollouts for the training of the gate: checks whose they are, then packs them into episodes.

With Ray the shards stream through Ray Data on the driver's node, where the folders are; in process they are read one after
the other. Both give the same episodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from dmoa.core.gate import GateSpec
from dmoa.errors import ConfigError, DmoaError
from dmoa.training.episodes import COLUMNS, EpisodeBuilder, Episodes
from dmoa.training.rollout_records import Manifest
from dmoa.training.rollouts import check_pool, part_paths, read_manifest, read_part

FOLDER = "folder"
"""Column that says which of the folders a row comes from."""


def read_manifests(folders: Sequence[Path], spec: GateSpec, fingerprint: str) -> list[Manifest]:
    """Return the manifests of the folders, after a look at each of their files.

    Raises ConfigError for a folder that is none, holds rollouts of another pool (the message says which agents differ) or of
    another preset than the gate's, or a file that was cut short.
    """
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        check_pool(manifest, fingerprint=fingerprint, agents=spec.agents)
        if manifest.preset != spec.preset:
            raise ConfigError(
                f"--rollouts: {str(folder)!r}: preset: value seen: {manifest.preset!r}; the gate that is to learn has "
                f"{spec.preset!r}, which reads other inputs; set gate.preset to {manifest.preset!r}, or collect again"
            )
    for _, path in _parts(folders):
        read_part(path, columns=("step",))
    return manifests


def _parts(folders: Sequence[Path]) -> list[tuple[int, str]]:
    """Return place of the folder and path of every file. Raises ConfigError for a folder without any."""
    parts: list[tuple[int, str]] = []
    for place, folder in enumerate(folders):
        found = part_paths(folder)
        if not found:
            raise ConfigError(f"--rollouts: {str(folder)!r}: no Parquet files; collect with dmoa rollouts --out {folder}")
        parts += [(place, str(path.absolute())) for path in found]
    return parts


def read_episodes(folders: Sequence[Path], spec: GateSpec, fingerprint: str, *, on_ray: bool) -> Episodes:
    """Return the episodes of all folders. Raises ConfigError for files that are damaged, missing or hold what cannot be used."""
    parts = _parts(folders)
    builder = EpisodeBuilder(spec.agents, spec.input_dim, has_feedback=spec.preset != "paper")
    for table in _stream(parts, fingerprint) if on_ray else (read_rows(*part, fingerprint) for part in parts):
        for place in table[FOLDER].unique().to_pylist():
            builder.add(table.filter(pc.equal(table[FOLDER], place)), place)
    return builder.build()


def read_rows(place: int, path: str, fingerprint: str) -> pa.Table:
    """Return what training reads of one Parquet file, with the place of its folder. Raises ConfigError as `read_part` does."""
    table = read_part(path, fingerprint=fingerprint, columns=COLUMNS)
    return table.append_column(FOLDER, pa.array([place] * len(table), pa.int64()))


def _stream(parts: Sequence[tuple[int, str]], fingerprint: str) -> Iterator[pa.Table]:
    """Yield the rows of the files by way of Ray Data. Raises ConfigError for a bad file, DmoaError where Ray stops."""
    from ray.exceptions import RayError

    from dmoa.training.rollout_source import read_parts

    try:
        yield from read_parts(parts, fingerprint).iter_batches(batch_size=None, batch_format="pyarrow")
    except (RayError, ConfigError) as error:
        reason = _first_config_error(error)
        if reason is not None:
            raise ConfigError(reason) from error
        raise DmoaError(f"reading the rollouts stopped: {' '.join(str(error).split())[-2000:]}") from error


def _first_config_error(error: BaseException | None) -> str | None:
    """Return the message of the bad input behind an error that crossed Ray, None where it was something else."""
    while error is not None:
        if type(error) is ConfigError:
            return str(error)
        error = getattr(error, "cause", None) or error.__cause__
    return None
