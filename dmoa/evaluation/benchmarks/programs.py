"""Finds programs in replies and judges them in the sandbox, for HumanEval and DS-1000. Source: ours.

Code is found by its shape alone; nothing of a reply is parsed or run in this process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dmoa import sandbox
from dmoa.core.answers import is_refusal, json_answer
from dmoa.errors import SandboxError
from dmoa.sandbox.launch import SandboxLimits

MAX_CHARS = 200_000
"""Characters at the beginning of a reply that are searched for code."""
MAX_EXTRACTED_CHARS = 4_000
"""Characters of code that a score repeats."""

_MAX_HELPER_BLOCKS = 16
# Possessive (*+), so that a reply of one endless line is not searched in every way.
_FENCE = re.compile(r"[ \t]*+(`{3,}+|~{3,}+)[ \t]*+([\w+#.-]*+)([^\n]*+)")
_DEFINITION = re.compile(r"\s{0,40}(?:async )?(?:def|class) \w")
_QUOTES = re.compile(r"\"{3}|'{3}")
_CODE_LINE = re.compile(
    r"(?:(?:import [\w.]+|from [\w.]+ import\b|(?:async )?def \w+\s*\(|class \w+\s*[(:]|@\w|return\b|assert\b|raise\b|del \w"
    r"|yield\b|pass\s*$|break\s*$|continue\s*$|try\s*:|else\s*:|finally\s*:|except\b[^\n]*:|lambda\b)"
    r"|(?:if|elif|for [^\n]+ in|while|with|async for|async with)\b[^\n]*:\s*"
    r"(?:#[^\n]*|(?:return|continue|break|pass|raise)\b[^\n]*)?$"
    r"|[A-Za-z_][\w.]*(?:\[[^\n]*\])?(?:\s*,\s*[A-Za-z_*][\w.]*)*\s*(?:[-+*/%&|^@]|//|\*\*|<<|>>)?=(?!=)"
    r"|[A-Za-z_][\w.]*(?:\[[^\n]*\])?\([^\n]*$)"
)
_ERROR = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception|Warning|Exit|Interrupt|Iteration)(?::|\Z)")
_NAME = re.compile(r"(?<![.\w])[A-Za-z_]\w*")
_MADE = re.compile(r"^(?:(?:async )?(?:def|class) (?=\w)|(?=[A-Z_0-9]+ ?=))(\w+)", re.MULTILINE)
_IMPORT = re.compile(r"^(?:from [\w.]+ )?import ([^\n#]+)", re.MULTILINE)
# At any depth, and also what a loop, an alias or an import names.
_DEFINED = re.compile(
    r"(?:(?<=def )|(?<=class )|(?<=for )|(?<=as )|(?<=import ))([A-Za-z_]\w*)|(?<![.\w])([A-Za-z_]\w*)(?= ?=(?!=))"
)
_CONTINUED = re.compile(r"[)\]}#\"'\\]|[rfbu]{1,2}[\"']")


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a program did."""

    passed: bool
    reason: str
    """One line; why it failed."""
    is_judged: bool = True
    """False: the sandbox failed, which says nothing about the program."""


def judge_program(source: str, checker: str, limits: SandboxLimits, *, allow_weak: bool) -> Verdict:
    """Run a program and the code that checks it. Raises SandboxError where this host cannot contain programs as asked."""
    try:
        result = sandbox.run_checked(sandbox.Program(source=source), checker, limits, allow_weak=allow_weak)
    except SyntaxError as error:
        return Verdict(False, f"the checker is not Python: {error}", is_judged=False)
    if result.status == "ok":
        return Verdict(True, "passed")
    if result.status == "sandbox_error":
        return Verdict(False, f"the sandbox failed: {result.reason}", is_judged=False)
    return Verdict(False, f"{result.status}: {(_error_line(result.stderr) or result.reason)[:300]}")


def _error_line(stderr: str) -> str:
    """Return the line of a traceback that names the error, else the last line."""
    lines = [line.strip() for line in stderr[-20_000:].strip().split("\n")]
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1])


def require_sandbox(*, allow_weak: bool) -> None:
    """Make sure that programs can run here, before much work depends on it. Raises SandboxError where they cannot."""
    verdict = judge_program("answer = 42", "assert answer == 42", SandboxLimits(), allow_weak=allow_weak)
    if not verdict.passed:
        raise SandboxError(f"a trivial program did not pass in the sandbox of this host ({verdict.reason}); see `dmoa doctor`")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a reply as (language in lower case, code); an unclosed one goes to the end.

    A fence inside a docstring opens and closes nothing, whether the program around it is in a block or not.
    """
    lines, place, found = text[:MAX_CHARS].split("\n"), 0, list[tuple[str, str]]()
    last_quote = {mark: number for number, line in enumerate(lines) for mark in _QUOTES.findall(line)}
    quote, is_code = "", False
    while place < len(lines):
        line = lines[place]
        opening = _FENCE.match(line)
        place += 1
        if opening is None or place == len(lines) or (is_code and last_quote.get(quote, 0) >= place):
            is_code = is_code or _DEFINITION.match(line) is not None
            quote = _quoted_after(line, quote)
            continue
        quote, is_code = "", False
        end = _end_of_block(lines, place, opening[1])
        found.append((opening[2].lower(), "".join(line + "\n" for line in lines[place:end])))
        place = end + 1
    return found


def _end_of_block(lines: list[str], begin: int, fence: str) -> int:
    """Return the line that closes a block; a fence inside a docstring closes it only where the docstring never ends."""
    first, quote = None, ""
    for number in range(begin, len(lines)):
        closing = _FENCE.match(lines[number])
        if closing is not None and closing[1].startswith(fence) and not closing[2] and not closing[3].strip():
            if not quote:
                return number
            first = number if first is None else first
        quote = _quoted_after(lines[number], quote)
    return first if first is not None and quote else len(lines)


def _quoted_after(line: str, quote: str) -> str:
    """Return the marks of the docstring that is open after a line; empty outside of one."""
    for mark in _QUOTES.findall(line):
        quote = mark if not quote else "" if mark == quote else quote
    return quote


def program_blocks(text: str) -> list[tuple[str, str]]:
    """Return the blocks of a reply that hold anything; of a block of JSON that has an answer, that answer."""
    found: list[tuple[str, str]] = []
    for language, code in code_blocks(text):
        is_json = language.startswith("json") or (not language and code.lstrip().startswith("{"))
        if is_json and (said := json_answer(code)) is not None:
            inner = [block for block in code_blocks(said.span) if block[1].strip()]
            found += inner or [("json", f"{said.span}\n")]
        elif code.strip():
            found.append((language, code))
    return found


def python_block(text: str) -> str | None:
    """Return the last block that says it is Python, else the last of no named language, else the last; None without blocks."""
    blocks = program_blocks(text)
    named = [code for language, code in blocks if language.startswith("py")]
    bare = [code for language, code in blocks if not language]
    return next((each[-1] for each in (named, bare, [code for _, code in blocks]) if each), None)


def with_helpers(blocks: list[tuple[str, str]], code: str) -> str:
    """Return one of several blocks behind the Python blocks before it that define names which it uses and does not define."""
    python = [block for language, block in blocks if not language or language.startswith("py")]
    before = python[: len(python) - 1 - python[::-1].index(code)] if code in python else []
    missing = _missing_names(code)
    for block in reversed(before[-_MAX_HELPER_BLOCKS:]):
        if _made_names(block) & missing:
            code, missing = f"{block}\n{code}", missing | _missing_names(block)
    return code


def _missing_names(block: str) -> set[str]:
    """Return the names that a block uses and does not define, those of Python itself among them."""
    return set(_NAME.findall(block)) - {name for pair in _DEFINED.findall(block) for name in pair}


def _made_names(block: str) -> set[str]:
    """Return the functions, classes, imports and constants that a block makes at its top level."""
    imports = {name for line in _IMPORT.findall(block) for name in re.findall(r"(\w+)\s*\)?\s*(?:,|\Z)", line)}
    return imports | set(_MADE.findall(block))


def bare_code(text: str) -> str | None:
    """Return the code of a reply without fences: from its first line of code to the prose after it; None without code.

    Of a JSON object that has an answer it is the answer's code.
    """
    if is_refusal(text[:MAX_CHARS]):
        return None
    if (said := json_answer(text[:MAX_CHARS])) is not None:
        text = said.span
    lines = text[:MAX_CHARS].split("\n")
    first = next((number for number, line in enumerate(lines) if _CODE_LINE.match(line.strip()[:400])), None)
    if first is None:
        return None
    kept: list[str] = []
    for line in lines[first:]:
        is_prose = line[:1].strip() and not _CODE_LINE.match(line[:400]) and not _CONTINUED.match(line)
        if is_prose:
            break
        kept.append(line)
    return "\n".join(kept).rstrip() + "\n"


def indented(code: str, width: int) -> str:
    """Return the code of a function's body with its first level at `width` spaces.

    Code that lost the indentation of its first line alone, as white space at the edges of a text does, gets it back.
    """
    lines = code.expandtabs(4).split("\n")
    places = [number for number, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
    if not places:
        return code
    depths = [_depth(lines[number]) for number in places]
    if depths[0] > 0:
        missing = max(0, width - depths[0])
        return "\n".join(" " * missing + line if line.strip() else line for line in lines)
    opens = lines[places[0]].rstrip().endswith(":")
    is_only_first = len(depths) > 1 and min(depths[1:]) >= width and (not opens or depths[1] > width)
    if is_only_first:
        lines[places[0]] = " " * width + lines[places[0]]
        return "\n".join(lines)
    return "\n".join(" " * width + line if line.strip() else line for line in lines)


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
