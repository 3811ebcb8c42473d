"""Takes secrets out of what is written down or logged: by the name of a field, and by what a text looks like.

Used for the settings that a run keeps beside its results and for what a tracker logs. It knows common shapes, not every
secret: nothing that is known to be one should be handed to it in the first place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

REDACTED = "[redacted]"
# `tokens` is what budgets count and `tokenizer` a part of a model; neither is a credential.
_NAMES = r"key|token(?!s|iz)|secret|passw|credential|authorization"
_SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)
_TOKENS_NAME = re.compile("tokens", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s@]+@")
_ASSIGNED = re.compile(rf"([\w.\-]*(?:{_NAMES})[\w\-]*\s*=\s*)(?:\"[^\"]*\"|'[^']*'|[^\s&,;'\"]+)", re.IGNORECASE)
_KNOWN = re.compile(r"\b(?:sk-|hf_|ghp_|xox[abp]-|AKIA)[A-Za-z0-9_\-]{8,}|\bBearer\s+\S+")


def redact(value: Any, name: str = "") -> Any:
    """Return plain JSON values with every secret replaced by `[redacted]`; what is no plain value becomes text.

    Whatever a field named like a key, token, secret or password holds is replaced, null and booleans aside; in other texts
    the user part of a URL, `api_key=...` and the well-known shapes of keys are. `name` is the field's own name.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        inherited = name if _is_secret(name, "") else ""
        return {str(key): redact(inner, inherited or str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(inner, name) for inner in value]
    if _is_secret(name, value):
        return REDACTED
    if isinstance(value, int | float):
        return value
    return redact_text(str(value) if isinstance(value, str | PurePath) else repr(value))


def redact_text(text: str) -> str:
    """Return a text without the user part of its URLs, values given to secret names, and well-known shapes of keys."""
    text = _USERINFO.sub(f"{REDACTED}@", text)
    text = _ASSIGNED.sub(rf"\g<1>{REDACTED}", text)
    return _KNOWN.sub(REDACTED, text)


def _is_secret(name: str, value: object) -> bool:
    if _SECRET_NAME.search(name):
        return True
    # `auth_tokens: [...]` holds credentials, `max_tokens: 96` a count.
    return bool(_TOKENS_NAME.search(name)) and isinstance(value, str) and value != ""
