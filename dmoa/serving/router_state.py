"""What the router keeps beyond its own life: gate versions and which one is current, on any Ray file system.

Layout under `router.state_uri`: `versions/VERSION/` (a dmoa checkpoint each) and `state.json`. Every file is written
whole, then renamed, because the router may die at any moment and restart on another node.
"""

from __future__ import annotations

import json
import posixpath
import secrets
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_state_path
from pyarrow import fs as arrow_fs
from pyarrow.lib import ArrowException

from dmoa import checkpoint
from dmoa.checkpoint import Checkpoint
from dmoa.core.gate import Gate
from dmoa.errors import CheckpointError, ConfigError
from dmoa.validation import short

FILES = ("gate.safetensors", "gate.json")
"""The files of a version, in the order in which they are written."""


def read_files(files: Mapping[str, bytes], where: str) -> tuple[Gate, Checkpoint]:
    """Return the gate that the files of a checkpoint hold; messages say `where` they come from. Raises CheckpointError."""
    if set(files) != set(FILES):
        raise CheckpointError(f"{where}: its files are {short(sorted(files))}; allowed are exactly {', '.join(FILES)}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in FILES:
            (Path(scratch) / name).write_bytes(files[name])
        try:
            return checkpoint.load(scratch)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(f"checkpoint {scratch!r}", where)) from error


def default_state_uri(app: str) -> str:
    """Return where state is kept when the configuration names no place: a folder of this user on this machine."""
    return (user_state_path("dmoa") / "router" / app).as_uri()


class RouterState:
    """Reads and writes a router's versions and history."""

    def __init__(self, uri: str) -> None:
        """Open the place. Raises ConfigError for a URI that no file system serves."""
        try:
            self._fs, self._root = arrow_fs.FileSystem.from_uri(uri)
        except (ArrowException, OSError, ValueError) as error:
            raise ConfigError(
                f"router.state_uri: value seen: {uri!r}; allowed are file:///DIR, s3://..., gs://...; change it ({error})"
            ) from error

    def save_version(self, gate: Gate, record: Checkpoint) -> None:
        """Keep a version; one that is already there is left alone, because its name is its content."""
        if self._exists(f"versions/{record.version}/gate.json"):
            return
        with tempfile.TemporaryDirectory() as scratch:
            folder = checkpoint.save(Path(scratch) / "version", gate, record)
            for name in FILES:
                self._write(f"versions/{record.version}/{name}", (folder / name).read_bytes())

    def load_version(self, version: str) -> tuple[Gate, Checkpoint] | None:
        """Return a version's weights and record, None if it was never kept. Raises CheckpointError if damaged."""
        if not self._exists(f"versions/{version}/gate.json"):
            return None
        try:
            return read_files(self.read_version(version), f"gate {version}")
        except CheckpointError as error:
            place = self._path(f"versions/{version}")
            raise CheckpointError(f"router state {place!r} is damaged; remove it to begin anew ({error})") from error

    def read_version(self, version: str) -> dict[str, bytes]:
        """Return the files of a version by name."""
        return {name: self._read(f"versions/{version}/{name}") for name in FILES}

    def keep_versions(self, wanted: Collection[str]) -> None:
        """Remove the versions that nobody wants any more."""
        for found in self._fs.get_file_info(arrow_fs.FileSelector(self._path("versions"), allow_not_found=True)):
            if found.type == arrow_fs.FileType.Directory and found.base_name not in wanted:
                self._fs.delete_dir(found.path)

    def save(self, state: dict[str, Any]) -> None:
        """Keep the state: current version, history, fingerprint."""
        self._write("state.json", json.dumps(state, indent=2).encode())

    def load(self) -> dict[str, Any] | None:
        """Return the state, None before the first save. Raises CheckpointError if it cannot be read."""
        if not self._exists("state.json"):
            return None
        try:
            state = json.loads(self._read("state.json"))
        except ValueError as error:
            raise CheckpointError(f"router state {self._path('state.json')!r}: {error}; remove it to begin anew") from error
        if not isinstance(state, dict):
            raise CheckpointError(f"router state {self._path('state.json')!r}: it is no JSON object; remove it to begin anew")
        return state

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def _exists(self, name: str) -> bool:
        return bool(self._fs.get_file_info(self._path(name)).type == arrow_fs.FileType.File)

    def _read(self, name: str) -> bytes:
        with self._fs.open_input_stream(self._path(name)) as stream:
            return bytes(stream.readall())

    def _write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        draft = f"{path}.{secrets.token_hex(4)}.part"
        self._fs.create_dir(posixpath.dirname(path), recursive=True)
        with self._fs.open_output_stream(draft) as stream:
            stream.write(data)
        self._fs.move(draft, path)
