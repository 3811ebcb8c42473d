"""The `python` tool: a short program of an agent runs in the sandbox, what it prints is the result."""

from __future__ import annotations

import asyncio
import re

from dmoa import sandbox
from dmoa.errors import SandboxError

LIMITS = sandbox.SandboxLimits(wall_s=5.0, cpu_s=5, memory_bytes=512 << 20, processes=16, output_bytes=16 << 10)
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


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
