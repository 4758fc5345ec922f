"""The Python of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from elision import spd

README = Path(__file__).parents[1] / "README.md"


def program(section: str) -> str:
    """The one block of Python under the heading that starts with `section`; ten lines at most, as it promises."""
    text = README.read_text(encoding="utf-8")
    (block,) = re.findall(rf"^## {section}[^\n]*\n(?:(?!^## ).*\n)*?```python\n((?:.*\n)*?)```", text, re.MULTILINE)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    return block


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def rows(count: int) -> list[dict[str, Tensor]]:
    """Sequences of 12 tokens, the first 8 of them context."""
    ids = torch.randint(1, 50, (count, 12))
    labels = torch.where(torch.arange(12) < 8, -100, ids)
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": x} for i, x in zip(ids, labels, strict=True)
    ]


def test_sparselora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    dataset = [
        {name: row[name].tolist()[: 10 + i % 3] for name in ("input_ids", "labels")} for i, row in enumerate(rows(32))
    ]
    names: dict[str, Any] = {"model": model, "dataset": dataset, "tokenizer": SimpleNamespace(pad_token_id=0)}
    exec(program("SparseLoRA"), names)
    assert names["sparse"].forwards["sparse"] == 3  # of four steps, the first is dense
    assert names["plan"].ffn == (0.0,) + (0.99,) * 8 + (0.0,) and names["plan"].qk == (0.0,) * 4 + (0.75,) * 5 + (0.0,)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    assert any(p.abs().sum() > 0 for name, p in loaded.named_parameters() if "lora_B" in name)  # it did learn


def test_spd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny().eval()
    batches = [{name: row[name][None] for name in row} for row in rows(2)]
    prompt = {"input_ids": batches[0]["input_ids"], "attention_mask": batches[0]["attention_mask"]}
    names: dict[str, Any] = {"model": model, "batches": batches, "prompt": prompt, "tokenizer": None}
    exec(program("SPD"), names)
    assert names["SyncPlan"].load("plan.json") == names["plan"]
    assert names["healed"].plan.healed == names["plan"].dropped
    assert spd.read("model-spd").plan == names["healed"].plan
    with torch.no_grad(), spd.simulate(model, names["healed"].plan):
        simulated = model(**prompt).logits
    with torch.no_grad():
        assert torch.equal(spd.load("model-spd")(**prompt).logits, simulated)


def test_the_figures_show_the_numbers_of_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    drawn = (README.parent / "docs" / "img" / "measured-finetune.svg").read_text(encoding="utf-8")
    described = re.search(r"<desc[^>]*>(.*?)</desc>", drawn, re.DOTALL)
    assert described is not None
    found = re.findall(r"([^:.%]+): ([\d.]+)% \(([\d.]+)% to ([\d.]+)%\)", described[1])
    assert len(found) >= 2
    for name, accuracy, low, high in found:
        row = f"| {name.strip()} | {accuracy}% ({low} to {high}) |"
        assert row in text, f"no row {row!r}: draw the figures anew with python scripts/figures.py runs/demo"
