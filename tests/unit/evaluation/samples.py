"""Invented rows of every benchmark, in upstream's fields, and helpers that write them to a data folder."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EVIDENCES: dict[str, Any] = {
    "E_1": {
        "question_en": "Do you have hiccups?",
        "is_antecedent": False,
        "data_type": "B",
        "default_value": 0,
        "possible-values": [],
        "value_meaning": {},
    },
    "E_2": {
        "question_en": "Where does it itch?",
        "is_antecedent": False,
        "data_type": "M",
        "default_value": "V_0",
        "possible-values": ["V_0", "V_1", "V_2"],
        "value_meaning": {"V_0": {"en": "nowhere"}, "V_1": {"en": "elbow(L)"}, "V_2": {"en": "chin"}},
    },
    "E_3": {
        "question_en": "How loud is it?",
        "is_antecedent": False,
        "data_type": "C",
        "default_value": 0,
        "possible-values": [0, 1, 2, 3, 4, 5],
        "value_meaning": {},
    },
    "E_4": {
        "question_en": "Have you been on a boat?",
        "is_antecedent": True,
        "data_type": "C",
        "default_value": "V_5",
        "possible-values": ["V_5", "V_6", "V_7"],
        "value_meaning": {"V_5": {"en": "N"}, "V_6": {"en": "Y"}, "V_7": {"en": "NA"}},
    },
}
CONDITIONS: dict[str, Any] = {"Green spots": {"severity": 1}, "Loud hiccups": {"severity": 2}, "Sea legs": {"severity": 3}}

ROWS: dict[str, dict[str, Any]] = {
    "mmlu": {"question": "Which is a prime?", "subject": "number_games", "choices": ["4", "6", "7", "9"], "answer": 2},
    "gsm8k": {"question": "Ada has 3 pots with 4 plums each. How many plums?", "answer": "3*4=<<3*4=12>>12 plums\n#### 1,012.50"},
    "multiarith": {"question": "Bo had 9 kites and lost 2. How many are left?", "final_ans": "7"},
    "svamp": {
        "ID": "made-1",
        "Body": "Cy owns 8 bells and 3 horns",
        "Question": "How many more bells than horns?",
        "Equation": "( 8.0 - 3.0 )",
        "Answer": "5.0",
        "Type": "Subtraction",
        "question_concat": "unused",
    },
    "aqua_rat": {
        "question": "If 2x = 10, what is x?",
        "options": ["A)1", "B)3", "C) 5", "D)7", "E)none of these"],
        "rationale": "Halving the secret ten gives five.",
        "correct": "C",
    },
    "humaneval": {
        "task_id": "Made/0",
        "prompt": 'def twice(x: int) -> int:\n    """Double x."""\n',
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        "entry_point": "twice",
    },
    "ds1000": {
        "prompt": "Problem:\nSum the frame.\nA:\n<code>\nimport pandas as pd\n</code>\nBEGIN SOLUTION\n<code>\n",
        "reference_code": "result = df.sum().sum()",
        "metadata": {
            "problem_id": 5000,
            "library_problem_id": 5000,
            "library": "Pandas",
            "test_case_cnt": 1,
            "perturbation_type": "Origin",
            "perturbation_origin_id": 4999,
        },
        "code_context": "def test_execution(solution):\n    assert 'sum' in solution\n",
    },
    "hotpotqa": {
        "id": "made",
        "question": "Who built the tower that Dee painted?",
        "answer": "Eve Example",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": {"title": ["Tower"], "sent_id": [1]},
        "context": {
            "title": ["Dee", "Tower"],
            "sentences": [["Dee is a painter.", " She painted the tower."], [" The tower is tall.", "Eve Example built it."]],
        },
    },
    "ddxplus": {
        "AGE": 40,
        "DIFFERENTIAL_DIAGNOSIS": "[['Loud hiccups', 0.75], ['Sea legs', 0.25]]",
        "SEX": "F",
        "PATHOLOGY": "Loud hiccups",
        "EVIDENCES": "['E_1', 'E_2_@_V_0', 'E_2_@_V_2', 'E_2_@_V_1', 'E_3_@_4', 'E_4_@_V_6']",
        "INITIAL_EVIDENCE": "E_1",
    },
    "cruxeval_o": {"id": "made_1", "code": "def f(x):\n    return x[::-1]", "input": "[1, 'a']", "output": "['a', 1]"},
    "math": {
        "problem": "What is half of $\\pi$?",
        "level": "Level 5",
        "type": "Geometry",
        "solution": "Halving gives $\\boxed{\\frac{\\pi}{2}}$.",
    },
}
"""One row per benchmark."""


def row(name: str, **changes: Any) -> dict[str, Any]:
    """The benchmark's row with some fields replaced."""
    return {**copy.deepcopy(ROWS[name]), **changes}


def write_lines(path: Path, lines: Iterable[str | bytes]) -> Path:
    """The lines as a file, gzip if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def write_rows(data_dir: Path, name: str, file: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """The rows as a file of the benchmark's folder, with the definitions where it needs them."""
    path = write_lines(data_dir / name / file, [json.dumps(fields, ensure_ascii=False) for fields in rows])
    if name == "ddxplus":
        (path.parent / "release_evidences.json").write_text(json.dumps(EVIDENCES), encoding="utf-8")
        (path.parent / "release_conditions.json").write_text(json.dumps(CONDITIONS), encoding="utf-8")
    return path
