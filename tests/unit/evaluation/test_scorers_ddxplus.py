"""DDXPlus: names, the first diagnosis, the differential."""

from __future__ import annotations

import pytest

from dmoa.evaluation import registry as table
from dmoa.evaluation.benchmarks.ddxplus import differential_metrics, find_condition, read_diagnosis, read_differential
from dmoa.evaluation.records import Label, Reply

CONDITIONS = [
    "Acute COPD exacerbation / infection",
    "Acute laryngitis",
    "Bronchitis",
    "Guillain-Barr\u00e9 syndrome",
    "HIV (initial infection)",
    "Influenza",
    "Larygospasm",
    "Pneumonia",
    "Possible NSTEMI / STEMI",
    "Stable angina",
    "Tuberculosis",
    "Unstable angina",
]


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        ("Pneumonia", "Pneumonia"),
        ("pneumonia.", "Pneumonia"),
        ("acute copd exacerbation/infection", "Acute COPD exacerbation / infection"),
        ("Guillain Barre Syndrome", "Guillain-Barr\u00e9 syndrome"),
        ("HIV", "HIV (initial infection)"),
        ("STEMI", "Possible NSTEMI / STEMI"),
        ("Acute COPD exacerbation", "Acute COPD exacerbation / infection"),
        ("Acute COPD", "Acute COPD exacerbation / infection"),
        ("Influenza A", "Influenza"),
        ("Pneumonia, community acquired", "Pneumonia"),
        ("laryngospasm", "Larygospasm"),
        ("angina", None),
        ("Acute", None),
        ("Pneumo", None),
        ("", None),
        ("Migraine", None),
    ],
)
def test_names(name: str, condition: str | None) -> None:
    assert find_condition(name, CONDITIONS) == condition


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Diagnosis: Pneumonia", "Pneumonia"),
        ("**Diagnosis:** pneumonia (80%)\nDifferential: Influenza", "Pneumonia"),
        ("Differential diagnosis: Influenza; Pneumonia\nFinal diagnosis: Tuberculosis", "Tuberculosis"),
        ("Diagnosis: Influenza\nOn second thought\nDiagnosis: Pneumonia", "Pneumonia"),
        ("Diagnosis: Migraine", "Migraine"),
        ("Differential: Influenza; Pneumonia", "Influenza"),
        ("He coughs.\nBronchitis", "Bronchitis"),
        ("Diagnosis: Influenza or Pneumonia", None),
        ("Diagnosis: I cannot say", None),
        ("It could be Pneumonia, I think", None),
        ("I cannot help with that.", None),
        ("", None),
    ],
)
def test_first_diagnosis(text: str, name: str | None) -> None:
    assert read_diagnosis(text, CONDITIONS).value == name


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Differential: Influenza; Pneumonia; influenza", ["Influenza", "Pneumonia"]),
        ("Differential: Influenza, Pneumonia.", ["Influenza", "Pneumonia"]),
        ("**Differential diagnosis:**\n- Influenza\n- Pneumonia (20%)\n\nmore", ["Influenza", "Pneumonia"]),
        ("Differential:\n1. Influenza: 0.6\n2. Pneumonia: 0.01\n3. Tuberculosis: 1%", ["Influenza"]),
        ("Differential: Influenza; Migraine", ["Influenza", "Migraine"]),
        ("Diagnosis: Influenza", []),
        ("Differential: none", ["none"]),
        ("Differential:", []),
        ("", []),
    ],
)
def test_differential(text: str, names: list[str]) -> None:
    assert read_differential(text, CONDITIONS) == names


def test_metrics_by_hand() -> None:
    # two of four gold names among three: recall 1/2, precision 2/3, F1 4/7
    found = differential_metrics(["a", "b", "x"], ["a", "b", "c", "d"])
    assert found == pytest.approx({"ddr": 1 / 2, "ddp": 2 / 3, "ddf1": 4 / 7})
    assert differential_metrics([], ["a"]) == {"ddr": 0.0, "ddp": 0.0, "ddf1": 0.0}


def test_diagnosis_and_differential_score_apart() -> None:
    entry = table.build_scorer("ddxplus")
    gold = {
        "pathology": "Pneumonia",
        "differential": [["Influenza", 0.6], ["Pneumonia", 0.39], ["HIV", 0.01]],
        "conditions": CONDITIONS,
    }
    label = Label(row_id="ddxplus/test/1", benchmark="ddxplus", gold=gold)
    replies = entry.gold_replies(label)
    diagnosis = entry.score(label, Reply(text=replies["value"]))
    assert (diagnosis.value, diagnosis.metrics) == (1.0, {"ddr": 0.0, "ddp": 0.0, "ddf1": 0.0})
    differential = entry.score(label, Reply(text=replies["ddf1"]))
    assert (differential.value, differential.metrics) == (0.0, {"ddr": 1.0, "ddp": 1.0, "ddf1": 1.0})
    assert differential.extracted == "Influenza"
    unknown = entry.score(label, Reply(text="Diagnosis: Migraine"))
    assert (unknown.value, unknown.is_scored, unknown.extracted) == (0.0, True, "Migraine")
