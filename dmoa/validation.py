"""Turns pydantic's errors into one line that a person can act on, and takes secrets out of whatever is shown or kept.

Used wherever something written by a person or another program is read, and before commands, settings and errors are written.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import html
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import PurePath
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_MAX_CHARS = 80
_BRANCH = re.compile(r"constrained-\w+|[\w\-]+\[(?!\d+\]).*\]")
"""What pydantic calls a branch of a union in a location; `a[0]` is a name that somebody wrote."""
_ON_NAMES = ("extra_forbidden", "missing")
"""Findings on a name itself, which the location ends with."""
_MAX_PROBLEMS = 20
"""Told of one file: more help nobody."""
_LIKENESS = 0.6
"""Least `difflib` ratio of a name that is suggested."""

REDACTED = "[redacted]"
_SECRET_PARTS = re.compile(
    r"token(?!iz|is[ae])|secret(?!ar)|passw|passphrase|passcode|credential|authori[sz]ation|apikey|accesskey"
)
_SECRET_WORDS = re.compile(r"key|keys|pwd|pw|creds|cookie|cookies|bearer|mnemonic|j?sessionid|phpsessid")
_WEAK_WORDS = re.compile(r"pass|auth|otp")
"""Names of a secret where the value is no plain word or number: `pass: yes` is a result."""
_ENDS_IN_KEY = re.compile(r"keys?$")
_ORDINARY = re.compile(r"^(?:mon|don|tur|hoc|joc|whis|lac|flun|hot)keys?$")
_COUNTS = re.compile(
    r"audio|avg|bos|budget|cached|cls|count|entropy|eos|extra|first|ids|image|len|length|mask|max|mean|min|num|of"
    r"|pad|per|sep|size|special|start|stop|end|total|type|unk|usage|vocab|prompt|completion|reasoning"
)
"""Words beside `token` or `tokens` in the name of a count or of a part of a vocabulary, neither of which is a credential."""
_COUNTED = re.compile(
    r"accepted|added|batch|context|counted|draft|generated|input|last|new|next|number|out|output|prediction|rejected"
    r"|step|text|used"
)
"""Words that say so beside `tokens` alone."""
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_COUNT_OF_KEYS = re.compile(r"^(?:num|max|min|total|n)_|_(?:count|size|length)$", re.IGNORECASE)

# The kept list of what secrets look like by themselves; every pattern takes time in proportion to the text.
_PRIVATE = r"[A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
_KNOWN = re.compile(
    r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))(?:"
    r"sk-[\w\-]{8,}|[spr]k_(?:live|test)_\w{8,}|whsec_\w{8,}"
    r"|hf_(?!hub|transfer)\w{8,}|gh[a-z]_\w{8,}|github_pat_\w{8,}|gl[a-z]{1,6}-[\w\-]{8,}|dckr_pat_[\w\-]{8,}"
    r"|AIza[\w\-]{8,}|ya29\.[\w\-]{8,}|GOCSPX-[\w\-]{8,}|xox[a-z]-[\w\-]{8,}|xapp-[\w\-]{8,}|AKIA\w{8,}|ASIA[A-Z0-9]{16}"
    r"|npm_[A-Za-z0-9]{30,}|pypi-AgE\w{8,}|(?:gsk|r8)_[A-Za-z0-9]{20,}|(?:xai|nvapi|pplx|tvly)-[\w\-]{16,}|dop_v1_\w{16,}"
    r"|SG\.[\w\-]{8,}\.[\w\-]{8,}|eyJ[\w\-]{5,}\.[\w\-]+(?:\.[\w\-]*)*"
    r"|hv[sbr]\.[\w\-]{16,}|AGE-SECRET-KEY-1[A-Z0-9]{8,}|dp\.(?:pt|st|ct|sa|scim|audit)\.[\w\-.]{16,}|dapi[A-Za-z0-9]{16,}"
    r"|shp(?:at|ca|pa|ss)_\w{16,}|lin_(?:api|oauth)_\w{16,}|(?:ntn|figd|glsa|sntrys|fo1|fw|rpa)_[A-Za-z0-9][\w\-]{15,}"
    r"|secret_(?=\w{0,60}\d)[A-Za-z0-9]{16,}|NRAK-\w{16,}|PMAK-[\w\-]{16,}|key-(?=\w{0,60}\d)[A-Za-z0-9]{32,}"
    r"|sq0(?:atp|csp)-[\w\-]{16,}|(?:bot)?\d{8,12}:AA[\w\-]{30,}"
    r")"
    rf"|-----BEGIN {_PRIVATE}(?:.*?-----END {_PRIVATE}|.*)"
    r"|(?<=hooks\.slack\.com/)(?:services|workflows|triggers)/[\w/\-]+|(?<=/api/webhooks/)\d+/[\w\-]+",
    re.DOTALL,
)
_PEM_END = re.compile(rf"-----END {_PRIVATE}")
_PEM_LINES = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\\r\n\t ")
_LOGIN_OF_URL = re.compile(
    r"(?:(?<=//)|(?<=\\/))(?:[^/\s?#\"'<>]+@|[^/\s:@\"'<>?#\[]{0,256}:(?!\d+(?:[/?#]|$))[^\s\"'<>@]{0,256}@)"
)
_SIGNED = re.compile(
    r"((?:[?&](?:sig|signature|X-\w{1,20}-Signature)|(?<![\w\-])X-\w{1,20}-Signature)=)[^&\s\"'<>]+", re.IGNORECASE
)
_HEADER = re.compile(
    r"(?<![\w\-])((?:proxy-)?authorization|(?:set-)?cookie2?)(:[ \t]*)(?![ \t]*\[redacted\])"
    r"(?:=\"[^\"\r\n]*\"|[^\r\n\"'\\{}\[\]])+",
    re.IGNORECASE,
)
"""A header as it is sent holds a secret up to the end of its line, or of the text that it stands in."""
_WRAPPED = re.compile(r"(\bSecret(?:Str|Bytes)?\(\s*b?[\"'])(?!\[redacted\])[^\"'\n]+")
_TOLD = re.compile(
    r"(?<![\w\-])((?:password|passwd|passphrase|secret|api[ _\-]?key|access[ _\-]?token"
    r"|sshpass[ ]+-p|wandb[ ]+login|redis-cli[ ]+-a)"
    r"(?:[ ](?:is|was))?[ \t]+[\"'`]?)(?=\S{0,200}\d)(?=\S{0,200}[A-Za-z])(?!\[)[^\s\"'`,;:=]{8,}(?![^\s\"'`,;.)]*[=:])",
    re.IGNORECASE,
)
"""As in `machine example.org login me password PASSWORD`: a word of letters and digits after one that announces it."""
_LOGIN = re.compile(r"((?<![\w\-])(?:-u|--user|--proxy-user)[ =]+[\"']?[^\s:\"']{1,256}:)[^\s\"']+")
_COOKIE_OPTION = re.compile(r"(\bcurl\b[^\n]{0,200}?\s-b[ =]*[\"']?[\w\-]{1,64}=)(?!\[redacted\])[^\s\"';]+")
_REPLACED: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (_LOGIN_OF_URL, f"{REDACTED}@"),
    (_SIGNED, rf"\g<1>{REDACTED}"),
    (_HEADER, rf"\g<1>\g<2>{REDACTED}"),
    (_KNOWN, REDACTED),
    (_WRAPPED, rf"\g<1>{REDACTED}"),
    (_TOLD, rf"\g<1>{REDACTED}"),
    (_LOGIN, rf"\g<1>{REDACTED}"),
    (_COOKIE_OPTION, rf"\g<1>{REDACTED}"),
)
_GIVEN = re.compile(
    r"(?P<name>(?<![\w.\-])[\w.\-]*\w|(?:api|access|secret|private)[ ]keys?(?:[ ]provided)?)"
    r"(?P<sign>\\*[\"']?\s*(?::=|=>|=(?!=)|:(?!:|//)|[\uff1a\uff1d]|%3[AD])[ \t]*)"
    r"|(?P<option>(?<![\w\-])--?[A-Za-z][\w\-]*)[ \t]+(?![\s\-])",
    re.IGNORECASE,
)
"""A name and what stands before its value; `--name` needs no sign."""
_VALUE = re.compile(
    r"\[redacted\]"
    r"|(?P<escape>\\+[\"'])(?:.*?(?P=escape)|.*)"
    r"|&(?:quot|apos|#34|#39);[^&]*" + r'|"(?:[^"\\]|\\.)*"' + r"|'(?:[^'\\]|\\.)*'" + r"|[\"'].*"
    r"|(?:(?:Bearer|Basic|Token|Digest)\s+)?[^\s&,;'\"{}\[\]()<>\\]+(?:,[^\s&,;'\"{}\[\]()<>=:\\]+)*",
    re.IGNORECASE,
)
_NEXT_LINE = re.compile(r"[ \t]*\\?\r?\n[ \t]*(?:\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*')(?![ \t]*[:=])")
"""A text that goes on in the next line, as Python joins them."""
_QUOTE = re.compile(r"\\*[\"']")
_BRACKET = re.compile(r"[{}\[\]]")
_BEARER = re.compile(r"(?<![A-Za-z0-9])(Bearer\s+|bearer\s+(?=\S*\d))(?!\[redacted\])[^\s\"'\\,;]+")
_BASIC = re.compile(r"(?<![A-Za-z0-9])(Basic\s+)([A-Za-z0-9+/_\-]{4,}={0,2})", re.IGNORECASE)
_LONG_LOGIN = 16
_TAGGED = re.compile(r"(<(?P<name>[\w.:\-]{1,64})>)(?:<!\[CDATA\[[^\]<>]*\]\]>|[^<>]+)(</(?P=name)>)")
_PAIR = re.compile(
    r"(?P<before>\(\s*b?(?P<mark>[\"'])(?P<name>[\w.\-]{1,100})(?P=mark)\s*,\s*b?(?P<quote>[\"']))"
    r"(?P<value>(?:[^\"'\\\n]|\\.)*)"
    r"|(?P<first>(?<!\w)(?:name|key|header)[\"']?\s*[:=]\s*[\"']?(?P<named>[\w.\-]{1,100})[\"']?[\s,;]{1,200}[\"']?value[\"']?\s*[:=]\s*)"
    r"(?P<second>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^\s\"',;<>{}\[\]]+)",
    re.IGNORECASE,
)
"""`('name', 'value')`, as headers are kept in lists, and `name: NAME, value: VALUE`, as environments are."""
_BLOCK_NAME = re.compile(
    r"^(?P<indent>[ \t]*)[\"']?(?P<name>[\w.\-]{1,100})[\"']?:[ \t]*(?:[|>][+\-\d]{0,2})?[ \t]*\r?\n", re.MULTILINE
)
_MORE = re.compile(r"(?:,[ \t]*(?![^\s,]*[=:])[^\s&,;'\"{}\[\]()<>=:\\]+)+")
"""What else a list of keys holds, with spaces between them."""


def did_you_mean(seen: Iterable[str] | str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'NAME'?` for unknown names that are near to allowed ones, else nothing.

    It ends a message: a name that is written nearly right gets the right one, whatever its case; of several names each its own.
    """
    by_lower = {name.lower(): name for name in allowed}
    unknown = [seen] if isinstance(seen, str) else list(seen)
    near = [difflib.get_close_matches(name.strip().lower(), by_lower, n=1, cutoff=_LIKENESS) for name in unknown]
    found = dict.fromkeys(repr(by_lower[name]) for names in near for name in names)
    return f"; did you mean {', '.join(found)}?" if found else ""


def describe(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Return every problem of a pydantic error in one line.

    `model` is the record that was being validated: with it an unknown key is answered with the keys that are allowed.
    """
    items = findings(error)
    more = f"; and {len(items) - _MAX_PROBLEMS} more" if len(items) > _MAX_PROBLEMS else ""
    items = items[:_MAX_PROBLEMS]
    return "; ".join(_sentence(item, model) for item in items if not _follows_from_others(item, items)) + more


def findings(error: ValidationError) -> list[ErrorDetails]:
    """Return pydantic's findings, those of a union as one, under the field's own name.

    Pydantic reports every branch of a union, and puts its type into the location: `('alpha', 'constrained-float')`.
    """
    found: dict[tuple[int | str, ...], ErrorDetails] = {}
    for item in error.errors(include_url=False):
        places = item["loc"][:-1] if item["type"] in _ON_NAMES else item["loc"]
        branches = [at for at, part in enumerate(places) if isinstance(part, str) and _BRANCH.fullmatch(part)]
        loc = tuple(part for at, part in enumerate(item["loc"]) if at not in branches)
        if branches and branches[0] < len(item["loc"]) - 1:  # it was meant as a list, so that other branches say nothing
            found.pop(item["loc"][: branches[0]], None)
        found[loc] = _either(found[loc], item) if branches and loc in found else {**item, "loc": loc}
    return list(found.values())


def _either(one: ErrorDetails, other: ErrorDetails) -> ErrorDetails:
    """Return two branches' findings on one value as one."""
    words = [re.sub(r", unable to parse string as an? \w+$", "", item["msg"]) for item in (one, other)]
    context = [str(item.get("ctx", {}).get("expected", "")) for item in (one, other)]
    message = f"{words[0]} or {expectation(words[1]).removeprefix('expected ')}"
    return {**one, "msg": message, "ctx": {"expected": " or ".join(context)}}


def _sentence(item: ErrorDetails, model: type[BaseModel] | None) -> str:
    where = ".".join(part if len(part) <= _MAX_CHARS else f"{part[: _MAX_CHARS - 3]}..." for part in map(str, item["loc"]))
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{where}: missing; add it"
    if item["type"] == "json_invalid":
        return expectation(message)
    if item["type"] == "extra_forbidden":
        keys = list(_keys_beside(item["loc"], model)) if model else []
        allowed = f"; expected one of {', '.join(keys)}" if model else ""
        nearest = did_you_mean(str(item["loc"][-1]), keys)
        return f"{where}: unknown key (value {_seen(item)}){allowed}; remove it or fix its spelling{nearest}"
    if item["type"] == "value_error" and isinstance(item["input"], dict | list | BaseModel):
        # A rule over several fields: its own message names them and their values.
        return f"{where}: {message}" if where else message
    message = expectation(message)
    return f"{where} is {_seen(item)}; {message}{_nearest_word(item)}"


def expectation(message: str) -> str:
    """Return pydantic's sentence on a value as what was expected of it, such as `expected a number greater than 0`."""
    message = re.sub(r"^[Ii]nput should be (?=greater|less)", "expected a number ", message)
    message = re.sub(r"^[Ii]nput should be ", "expected ", message)
    message = re.sub(r"^\w+ should have (at (?:least|most) \d+ \w+)(?: after validation.*)?$", r"expected \1", message)
    message = re.sub(r"^[Ss]tring should match ", "expected a text of the ", message)
    return message[:1].lower() + message[1:]


def _nearest_word(item: ErrorDetails) -> str:
    """Return the suggestion for a word that is none of the few that a field allows."""
    context = item.get("ctx", {})
    allowed = re.findall(r"'([^']*)'", str(context.get("expected") or context.get("expected_tags") or ""))
    return did_you_mean(item["input"], allowed) if isinstance(item["input"], str) else ""


def _seen(item: ErrorDetails) -> str:
    """Return the value seen, short; without what a field named like a key holds, because people do put keys there."""
    value = item["input"]
    if not isinstance(value, str | int | float | dict | list):
        return redact_text(short(value))
    value = _beginning(value)
    # Under each name on the way to it: what `auth_tokens` holds is secret whatever its own name is.
    names = [str(part) for part in item["loc"] if part != "[key]"]  # pydantic's word for the name of an entry itself
    for name in names or [""]:
        value = redact(value, name)
    return short(value)


def _beginning(value: Any, depth: int = 4) -> Any:
    """Return what of a value may show in 80 characters: all of a large one would take seconds to be looked through."""
    if isinstance(value, str):
        return value[:2000]
    if isinstance(value, list | tuple):
        return [_beginning(inner, depth - 1) for inner in value[:80]] if depth else "..."
    if isinstance(value, dict):
        return {key: _beginning(value[key], depth - 1) for key in islice(value, 80)} if depth else "..."
    return value


def _follows_from_others(item: ErrorDetails, items: list[ErrorDetails]) -> bool:
    """Whether a list only counts as too short because its entries were refused."""
    depth = len(item["loc"])
    return item["type"] == "too_short" and any(len(o["loc"]) > depth and o["loc"][:depth] == item["loc"] for o in items)


def _keys_beside(loc: tuple[int | str, ...], model: Any) -> Iterable[str]:
    """Return the keys of the record in which the last part of `loc` was found."""
    for part in loc[:-1]:
        model = model.model_fields[str(part)].annotation if _is_record(model) else _record_within(model)
    # What is left may be `Record | None`.
    fields: dict[str, Any] = (model if _is_record(model) else _record_within(model)).model_fields
    return fields


def _is_record(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, BaseModel)


def _record_within(annotation: Any) -> Any:
    return next(arg for arg in get_args(annotation) if _is_record(arg))


def is_finite(value: object) -> bool:
    """Tell whether a value is a number that a float can hold; JSON may hold larger ones."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def short(value: object) -> str:
    """Return a value as it is shown in a message: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 3] + "..."


def storable(text: str) -> str:
    """Replace what UTF-8 cannot carry (lone surrogates)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def redact(value: Any, name: str = "") -> Any:
    """Return plain JSON values with every secret replaced by `[redacted]`; what is not a plain value becomes text.

    Whatever a field named like a key, token, secret or password holds is replaced, at any depth, null and booleans aside; under
    `tokens` numbers stay too, which are counts. In other texts `redact_text` finds secrets. `name` is the field's own name.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        inherited = name if _is_secret(name) else ""
        # A field within that is secret by its own name is so for numbers too, which under `tokens` are counts.
        names = {key: str(key) if _is_secret(str(key), 0) else inherited or str(key) for key in value}
        return {redact_text(str(key)): redact(inner, names[key]) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(inner, name) for inner in value]
    if _is_secret(name, value):
        return REDACTED
    if isinstance(value, int | float):
        return value
    return redact_text(str(value) if isinstance(value, str | PurePath) else repr(value))


def redact_text(text: str) -> str:
    """Return a text without the user part of its URLs, values given to secret names, and well-known shapes of keys."""
    text = without_known_shapes(text)
    text = _TAGGED.sub(lambda m: f"{m[1]}{REDACTED}{m[3]}" if _is_secret(m["name"]) else m[0], text)
    text = _PAIR.sub(_without_value, text)
    text = _without_given(_without_blocks(text))
    text = _BEARER.sub(rf"\g<1>{REDACTED}", text)
    return _BASIC.sub(_without_login, text)


def without_known_shapes(text: str) -> str:
    """Return a text with `[redacted]` in place of what looks like a secret by itself."""
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return _without_ends(text)


def _without_ends(text: str) -> str:
    """Return a text without the lines before the end of a private key whose beginning was cut off."""
    parts, at = list[str](), 0
    for match in _PEM_END.finditer(text):
        start = match.start()
        while start > at and text[start - 1] in _PEM_LINES:
            start -= 1
        parts += [text[at:start], REDACTED]
        at = match.end()
    return "".join([*parts, text[at:]])


def redact_command(words: Iterable[str]) -> str:
    """Return a command line as one would type it, without its secrets."""
    clean, is_value = list[str](), False
    for word in words:
        name, sign, value = word.partition("=")
        if is_value and not word.startswith("-"):
            clean.append(REDACTED)
        elif sign and re.fullmatch(r"[\w.\-]+", name) and _is_secret(name, _count(value)):
            clean.append(f"{name}={REDACTED}")
        else:
            clean.append(redact_text(word))
        is_value = not sign and word.startswith("-") and _is_secret(word)
    return shlex.join(clean)


def _without_value(match: re.Match[str]) -> str:
    """Take the value out of a pair whose name is that of a secret."""
    name, value = (match["name"], match["value"]) if match["name"] else (match["named"], match["second"])
    if not value.strip("\"'") or not _is_secret(name, _count(value)):
        return match[0]
    return f"{match['before'] or match['first']}{REDACTED}"


def _without_blocks(text: str) -> str:
    """Return a text without the YAML blocks below names of secrets: what is indented deeper, or a list."""
    parts, at, searched = list[str](), 0, 0
    while head := _BLOCK_NAME.search(text, searched):
        searched = head.end()
        if _is_secret(head["name"]):
            line = re.compile(rf"{head['indent']}(?:[ \t]+\S|-[ \t])[^\n]*(?:\n|\Z)")
            while below := line.match(text, searched):
                searched = below.end()
            block = text[head.end() : searched]
            if block and REDACTED not in block and _is_secret(head["name"], _count(block)):
                end = "\n" if block.endswith("\n") else ""
                parts += [text[at : head.end()], f"{head['indent']}  {REDACTED}{end}"]
                at = searched
    return "".join([*parts, text[at:]])


def _without_given(text: str) -> str:
    """Return a text without the values that it gives to secret names: `name=x`, `name: x`, `"name": {...}`, `--name x`."""
    parts, at = list[str](), 0
    # Only values of secret names are passed over: what stands in other values is looked at like the rest.
    while given := _GIVEN.search(text, at):
        name, start = given["name"] or given["option"], given.end()
        # As in "The key: be brief".
        is_prose = ":" in (given["sign"] or "") and '"' not in given["sign"] and _words(name) in (["key"], ["keys"])
        end = start if is_prose or not _is_secret(name) else _end_of_value(text, start)
        if "=" in (given["sign"] or "") and name.lower().endswith("keys") and (more := _MORE.match(text, end)):
            end = more.end()
        quote = found[0] if (found := _QUOTE.match(text, start, end)) else ""
        value = text[start + len(quote) : end].removesuffix(quote)
        is_kept = value.lower() in ("", "null", "none", "true", "false", REDACTED) or not _is_secret(name, _count(value))
        parts.append(text[at : start if is_kept else start + len(quote)])
        parts.append("" if is_kept else f"{REDACTED}{quote}")
        at = start if is_kept else end
    return "".join([*parts, text[at:]])


def _end_of_value(text: str, start: int) -> int:
    """Return where the value that starts there ends: a bracket at its partner, all else as `_VALUE` says."""
    if text[start : start + 1] not in ("{", "[") or text.startswith(REDACTED, start):
        found = _VALUE.match(text, start)
        end = found.end() if found else start
        while text[end - 1 : end] in ("'", '"') and (more := _NEXT_LINE.match(text, end)):
            end = more.end()
        return end
    depth = 0
    for match in _BRACKET.finditer(text, start):
        depth += 1 if match[0] in "{[" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _count(text: str) -> object:
    """Return 0 for a text that holds numbers alone, the text for others: what tells counts from credentials."""
    without_names = re.sub(r"\\*[\"']?\w+\\*[\"']?\s*:", "", text)
    return 0 if re.fullmatch(r"[\d\s.,{}\[\]]+", without_names) else text


def _without_login(match: re.Match[str]) -> str:
    """Take out what follows `Basic` where it looks like a login, and is not a word of a sentence."""
    seen = match[2]
    is_login = seen.endswith("=") or (len(seen) >= _LONG_LOGIN and re.search(r"\d", seen) is not None)
    if not is_login:
        try:
            login = base64.b64decode(seen.translate(str.maketrans("-_", "+/")) + "=" * (-len(seen) % 4)).decode("ascii")
        except (binascii.Error, ValueError):
            return match[0]
        is_login = ":" in login and login.isprintable()
    return f"{match[1]}{REDACTED}" if is_login else match[0]


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]


def _is_secret(name: str, value: object = "") -> bool:
    """Tell whether a field of that name holds a secret; `value` tells a count from a credential."""
    words, is_number = _words(name), isinstance(value, int | float)
    if any(_SECRET_WORDS.fullmatch(word) or (_ENDS_IN_KEY.search(word) and not _ORDINARY.match(word)) for word in words):
        is_part_of_a_model = {"key", "value"} <= set(words)
        if not is_part_of_a_model and not (is_number and _COUNT_OF_KEYS.search(name)):
            return True
    if words and _WEAK_WORDS.fullmatch(words[-1]) and isinstance(value, str) and (not value or _looks_made(value)):
        return True
    joined = "".join(words)
    found = _SECRET_PARTS.findall(joined)
    if not found or any(part != "token" for part in found):
        return bool(found)
    is_plural = "tokens" in joined
    if any(_COUNTS.fullmatch(word) or (is_plural and _COUNTED.fullmatch(word)) for word in words):
        return False
    # `auth_tokens: {...}` holds credentials, `tokens: {"a": 1}` counts.
    return not (is_number and is_plural)


def _looks_made(value: str) -> bool:
    """Tell a password from a word or a number."""
    return (
        len(value) >= 6 and re.search(r"\d", value) is not None and re.search(r"[A-Za-z]", value) is not None and " " not in value
    )


class Conceal:
    """Takes one known secret out of texts: also a part of it, and as URLs, JSON, HTML and base64 write it."""

    _RUN = 6
    """Characters in a row that tell a part of the secret from chance; all of a shorter secret."""
    _SHORT = 4
    _MASKED = re.compile(r"[^\s\"'<>(),;]*(?:\*{2,}|\.{3,}|…|•{2,}|[xX]{4,})[^\s\"'<>(),;]*")
    _ESCAPE = re.compile(
        r"\\+u([0-9a-fA-F]{4})|\\+x([0-9a-fA-F]{2})|%([0-9a-fA-F]{2})|&#(\d{1,6});|&#[xX]([0-9a-fA-F]{1,5});|(&[a-z]{2,6};)"
        r"|\\+([^\w\s])"
    )

    def __init__(self, secret: str) -> None:
        """An empty secret takes nothing out."""
        self._secret = secret.casefold()
        self._word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", re.IGNORECASE)
        self._size = min(self._RUN, len(secret))
        forms = [secret, *_encodings(secret)] if secret else []
        self._runs = {form[i : i + self._size].casefold() for form in forms for i in range(len(form) - self._size + 1)}

    def __call__(self, text: str) -> str:
        """Return the text with `[redacted]` where the secret was."""
        if not self._secret:
            return text
        if self._size < self._SHORT:  # a part of most words
            return self._word.sub(REDACTED, text)
        marks = bytearray(len(text))
        for chars, spans in self._readings(text):
            for i in range(len(chars) - self._size + 1):
                if chars[i : i + self._size] in self._runs:
                    start, end = spans[i][0], spans[i + self._size - 1][1]
                    marks[start:end] = b"\x01" * (end - start)
        for match in self._MASKED.finditer(text):
            if self._is_masked(match[0].casefold()):
                marks[match.start() : match.end()] = b"\x01" * (match.end() - match.start())
        return "".join(
            REDACTED if found[0][0] else text[found.start() : found.end()] for found in re.finditer(rb"\x01+|\x00+", marks)
        )

    def _is_masked(self, word: str) -> bool:
        """Tell whether a word with its middle blotted out begins or ends as the secret does."""
        parts = [part for part in re.split(r"[*.…•]{2,}|…|x{4,}", word.strip("`:")) if part]
        return any(self._secret.startswith(part) or self._secret.endswith(part) for part in parts if len(part) >= 2)

    def _readings(self, text: str) -> Iterable[tuple[str, Sequence[tuple[int, int]]]]:
        """Yield the text and what it says once escapes are read, up to three deep, with the span that each character had."""
        chars, spans = text, [(i, i + 1) for i in range(len(text))]
        for _ in range(4):
            # One character for one, so that spans still fit.
            yield "".join(char if len(low := char.casefold()) != 1 else low for char in chars), spans
            found = list(self._ESCAPE.finditer(chars))
            if not found:
                return
            read, where, at = list[str](), list[tuple[int, int]](), 0
            for match in found:
                read += [chars[at : match.start()], _read(match)]
                where += [*spans[at : match.start()], (spans[match.start()][0], spans[match.end() - 1][1])]
                at = match.end()
            chars, spans = "".join([*read, chars[at:]]), [*where, *spans[at:]]


def _read(match: re.Match[str]) -> str:
    """Return the one character that an escape stands for."""
    unicode, byte, percent, decimal, hexadecimal, entity, itself = match.groups()
    code = unicode or byte or percent or hexadecimal
    if entity:
        plain = html.unescape(entity)
        return plain if len(plain) == 1 else "\ufffd"
    if itself:
        return str(itself)
    number = int(code, 16) if code else int(decimal)
    return chr(number) if number < 0x110000 else "\ufffd"


def _encodings(secret: str) -> list[str]:
    """Return the secret in base64, wherever it may stand in a longer text, and in hexadecimal digits."""
    data = secret.encode("utf-8", "surrogatepass")
    forms = [data.hex()]
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + data).decode("ascii").rstrip("=")
        # The first and last characters depend on what stands beside the secret.
        inner = encoded[0 if before == 0 else before + 1 : len(encoded) if (before + len(data)) % 3 == 0 else -1]
        forms += [inner, inner.translate(str.maketrans("+/", "-_"))]
    return [form for form in forms if form]
