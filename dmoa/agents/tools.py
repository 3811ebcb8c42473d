"""The tools of agents: `calculator`, `search` in a corpus, and `python` in the sandbox; and how a call is found in a reply.

`agents/agent` runs the calls between the rounds of a contribution.
"""

from __future__ import annotations

import ast
import asyncio
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from simpleeval import InvalidExpression, SimpleEval

from dmoa import sandbox
from dmoa.errors import ConfigError, SandboxError
from dmoa.reading import lines_of, read_json, regular
from dmoa.sandbox.launch import SandboxLimits

LIMITS = SandboxLimits(wall_s=5.0, cpu_s=5, memory_bytes=512 << 20, processes=16, output_bytes=16 << 10)
MAX_SOURCE_CHARS = 8000
MAX_RESULT_CHARS = 1000
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
# As at the prompt, the value of a last expression is shown; parsed inside, because parsing is work for a program's limits.
_RUNNER = """
import ast
tree = ast.parse(open("snippet.py", encoding="utf-8").read(), "snippet.py")
last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
names = {"__name__": "__main__"}
exec(compile(tree, "snippet.py", "exec"), names)
if last is not None:
    value = eval(compile(ast.Expression(last.value), "snippet.py", "eval"), names)
    if value is not None:
        print(value)
"""

MAX_EXPRESSION_CHARS = 400
MAX_RESULT_DIGITS = 100
_MAX_POWER_BITS = 4096
_MAX_ROUND_DIGITS = 15
_MAX_PASSAGES = 3
_MAX_PASSAGE_CHARS = 500
_RESULT = " = "


class PythonTool:
    """Runs a Python program without network, files or memory of earlier calls."""

    name = "python"
    description = "To run Python, write <python>print(sorted([3, 1, 2]))</python>; what it prints follows."

    async def run(self, argument: str) -> str:
        """Return what the program printed, cut at 1000 characters, or `error: ...`."""
        fenced = _FENCE.search(argument)
        source = fenced[1] if fenced else argument
        if not source.strip():
            return "error: write a program between the tags, such as print(2**10)"
        if len(source) > MAX_SOURCE_CHARS:
            return f"error: the program has {len(source)} characters, at most {MAX_SOURCE_CHARS} are allowed"
        program = sandbox.Program(source=_RUNNER, files={"snippet.py": source})
        try:
            result = await asyncio.to_thread(sandbox.run, program, LIMITS)
        except SandboxError as error:
            return f"error: {_one_line(str(error))}"
        return _text(result)


def _text(result: sandbox.SandboxResult) -> str:
    if result.status == "sandbox_error":
        return f"error: the sandbox failed: {_one_line(result.reason)}"
    if result.status in ("ok", "output_limit"):
        printed = result.stdout.strip()
        if len(printed) > MAX_RESULT_CHARS:
            return f"{printed[:MAX_RESULT_CHARS]} [cut]"
        return printed or "the program printed nothing; print what you want to know"
    lines = result.stderr.strip().splitlines()
    return f"error: {_one_line(lines[-1] if result.status == 'failed' and lines else result.reason)}"


def _one_line(text: str, most: int = 200) -> str:
    return " ".join(text.split())[:most]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call found in a reply."""

    tool: str
    argument: str
    before: str
    """The reply up to the call's closing tag: `before + result_text(...)` is where the model goes on."""


class Calculator:
    """Arithmetic on numbers: + - * / // % **, parentheses, a few functions, pi and e."""

    name = "calculator"
    description = "To calculate, write <calculator>12*7</calculator>; the result follows."

    async def run(self, argument: str) -> str:
        """Return the value, or `error: ...`. Whole numbers stay exact; others have up to 12 digits."""
        try:
            return _format(_evaluate(_normalise(argument)))
        except (InvalidExpression, SyntaxError, ArithmeticError, ValueError, TypeError, RecursionError, MemoryError) as error:
            reason = "division by zero" if isinstance(error, ZeroDivisionError) else str(error) or type(error).__name__
            return f"error: {' '.join(reason.split())[:160]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A piece of a corpus."""

    title: str
    text: str


class Search:
    """Search over a corpus; without one it says so."""

    name = "search"
    description = "To look up facts, write <search>words to look for</search>; passages follow."

    def __init__(self, corpus: Bm25Corpus | None) -> None:
        self._corpus = corpus

    async def run(self, argument: str) -> str:
        """Return the best passages, a line each, or `error: ...`."""
        if self._corpus is None:
            return "error: this pool has no search corpus"
        if not argument.strip():
            return "error: write the words to look for between the tags"
        passages = self._corpus.search(argument, _MAX_PASSAGES)
        if not passages:
            return "no passage matches"
        return "\n".join(f"[{_one_line(p.title)}] {_one_line(p.text, _MAX_PASSAGE_CHARS)}" for p in passages)


class Bm25Corpus:
    """A corpus in memory, ranked by BM25 (Lucene's variant, English stop words)."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        """Index the passages. Raises ConfigError if there is none with a word in it."""
        import bm25s

        self._passages = tuple(passages)
        self._tokenize = bm25s.tokenize
        words = self._words([f"{p.title} {p.text}" for p in self._passages])
        if not any(words):
            raise ConfigError("search corpus: no passage has a word to search by; give at least one with title and text")
        self._index = bm25s.BM25()
        self._index.index(words, show_progress=False)

    @classmethod
    def load(cls, path: str | Path) -> Bm25Corpus:
        """Read JSON Lines of {"title", "text"}. Raises ConfigError naming file, line and field."""
        where = f"search corpus: {path}, line"
        try:
            # Not splitlines: texts may hold other line separators, which JSON does not escape.
            with open(path, encoding="utf-8", opener=regular) as file:
                lines = enumerate(lines_of(file, path), 1)
                return cls([_passage(line, f"{where} {number}") for number, line in lines if line.strip()])
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"search corpus: cannot read {str(path)!r}: {error}; give a JSON Lines file") from error

    def search(self, query: str, k: int) -> list[Passage]:
        """Return the k passages with the highest BM25 score above 0, ties by their order in the corpus."""
        words = [word for word in self._words([query])[0] if word in self._index.vocab_dict]
        if not words:
            return []
        score_N = np.asarray(self._index.get_scores(words))  # N passages
        best = np.argsort(-score_N, kind="stable")[:k]
        return [self._passages[i] for i in best if score_N[i] > 0]

    def _words(self, texts: list[str]) -> list[list[str]]:
        words: list[list[str]] = self._tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
        return words


Tool = Calculator | Search | PythonTool
"""What turns the text of a call into the text of a result; none raises. `name` is the tag that calls it."""
_BUILTIN = (Calculator, Search, PythonTool)
_TAG = re.compile(f"</?(?:{'|'.join(tool.name for tool in _BUILTIN)})>")


def default_tools(corpus: str | Path | None = None) -> dict[str, Tool]:
    """Return every tool by name; `corpus` is a JSON Lines file for search. Raises ConfigError for a bad corpus."""
    tools: tuple[Tool, ...] = (Calculator(), Search(Bm25Corpus.load(corpus) if corpus is not None else None), PythonTool())
    return {tool.name: tool for tool in tools}


def instructions(tools: Iterable[str]) -> str:
    """Return what an agent's prompt says about the named tools: one short sentence each."""
    wanted = set(tools)
    return " ".join(tool.description for tool in _BUILTIN if tool.name in wanted)


def stop_strings(tools: Iterable[str]) -> tuple[str, ...]:
    """Return the closing tags of the named tools: where generation must stop."""
    return tuple(f"</{name}>" for name in tools)


def find_call(text: str, tools: Collection[str]) -> ToolCall | None:
    """Return the first call in a reply that has no result yet; engines drop the closing tag at which they stopped."""
    if not tools:
        return None
    names = "|".join(re.escape(name) for name in tools)
    for match in re.finditer(rf"<({names})>(.*?)(</\1>|\Z)", text, re.DOTALL):
        is_answered = match[3] and text.startswith(_RESULT, match.end())
        if not is_answered:
            return ToolCall(tool=match[1], argument=match[2].strip(), before=text[: match.end(2)])
    return None


def result_text(call: ToolCall, result: str) -> str:
    """Return how a reply goes on behind `call.before`: closing tag, result, new line. Tags in the result are dropped."""
    # Again, because what is left around a tag may be one.
    while _TAG.search(result):
        result = _TAG.sub("", result)
    return f"</{call.tool}>{_RESULT}{result}\n"


def _passage(line: str, where: str) -> Passage:
    try:
        row = read_json(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}; write one object with title and text per line") from error
    for field in ("title", "text"):
        seen = row.get(field) if isinstance(row, dict) else row
        if not isinstance(seen, str):
            raise ConfigError(f"{where}: {field} is {str(seen)[:80]!r}, must be a text; write an object with title and text")
    return Passage(title=row["title"], text=row["text"])


def _root(x: float) -> float:
    return math.isqrt(x) if isinstance(x, int) and x >= 0 and math.isqrt(x) ** 2 == x else math.sqrt(x)


def _round(x: float, digits: int = 0) -> float:
    if abs(digits) > _MAX_ROUND_DIGITS:
        raise ValueError(f"round to at most {_MAX_ROUND_DIGITS} digits")
    return round(x, digits) if digits > 0 else int(round(x, digits))


def _divide(a: float, b: float) -> float:
    """Divide; whole numbers that divide evenly give a whole number."""
    return a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b


def _power(a: float, b: float) -> float:
    if isinstance(a, int) and isinstance(b, int) and b > 0 and a.bit_length() * b > _MAX_POWER_BITS:
        raise ValueError("the power is too large")
    result = a**b
    if isinstance(result, complex):
        raise ValueError("the power is not a real number")
    return float(result) if isinstance(result, float) else int(result)


_FUNCTIONS: dict[str, Callable[..., float]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": _round,
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": _root,
    "log": math.log,
    "log10": math.log10,
    "exp": math.exp,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
_NAMES = {"pi": math.pi, "e": math.e}
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: _divide,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: _power,
    ast.USub: lambda a: -a,
    ast.UAdd: lambda a: +a,
}
_NODES = (ast.Expr, ast.UnaryOp, ast.BinOp, ast.Call, ast.Name, ast.Constant)
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NAME = "|".join(sorted([*_FUNCTIONS, *_NAMES], key=len, reverse=True))
_TOKENS = re.compile(rf"(?:{_NUMBER}(?![\w.])|(?:{_NAME})(?!\w)|[-+*/%(), ])+")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "$": "", "€": "", "£": ""})  # noqa: RUF001


def _normalise(argument: str) -> str:
    """Return what models write as a Python expression; 1,200 is a number, but among a function's arguments. Raises ValueError."""
    if len(argument) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"the expression has {len(argument)} characters, at most {MAX_EXPRESSION_CHARS} are allowed")
    text = " ".join(argument.translate(_SIGNS).split()).rstrip("=? ")
    text = re.sub(r"(?<=[\d)])\s*[xX]\s*(?=[\d(.])", "*", text)
    if not re.search(r"[a-z]\(", text):
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"(?<![\w.])0+(?=\d)", "", text)
    if not text:
        raise ValueError("write an expression between the tags, such as 12*7")
    if not text.isascii() or not _TOKENS.fullmatch(text):
        raise ValueError(f"only numbers, + - * / // % **, parentheses, {', '.join([*_FUNCTIONS, *_NAMES])} are allowed")
    return text


def _evaluate(expression: str) -> float:
    evaluator = SimpleEval(operators=_OPERATORS, functions=_FUNCTIONS, names=_NAMES)
    evaluator.nodes = {node: handler for node, handler in evaluator.nodes.items() if node in _NODES}
    value = evaluator.eval(expression)
    if not isinstance(value, int | float):
        raise TypeError("the expression has no number as its value")
    return value


def _format(value: float) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OverflowError("the result is too large")
        if not value.is_integer() or abs(value) >= 1e15:
            return f"{value:.12g}"
        value = int(value)
    if abs(value) >= 10**MAX_RESULT_DIGITS:
        raise OverflowError(f"the result has more than {MAX_RESULT_DIGITS} digits")
    return str(value)
