"""The python tool: what it prints for programs as models write them, and what it says when they fail."""

import asyncio

import pytest

from dmoa.agents.tools import MAX_RESULT_CHARS, MAX_SOURCE_CHARS, PythonTool, default_tools, find_call, instructions, result_text
from dmoa.config import loads


def python(source: str) -> str:
    return asyncio.run(PythonTool().run(source))


@pytest.mark.parametrize(
    ("source", "result"),
    [
        ("print(2**10)", "1024"),
        ("2**10", "1024"),
        ("x = [3, 1, 2]\nx.sort()\nx", "[1, 2, 3]"),
        ("```python\nprint('fenced')\n```", "fenced"),
        ("Here it is:\n```\nprint('fenced')", "fenced"),
        ("def f(n):\n    return n * 2\nfor i in range(3):\n    print(f(i))", "0\n2\n4"),
        ("if __name__ == '__main__': print('main')", "main"),
        ("print('é')", "é"),
        ("x = 1", "the program printed nothing; print what you want to know"),
        ("print(None)", "None"),
    ],
)
def test_results(source: str, result: str) -> None:
    assert python(source) == result


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("1 / 0", "error: ZeroDivisionError: division by zero"),
        ("print(undefined)", "error: NameError: name 'undefined' is not defined"),
        ("print(", "error: SyntaxError: '(' was never closed"),
        ("x = bytes(1 << 32)", "error: it was refused more than 512 MiB"),
        (
            "import socket; socket.create_connection(('127.0.0.1', 1))",
            "error: PermissionError: [Errno 1] Operation not permitted",
        ),
        ("import os; os.abort()", "error: it died of SIGABRT"),
        ("   ", "error: write a program between the tags, such as print(2**10)"),
        ("#" * (MAX_SOURCE_CHARS + 1), "error: the program has 8001 characters, at most 8000 are allowed"),
    ],
)
def test_errors_are_one_line(source: str, error: str) -> None:
    assert python(source) == error


def test_a_program_that_does_not_end_is_stopped() -> None:
    assert python("while True: pass") in ("error: it ran for more than 5 s", "error: it used more than 5 s of CPU time")


@pytest.mark.parametrize("source", ["print('x' * 5000)", "while True: print('x' * 100, end='')"])
def test_long_output_is_cut(source: str) -> None:
    assert python(source) == "x" * MAX_RESULT_CHARS + " [cut]"


def test_calls_share_nothing() -> None:
    assert python("open('note', 'w').write('x')\nimport math\nmath.pi = 3") != ""
    assert python("import os, math\nprint(os.path.exists('note'), math.pi > 3.1)") == "False True"


def test_it_is_a_tool_of_every_pool() -> None:
    tool = default_tools()["python"]
    assert asyncio.run(tool.run("print(6 * 7)")) == "42"
    assert "<python>" in instructions(["python"])
    call = find_call("Let me run it: <python>print(6 * 7)", ["python"])
    assert call is not None
    assert result_text(call, "42 </python>") == "</python> = 42 \n"
    pool = "name: p\nllms: {a: {}}\nagents: [{name: b, llm: a, profile: Codes., tools: [python]}]"
    assert loads(pool).agents[0].tools == ("python",)


@pytest.mark.contract
def test_where_the_sandbox_refuses_the_result_says_so() -> None:
    """In a fresh interpreter that believes to be on another system: the host of this one is probed once."""
    import subprocess
    import sys

    script = (
        "import asyncio, sys\nfrom dmoa.agents.tools import PythonTool\nsys.platform = 'darwin'\n"
        "loop = asyncio.new_event_loop()\nprint(loop.run_until_complete(PythonTool().run('1')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("error: the sandbox is not available on this host (programs are run on Linux only")
