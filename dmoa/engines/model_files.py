"""Checks a language model's files without loading them: that they are there, whole, and of the right kind.

A pool is checked with it before anything starts; what only loading shows is the engine's to report.
"""

from __future__ import annotations

from pathlib import Path

from dmoa.engines.models import check_embedded, resolve_model
from dmoa.errors import ConfigError
from dmoa.reading import read_bounded, read_json, regular

_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library reads at most."""


def check_model(model: str) -> None:
    """Check an LLM's `model` as far as its files are here; nothing is fetched. Raises ConfigError naming value and fault."""
    if model.startswith("embedded:"):
        check_embedded(model)
    elif not model.startswith("s3:"):  # vLLM fetches those, and they are looked at there
        try:
            found = resolve_model(model)
        except ConfigError:
            raise
        except (OSError, ValueError) as error:  # a folder that this user may not look into, or no path at all
            raise ConfigError(f"model is {model!r}; it cannot be looked at ({error}); fix the path") from error
        fault = fault_of_folder(found) if isinstance(found, Path) else None
        if fault:
            raise ConfigError(f"model is {model!r}; {fault}; save or copy the model again, or fix the path")


def fault_of_folder(folder: Path) -> str | None:
    """Return what is wrong with the files of a model in `folder`, None if nothing that shows from outside."""
    try:
        if not isinstance(read_json(read_bounded(folder / _CONFIG)), dict):
            return f"{_CONFIG} holds no JSON object"
        index = folder / _INDEX
        named = read_json(read_bounded(index, most=1 << 26))["weight_map"].values() if index.is_file() else ()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{_CONFIG} or {_INDEX} cannot be read ({type(error).__name__}: {error})"
    missing = sorted(name for name in set(named) if not (folder / name).is_file())
    if missing:
        return f"{missing[0]} is missing, which {_INDEX} names"
    return next(filter(None, map(_fault_of_weights, sorted(folder.glob("*.safetensors")))), None)


def _fault_of_weights(file: Path) -> str | None:
    """Return what is wrong with a safetensors file by its header: cut short, or something else under that name."""
    try:
        size = file.stat().st_size
        with open(file, "rb", opener=regular) as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
                return (
                    f"{file.name} ({size} bytes) holds no weights: it is cut short, or a pointer to a file that was not fetched"
                )
            header = read_json(opened.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        return f"{file.name} cannot be read ({type(error).__name__}: {error})"
    expected = _LENGTH_BYTES + length + max(ends, default=0)
    return f"{file.name} has {size} bytes where its header says {expected}" if size < expected else None
