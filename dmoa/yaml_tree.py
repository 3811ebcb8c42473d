"""YAML text as a tree of plain values, and `a.b=c` overrides on it: what `config` builds its records from."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from dmoa.errors import ConfigError
from dmoa.explain import short
from dmoa.redaction import redact_text


def parse(text: str, source: str) -> Any:
    """Return the values that a YAML text holds. Raises ConfigError naming `source`."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets the errors of int, date and nesting through
        raise ConfigError(f"{source}: not valid YAML: {redact_text(' '.join(str(error).split()))}; correct it") from error


def set_value(tree: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` override in place; list entries are named by their index. Raises ConfigError."""
    path, sep, value = override.partition("=")
    keys = path.split(".")
    if not sep or not all(keys):
        raise ConfigError(f"--set {redact_text(override)!r}: write it as a.b=value, such as gate.temperature=0.2")
    node: Any = tree
    for key in keys[:-1]:
        place = _place(node, key, override)
        child = node.get(place) if isinstance(node, dict) else node[place]
        # A copy, because a YAML alias puts the same section in several places.
        node[place] = {} if child is None else copy.copy(child)
        node = node[place]
    place, clean = _place(node, keys[-1], override), redact_text(override)
    try:
        node[place] = parse(value, f"--set {clean!r}")
    except ConfigError:
        if clean == override:
            raise
        # What PyYAML says of the value quotes it.
        raise ConfigError(f"--set {clean!r}: the value is not valid YAML; correct it") from None


def _place(node: Any, key: str, override: str) -> Any:
    """Return the key or index under which `node` holds `key`."""
    if isinstance(node, dict):
        return key
    where = f"--set {redact_text(override)!r}: {key!r}"
    if not isinstance(node, list):
        raise ConfigError(f"{where} lies under the value {short(node)}, allowed is a section; set that value as a whole")
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(f"{where} is no entry of this list; allowed: an index below {len(node)}; use one of them")
    return int(key)
