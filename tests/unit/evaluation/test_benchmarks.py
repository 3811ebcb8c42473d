"""Rows into prompts and labels: exact renderings, what a label may not change, what is refused, the row hash."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks import ddxplus
from dmoa.evaluation.benchmarks.base import BENCHMARKS, ParsedRow, RowError, fraction_of, hash_content, normalise
from dmoa.evaluation.benchmarks.word_problems import canonical_number
from dmoa.evaluation.registry import spec_of
from tests.unit.evaluation.samples import CONDITIONS, EVIDENCES, ROWS, row

DEFINITIONS = ddxplus.Definitions(
    evidences={code: ddxplus.EvidenceDefinition.model_validate(fields) for code, fields in EVIDENCES.items()},
    conditions=list(CONDITIONS),
)
PROMPTS = {
    "mmlu": """\
Answer the multiple-choice question about number games. End with a line `Answer: X`, X one letter.

Question: Which is a prime?
A) 4
B) 6
C) 7
D) 9""",
    "gsm8k": """\
Solve the arithmetic problem. End with a line `Answer: N`, N one number.

Problem: Ada has 3 pots with 4 plums each. How many plums?""",
    "multiarith": """\
Solve the arithmetic problem. End with a line `Answer: N`, N one number.

Problem: Bo had 9 kites and lost 2. How many are left?""",
    "svamp": """\
Solve the arithmetic problem. End with a line `Answer: N`, N one number.

Problem: Cy owns 8 bells and 3 horns How many more bells than horns?""",
    "aqua_rat": """\
Answer the multiple-choice algebra question. End with a line `Answer: X`, X one letter.

Question: If 2x = 10, what is x?
A) 1
B) 3
C) 5
D) 7
E) none of these""",
    "humaneval": '''\
Complete the Python function. Reply with one Python code block that holds the whole function.

```python
def twice(x: int) -> int:
    """Double x."""
```''',
    "ds1000": """\
Complete the Python program where its solution begins. Reply with one Python code block: only the code that completes the program.

Problem:
Sum the frame.
A:
<code>
import pandas as pd
</code>
BEGIN SOLUTION
<code>
""",
    "hotpotqa": """\
Answer the question from the paragraphs. End with a line `Answer: ...`, a few words or yes or no.

Title: Dee
Dee is a painter. She painted the tower.

Title: Tower
The tower is tall. Eve Example built it.

Question: Who built the tower that Dee painted?""",
    "ddxplus": """\
Diagnose the patient. End with a line `Diagnosis: NAME`, the likeliest condition, and a line `Differential: NAME; NAME; ...`, \
all that are possible, likeliest first, names from the list.

Conditions: Green spots; Loud hiccups; Sea legs

Age: 40
Sex: female

Initial complaint: Do you have hiccups? yes

Symptoms:
- Do you have hiccups? yes
- Where does it itch? chin, elbow(L)
- How loud is it? 4 on a scale of 0 to 5

Antecedents:
- Have you been on a boat? yes

Everything that is not listed is absent.""",
    "cruxeval_o": """\
Complete the assertion with the Python literal that the function returns, even if the function is wrong. \
End with a line `Answer: X`, X the literal.

```python
def f(x):
    return x[::-1]
assert f([1, 'a']) == ??
```""",
    "math": """\
Solve the problem. End with the final answer in \\boxed{}.

Problem: What is half of $\\pi$?""",
}
GOLD: dict[str, dict[str, Any]] = {
    "mmlu": {"letter": "C", "choices": ["4", "6", "7", "9"]},
    "gsm8k": {"number": "1012.5"},
    "multiarith": {"number": "7"},
    "svamp": {"number": "5"},
    "aqua_rat": {"letter": "C", "choices": ["1", "3", "5", "7", "none of these"]},
    "humaneval": {key: ROWS["humaneval"][key] for key in ("prompt", "canonical_solution", "test", "entry_point")},
    "ds1000": {
        "code_context": ROWS["ds1000"]["code_context"],
        "reference_code": "result = df.sum().sum()",
        "library": "Pandas",
        "prompt": ROWS["ds1000"]["prompt"],
        "problem_id": 5000,
    },
    "hotpotqa": {"answer": "Eve Example"},
    "ddxplus": {
        "pathology": "Loud hiccups",
        "differential": [["Loud hiccups", 0.75], ["Sea legs", 0.25]],
        "conditions": ["Green spots", "Loud hiccups", "Sea legs"],
    },
    "cruxeval_o": {"output": "['a', 1]"},
    "math": {"answer": "\\frac{\\pi}{2}"},
}
GROUPS = {"mmlu": "number_games", "math": "Geometry", "ds1000": "Pandas", "hotpotqa": "bridge"}

# What is right, and why, under other values: the prompt must not notice.
OTHER_LABELS: dict[str, dict[str, Any]] = {
    "mmlu": {"answer": 0},
    "gsm8k": {"answer": "no idea\n#### 3"},
    "multiarith": {"final_ans": "1"},
    "svamp": {"ID": "x", "Equation": "y", "Answer": "1", "Type": "z", "question_concat": "w"},
    "aqua_rat": {"rationale": "other", "correct": "E"},
    "humaneval": {"task_id": "x", "canonical_solution": "    pass", "test": "def check(c): pass", "entry_point": "other"},
    "ds1000": {"reference_code": "x", "code_context": "y", "metadata": {**ROWS["ds1000"]["metadata"], "problem_id": 1}},
    "hotpotqa": {"id": "x", "answer": "y", "type": "z", "level": "w", "supporting_facts": {"title": [], "sent_id": []}},
    "ddxplus": {"PATHOLOGY": "Sea legs", "DIFFERENTIAL_DIAGNOSIS": "[['Sea legs', 1.0]]"},
    "cruxeval_o": {"id": "x", "output": "2"},
    "math": {"level": "x", "type": "y", "solution": "$\\boxed{3}$"},
}


def parse(name: str, **changes: Any) -> ParsedRow:
    return BENCHMARKS[name].parse(row(name, **changes), DEFINITIONS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_row_becomes_this_prompt_and_this_label(name: str) -> None:
    parsed = parse(name)
    assert parsed.text == PROMPTS[name]
    assert parsed.gold == GOLD[name]
    assert json.loads(json.dumps(parsed.gold)) == parsed.gold
    assert parsed.group == GROUPS.get(name, "")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_prompt_does_not_depend_on_the_label(name: str) -> None:
    other = parse(name, **OTHER_LABELS[name])
    assert other.gold != GOLD[name]
    assert other.text == PROMPTS[name]
    assert hash_content(other.content) != hash_content(parse(name).content)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_field_that_is_no_name_counts_in_the_hash(name: str) -> None:
    names = {
        "svamp": {"ID", "question_concat"},
        "humaneval": {"task_id"},
        "hotpotqa": {"id"},
        "ds1000": {"metadata"},
        "cruxeval_o": {"id"},
    }
    assert set(ROWS[name]) - names.get(name, set()) <= set(parse(name).content)


def test_one_row_under_two_names_is_one_row() -> None:
    assert hash_content(parse("svamp", ID="other").content) == hash_content(parse("svamp").content)
    renamed = {**ROWS["ds1000"]["metadata"], "problem_id": 1, "perturbation_origin_id": 2}
    assert hash_content(parse("ds1000", metadata=renamed).content) == hash_content(parse("ds1000").content)
    moved = {**ROWS["ds1000"]["metadata"], "library": "Numpy"}
    assert hash_content(parse("ds1000", metadata=moved).content) != hash_content(parse("ds1000").content)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_or_ill_typed_field_is_named(name: str) -> None:
    unread = {"question_concat"}
    for field in set(ROWS[name]) - unread:
        without = {key: value for key, value in row(name).items() if key != field}
        with pytest.raises(RowError, match=rf"field `{field}`: saw nothing; there are \['.*expected this field"):
            BENCHMARKS[name].parse(without, DEFINITIONS)
        with pytest.raises(RowError, match=rf"field `{field}`: saw \{{'odd': 1\}}"):
            parse(name, **{field: {"odd": 1}}) if field not in ("metadata", "context", "supporting_facts") else parse_odd(
                name, field
            )


def parse_odd(name: str, field: str) -> None:
    # These are objects: what is odd is inside.
    try:
        parse(name, **{field: [{"odd": 1}]})
    except RowError as error:
        raise RowError(error.field, "{'odd': 1}", "") from error


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mmlu", {"choices": ["1", "2", "3"]}, "field `choices`.*at least 4 items"),
        ("mmlu", {"choices": ["1", "2", "3", "4", "5"]}, "field `choices`.*at most 4 items"),
        ("mmlu", {"choices": ["1", "2", "3", 4]}, "field `choices.3`: saw 4; expected a valid string"),
        ("mmlu", {"answer": 4}, "field `answer`: saw 4; expected less than or equal to 3"),
        ("mmlu", {"answer": True}, "field `answer`: saw True; expected a valid integer"),
        ("mmlu", {"question": " \n"}, "field `question`.*not blank"),
        ("gsm8k", {"answer": "twelve"}, "field `answer`: saw 'twelve'; expected a worked solution that ends in `#### N`"),
        ("gsm8k", {"answer": "so\n#### a dozen"}, "field `answer`.*a number such as"),
        ("multiarith", {"final_ans": "1/0"}, "field `final_ans`: saw '1/0'; expected a number such as"),
        ("svamp", {"Answer": "nan"}, "field `Answer`: saw 'nan'; expected a number such as"),
        ("svamp", {"Answer": True}, "field `Answer`: saw True; expected a valid string"),
        ("aqua_rat", {"correct": "F"}, "field `correct`: saw 'F'; expected 'A', 'B', 'C', 'D' or 'E'"),
        ("aqua_rat", {"options": ["A)1", "B)2"]}, "field `options`.*five options, not 2"),
        ("aqua_rat", {"options": ["A)1", "C)2", "B)3", "D)4", "E)5"]}, "the one for B is 'C.2'"),
        ("humaneval", {"entry_point": "not a name"}, "field `entry_point`.*name of a Python function"),
        ("ds1000", {"metadata": {"library": "Pandas"}}, "field `metadata.problem_id`: saw nothing"),
        ("cruxeval_o", {"output": "f(2)"}, "field `output`: saw 'f\\(2\\)'; expected a Python literal such as"),
        ("math", {"solution": "It is 3."}, r"field `solution`.*a solution with its answer in .boxed"),
        ("hotpotqa", {"context": {"title": ["a"], "sentences": []}}, "field `context`.*there are 0 and 1"),
        ("hotpotqa", {"supporting_facts": {"title": ["a"], "sent_id": ["0"]}}, "field `supporting_facts.sent_id.0`: saw '0'"),
        ("ddxplus", {"PATHOLOGY": "Hoquet"}, "field `PATHOLOGY`: saw 'Hoquet'; expected one of the 3 conditions .*French"),
        ("ddxplus", {"DIFFERENTIAL_DIAGNOSIS": "[['Hoquet', 1.0]]"}, "field `DIFFERENTIAL_DIAGNOSIS`: saw 'Hoquet'"),
        ("ddxplus", {"DIFFERENTIAL_DIAGNOSIS": "[['Sea legs', 7]]"}, "field `DIFFERENTIAL_DIAGNOSIS.0.1`: saw 7"),
        ("ddxplus", {"DIFFERENTIAL_DIAGNOSIS": "__import__('os')"}, "field `DIFFERENTIAL_DIAGNOSIS`.*a Python list"),
        ("ddxplus", {"EVIDENCES": "[" * 5000}, "field `EVIDENCES`.*a Python list"),
        ("ddxplus", {"EVIDENCES": "[]"}, "field `EVIDENCES`.*at least 1 item"),
        ("ddxplus", {"EVIDENCES": "['E_9']"}, "field `EVIDENCES`: saw 'E_9'; expected a code of release_evidences.json"),
        ("ddxplus", {"EVIDENCES": "['E_1_@_V_1']"}, "saw 'E_1_@_V_1'; expected E_1 alone"),
        ("ddxplus", {"EVIDENCES": "['E_3_@_9']"}, r"saw 'E_3_@_9'; expected E_3_@_ and one of \[0, 1, 2, 3, 4, 5\]"),
        ("ddxplus", {"EVIDENCES": "['E_2']"}, "saw 'E_2'; expected E_2_@_ and one of"),
        ("ddxplus", {"INITIAL_EVIDENCE": "E_9"}, "field `INITIAL_EVIDENCE`: saw 'E_9'"),
        ("ddxplus", {"SEX": "X"}, "field `SEX`: saw 'X'; expected 'F' or 'M'"),
        ("ddxplus", {"AGE": -1}, "field `AGE`: saw -1"),
    ],
)
def test_what_a_row_may_not_say(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse(name, **changes)


def test_ddxplus_takes_real_lists_as_well_as_python_literals() -> None:
    fields = row("ddxplus")
    lists = parse(
        "ddxplus",
        EVIDENCES=["E_1", "E_2_@_V_0", "E_2_@_V_2", "E_2_@_V_1", "E_3_@_4", "E_4_@_V_6"],
        DIFFERENTIAL_DIAGNOSIS=[["Loud hiccups", 0.75], ["Sea legs", 0.25]],
    )
    literals = BENCHMARKS["ddxplus"].parse(fields, DEFINITIONS)
    assert lists == literals
    assert hash_content(lists.content) == hash_content(literals.content)


@pytest.mark.parametrize(
    ("codes", "lines"),
    [
        ("['E_2_@_V_0']", ["Symptoms:", "- Where does it itch? nowhere"]),
        ("['E_3_@_0']", ["Symptoms:", "- How loud is it? 0 on a scale of 0 to 5"]),
        ("['E_4_@_V_5']", ["Antecedents:", "- Have you been on a boat? no"]),
        ("['E_1', 'E_1']", ["Symptoms:", "- Do you have hiccups? yes"]),
        ("['E_4_@_V_7']", []),
    ],
)
def test_ddxplus_defaults_and_answers_that_do_not_apply(codes: str, lines: list[str]) -> None:
    text = parse("ddxplus", EVIDENCES=codes).text
    findings = text.split("Initial complaint: Do you have hiccups? yes\n\n")[1].removesuffix(
        "Everything that is not listed is absent."
    )
    assert findings.split("\n") == ([*lines, "", ""] if lines else [""])


@pytest.mark.parametrize(
    ("evidences", "conditions", "message"),
    [
        ("{", json.dumps(CONDITIONS), "release_evidences.json is not JSON"),
        ('{"E_1": {}}', json.dumps(CONDITIONS), "release_evidences.json, `E_1.question_en`"),
        (json.dumps(EVIDENCES), "[]", "release_conditions.json, ``: saw \\[\\]"),
        (json.dumps(EVIDENCES), "{}", "holds no conditions"),
        (json.dumps(EVIDENCES), '{"a; b": {}}', "condition 'a; b' is blank or holds `;`"),
        (
            json.dumps(EVIDENCES).replace('"en": "chin"', '"fr": "menton"'),
            json.dumps(CONDITIONS),
            "E_2 has a value without English",
        ),
    ],
)
def test_bad_definitions_are_refused(tmp_path: Path, evidences: str, conditions: str, message: str) -> None:
    paths = {name: tmp_path / name for name in BENCHMARKS["ddxplus"].definitions}
    paths["release_evidences.json"].write_text(evidences)
    paths["release_conditions.json"].write_text(conditions)
    with pytest.raises(ConfigError, match=message):
        ddxplus.read_definitions(paths)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 1,450,000 ", "1450000"),
        ("007", "7"),
        ("+3.50", "3.5"),
        ("-0.0", "0"),
        (".5", "0.5"),
        ("5.", "5"),
        ("6/8", "3/4"),
        ("-4/2", "-2"),
        ("100", "100"),
    ],
)
def test_numbers_have_one_form(text: str, number: str) -> None:
    assert canonical_number(text) == number
    assert canonical_number(number) == number


@pytest.mark.parametrize("text", ["", "1e5", "inf", "$5", "5%", "1 2", "3/0", "--1", "٣", "9" * 101])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a number such as"):
        canonical_number(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
SPACE = st.text(" \t\n\r\u00a0\u2003", min_size=1, max_size=4)
WORDS = st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=5), min_size=1, max_size=5)


@given(content=st.dictionaries(st.text(max_size=5), JSON, max_size=5), order=st.randoms())
def test_the_hash_does_not_know_the_order_of_keys(content: dict[str, Any], order: Any) -> None:
    keys = list(content)
    order.shuffle(keys)
    assert hash_content({key: content[key] for key in keys}) == hash_content(content)


@given(words=WORDS, spaces=st.lists(SPACE, min_size=4, max_size=4), edge=SPACE)
def test_the_hash_does_not_know_white_space_or_unicode_forms(words: list[str], spaces: list[str], edge: str) -> None:
    spaced = edge + "".join(word + space for word, space in zip(words, [*spaces, edge], strict=False))
    decomposed = unicodedata.normalize("NFD", spaced)
    assert hash_content({"a": [decomposed]}) == hash_content({"a": [" ".join(words)]})
    assert normalise(normalise(decomposed)) == normalise(decomposed)


@given(first=JSON, second=JSON)
def test_different_content_has_different_hashes(first: Any, second: Any) -> None:
    as_json = [json.dumps(normalise(value), sort_keys=True) for value in (first, second)]
    assert (hash_content({"a": first}) == hash_content({"a": second})) == (as_json[0] == as_json[1])


def test_text_that_is_no_unicode_is_a_bad_row() -> None:
    with pytest.raises(RowError, match="no lone surrogates"):
        hash_content({"a": "\ud800"})


@given(st.text())
def test_fractions_lie_in_the_unit_interval_and_ignore_white_space(family: str) -> None:
    assert 0 <= fraction_of(family) < 1
    assert fraction_of(family) == fraction_of(f"  {family}\n")


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'gsm9k' is not known; take one of mmlu, gsm8k"):
        spec_of("gsm9k")


@given(name=st.sampled_from(sorted(BENCHMARKS)), data=st.data())
def test_parsing_never_fails_but_with_a_row_error(name: str, data: st.DataObject) -> None:
    fields = row(name)
    changed = data.draw(st.sampled_from(sorted(fields)))
    fields[changed] = data.draw(JSON)
    try:
        parsed = BENCHMARKS[name].parse(fields, DEFINITIONS)
    except RowError as error:
        named = error.field
    else:
        named = changed
        assert parsed.text
    assert named.split(".")[0] in (changed, "(whole row)")
