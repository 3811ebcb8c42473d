"""YAML text as a tree of plain values, and `a.b=c` overrides on it: what `config` builds its records from.

YAML 1.1, which PyYAML reads, gives some plain words a value that nobody reads in them. `yes`, `no`, `on`, `off` and `=` are
texts here, which a field for a truth value understands as well. Dates, base 60, base 2 and numbers with a leading zero
(base 8 there) are refused, and so is a key that stands twice.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from dmoa.errors import ConfigError
from dmoa.reading import MAX_BYTES, check_bytes, read_bounded
from dmoa.validation import redact_text, short

STDIN = "-"
"""Name of a file that stands for standard input."""
_MAX_VALUES = 200_000
"""Of a tree once its aliases are written out: a few lines can name billions."""
_MAX_DEPTH = 32
"""Of the names that `--set` walks down."""
_MAX_NODES = 100_000
"""Of a text itself: PyYAML reads some ten thousand a second."""
_MAX_FLOW = 100
_MAX_DIGITS = 64
_TAG = "tag:yaml.org,2002:"
_TRUTH = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_NUMBER_OF_ANOTHER_BASE = re.compile(r"[-+]?0[0-9_]+|[-+]?0b[01_]+|[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?")
_LET_THROUGH = (ValueError, LookupError, AttributeError, RecursionError)
"""What PyYAML raises besides its own errors: of int, bool, date and nesting."""
_taken: tuple[TextIO, str] | None = None
"""Standard input and what it held: it can be read once, but a command may load its pool several times."""


class _RefusedError(yaml.YAMLError):
    """Valid YAML that says something else than it seems to."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without the surprises of YAML 1.1."""

    _num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node. Refuses a text of more of them than a pool has, before it takes a minute to read."""
        self._num_nodes += 1
        if self._num_nodes > _MAX_NODES:
            where = f"line {self.get_mark().line + 1}"
            raise _RefusedError(f"{where}: more than {_MAX_NODES} names and values, which no pool has; write a smaller file")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Return the node of a mapping as it is written. Refuses a key that stands twice in it."""
        # Here no `<<` is resolved yet: a key beside it may replace one that it brings, and then stands twice in the node.
        node, seen = super().compose_mapping_node(anchor), set[tuple[str, str]]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
                continue
            if (key.tag, key.value) in seen:
                raise _refused(key, f"the key {short(key.value)} stands twice in one section; keep one of the two")
            seen.add((key.tag, key.value))
        return node

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Begin a list or mapping in brackets. Refuses many within each other, over which the scanner takes quadratic time."""
        if self.flow_level >= _MAX_FLOW:
            mark = self.get_mark()
            raise _RefusedError(
                f"line {mark.line + 1}: more than {_MAX_FLOW} brackets within each other; write out what is meant"
            )
        super().fetch_flow_collection_start(TokenClass)

    def number(self, node: Any) -> int | float:
        """Return the number of a node. Refuses one that YAML 1.1 reads otherwise than a person, or that is endless."""
        text = self.construct_scalar(node)
        if len(text) > _MAX_DIGITS:
            raise _refused(node, f"a number of {len(text)} characters; write a shorter one, or the text in quotes")
        as_is: int | float = self.construct_yaml_int(node) if node.tag == f"{_TAG}int" else self.construct_yaml_float(node)
        if _NUMBER_OF_ANOTHER_BASE.fullmatch(text):
            raise _refused(node, f"YAML 1.1 reads {text} as {as_is:g}; write that number in decimal, or the text in quotes")
        return as_is

    def date(self, node: Any) -> None:
        """Refuse a node: no field holds a date."""
        self.construct_yaml_timestamp(node)
        text = self.construct_scalar(node)
        raise _refused(node, f"YAML 1.1 reads {text} as a date; write the text in quotes")


def _refused(node: Any, what: str) -> _RefusedError:
    return _RefusedError(f"line {node.start_mark.line + 1}: {what}")


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in (f"{_TAG}bool", f"{_TAG}value")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}bool", _TRUTH, list("tTfF"))
_Loader.add_constructor(f"{_TAG}int", _Loader.number)
_Loader.add_constructor(f"{_TAG}float", _Loader.number)
_Loader.add_constructor(f"{_TAG}timestamp", _Loader.date)


def parse_yaml(text: str, source: str) -> Any:
    """Return the values that a YAML text holds. Raises ConfigError naming `source`."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except _RefusedError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (yaml.YAMLError, *_LET_THROUGH) as error:
        raise ConfigError(f"{source}: not valid YAML: {redact_text(' '.join(str(error).split()))}; correct it") from error


def _check_size(node: Any) -> None:
    """Refuse a tree that is endless, or far larger than its text, because of its aliases."""
    sizes: dict[int, int] = {}

    def size(inner: Any) -> int:
        known = sizes.get(id(inner))
        if known == 0:
            raise _refused(inner, "a section holds itself by an alias; write out what is meant")
        if known is None:
            sizes[id(inner)] = 0
            parts = inner.value if isinstance(inner, yaml.CollectionNode) else ()
            known = 1 + sum(size(one) for part in parts for one in (part if isinstance(part, tuple) else (part,)))
            if known > _MAX_VALUES:
                raise _refused(inner, f"aliases make it more than {_MAX_VALUES} values; write out what is meant")
            sizes[id(inner)] = known
        return known

    size(node)


def read(path: str | Path) -> tuple[str, str]:
    """Return the text of a YAML file, and its name for messages; `-` is standard input, which may be read again.

    Raises OSError, also for more than `MAX_BYTES`, and UnicodeDecodeError.
    """
    global _taken
    if str(path) != STDIN:
        return read_bounded(Path(path)).decode("utf-8"), str(path)
    if sys.stdin is None:  # Python's word for one that is closed
        raise OSError("standard input is closed")
    if _taken is None or _taken[0] is not sys.stdin:
        found = sys.stdin.buffer.read(MAX_BYTES + 1)
        check_bytes(found)
        _taken = (sys.stdin, found.decode("utf-8"))
    return _taken[1], "standard input"


def set_value(tree: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` override in place; list entries are named by their index. Raises ConfigError.

    A name that holds dots itself is found where it is there.
    """
    path, sep, value = override.partition("=")
    parts = path.split(".")
    if not sep or not all(parts) or len(parts) > _MAX_DEPTH:
        raise ConfigError(f"--set {_shown(override)}: write it as a.b=value, such as gate.temperature=0.2")
    node: Any = tree
    key, parts = _next_key(node, parts)
    while parts:
        place = _place(node, key, override)
        child = node.get(place) if isinstance(node, dict) else node[place]
        # A copy, because a YAML alias puts the same section in several places.
        node[place] = {} if child is None else copy.copy(child)
        node = node[place]
        key, parts = _next_key(node, parts)
    place, clean = _place(node, key, override), redact_text(override)
    try:
        node[place] = parse_yaml(value, f"--set {short(clean)}")
    except ConfigError:
        if clean == override:
            raise
        # What PyYAML says of the value quotes it.
        raise ConfigError(f"--set {short(clean)}: the value is not valid YAML; correct it") from None


def _next_key(node: Any, parts: list[str]) -> tuple[str, list[str]]:
    """Return the longest of the next parts together that `node` has as a key, else the next part; and the parts after it."""
    joined = (".".join(parts[:count]) for count in range(len(parts), 1, -1)) if isinstance(node, dict) else ()
    key = next((name for name in joined if name in node), parts[0])
    return key, parts[key.count(".") + 1 :]


def _shown(override: str) -> str:
    return short(redact_text(override))


def _place(node: Any, key: str, override: str) -> Any:
    """Return the key or index under which `node` holds `key`."""
    if isinstance(node, dict):
        return key
    where = f"--set {_shown(override)}: {short(key)}"
    if not isinstance(node, list):
        raise ConfigError(f"{where} lies under the value {short(node)}, which is not a section; set that value as a whole")
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(f"{where} is not an entry of this list; expected an index below {len(node)}")
    return int(key)


def merged(tree: Any, changes: Any) -> Any:
    """Return a tree with changes laid over it: section into section, and anything else in place of what was there."""
    if not (isinstance(tree, Mapping) and isinstance(changes, Mapping)):
        return changes
    return {**tree, **{key: merged(tree.get(key), value) for key, value in changes.items()}}
