"""Rows as tokens: laid out by hand, judged as transformers would alone, and kept in their file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dmoa.training.lora import IGNORED, TrainingRow, collate, encode, judge_rows, write_training_rows
from tests.unit.training.lora_fixtures import make_rows, save_tiny_model


def test_layout_by_hand() -> None:
    found = collate([{"prompt": [1, 2, 3], "target": [7, 9]}, {"prompt": [4], "target": [8]}])
    assert found["input_ids"].tolist() == [[1, 2, 3, 7, 9], [0, 0, 0, 4, 8]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert found["labels"].tolist() == [[IGNORED, 7, 9], [IGNORED, IGNORED, 8]]


def test_rows_side_by_side_are_judged_as_transformers_judges_each_alone(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny").removeprefix("path:")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = encode(tokenizer, make_rows(5))
    laid = collate(rows)
    labels_NK = laid.pop("labels")
    with torch.no_grad():
        judged_N2 = judge_rows(model(**laid, logits_to_keep=labels_NK.shape[1]).logits, labels_NK)
        for row, (is_right, entropy) in zip(rows, judged_N2.tolist(), strict=True):
            tokens = torch.tensor([[*row["prompt"], *row["target"]]])
            logits_TV = model(tokens).logits[0, len(row["prompt"]) - 1 : -1].double()
            log_p = logits_TV.log_softmax(dim=1)
            assert entropy == pytest.approx(float(-(log_p.exp() * log_p).sum(dim=1).mean()), abs=1e-5)
            assert is_right == (logits_TV.argmax(dim=1).tolist() == row["target"])


def test_a_row_is_right_where_every_token_of_its_target_is_the_most_probable() -> None:
    logits_NKV = torch.zeros(2, 3, 4)
    logits_NKV[0, 0, 1] = logits_NKV[0, 1, 2] = logits_NKV[1, 1, 3] = 9.0
    labels_NK = torch.tensor([[IGNORED, 1, 2], [IGNORED, IGNORED, 2]])
    assert judge_rows(logits_NKV, labels_NK)[:, 0].tolist() == [1.0, 0.0]


def test_texts_of_rows_may_hold_any_line_separator(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"target": "a\u2028b\u2029c\u0085d\x0be\x1cf\r\n"}) for row in make_rows(2)]
    write_training_rows(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.jsonl").open(encoding="utf-8") as file:
        assert [TrainingRow.model_validate(json.loads(line)) for line in file] == rows
