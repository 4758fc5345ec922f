"""Counted operations: against torch's dispatch-level counter, and the paper's figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from elision.errors import InputError
from elision.sparselora import Factors, ModelFacts, SparsityPlan, flops, forecast, sparsify, tokens
from elision.sparselora.forecasts import workloads
from tests.sparselora import tiny

aten = torch.ops.aten


def addmm(self: Any, a: list[int], b: list[int], out_shape: Any = None, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def attention_forward(q: list[int], k: list[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def attention_backward(grad: list[int], q: list[int], k: list[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 8 * q[0] * q[1] * q[2] * k[2] * q[3]  # without the recomputation of Q K'


# What torch's counter misses; given to one counter, registered nowhere.
FORMULAS = {
    aten.addmm_: addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def counted(model: Any, **inputs: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(**inputs, use_cache=False).loss.backward()
    return counter.get_total_flops()


class Counter(TorchDispatchMode):
    """Counts like FlopCounterMode, which cannot follow the fast path: it refuses a gradient taken inside a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.formulas = {**flop_registry, **{operator: shape_wrapper(f) for operator, f in FORMULAS.items()}}
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := self.formulas.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def work(inputs: dict[str, torch.Tensor]) -> flops.Workload:
    return flops.Workload.of(tokens.classify(inputs["labels"], inputs["attention_mask"]), padded=True)


QV, DOWN = r".*\.(q_proj|v_proj|qkv_proj)", r".*\.(down_proj|fc2)"


@pytest.mark.parametrize(
    ("family", "targets"),
    [(family, tiny.ALL) for family in tiny.FAMILIES]
    + [(family, targets) for family in ("llama", "phi3", "opt") for targets in (tiny.ATTENTION, QV, DOWN)],
)
def test_a_dense_step_agrees_with_torch_s_counter(family: str, targets: str) -> None:
    model = tiny.lora(family, targets, torch.float32, attn_implementation="eager")
    inputs = tiny.batch((9, 5), (4, 3))
    shape, adapters = flops.Shape.of(model), flops.adapters_of(model)
    expected = counted(model, **inputs)
    assert flops.step(shape, work(inputs), adapters).total() == pytest.approx(expected, rel=1e-3)
    model.enable_input_require_grads()
    more = counted(model, **inputs)
    assert flops.step(shape, work(inputs), adapters, input_gradient=True).total() == pytest.approx(more, rel=1e-3)
    assert more > expected * 1.01  # what flows below the first adapter is seen


def test_attention_kernels_count_as_their_products_do() -> None:
    model, inputs = tiny.lora("llama", dtype=torch.float32), tiny.batch((16, 16), (16, 16))
    cost = flops.step(flops.Shape.of(model), work(inputs), flops.adapters_of(model))
    assert cost.total() == pytest.approx(counted(model, **inputs), rel=1e-3)
    assert cost.attention > 0.02 * cost.total()
    assert cost.total(causal=True) == cost.total() - cost.attention / 2
    assert cost.total(head=False) == cost.total() - cost.head


@pytest.mark.parametrize(
    ("family", "selection"),
    [("llama", s) for s in ("svd", "whitened", "sampled", "oracle", "weights", "random", "no-ffn")]
    + [(family, "sampled") for family in tiny.FAMILIES if family != "llama"],
)
@pytest.mark.parametrize("targets", [tiny.ALL, tiny.ATTENTION], ids=["all", "attention"])
def test_the_fast_step_agrees_with_a_dispatch_level_counter(
    family: str, selection: Any, targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elision.sparselora.estimator.SAMPLE", 20)
    monkeypatch.setattr("elision.sparselora.estimator.FFN_SAMPLE", 30)
    model = tiny.lora(family, targets, torch.float32, num_hidden_layers=3)
    inputs = tiny.batch((30, 20, 23), (12, 9, 10))
    plan = tiny.plan(model, 0.75, selection=selection, rank=4)
    factors = Factors.whitened(model, [inputs], 4) if selection == "whitened" else None
    ran = counted_fast(model, plan, inputs, factors)
    kinds = tokens.classify(inputs["labels"], inputs["attention_mask"])
    shape, adapters = flops.Shape.of(model), flops.adapters_of(model)
    cost = flops.step(shape, flops.Workload.fast(kinds), adapters, plan)
    assert cost.total() == pytest.approx(ran, rel=0.01 if family == "phi3" else 1e-6)
    padded = flops.step(shape, work(inputs), adapters, plan)
    assert padded.total() != pytest.approx(ran, rel=0.05)  # what is elided is seen


def counted_fast(model: Any, plan: SparsityPlan, inputs: dict[str, torch.Tensor], factors: Any = None) -> int:
    with sparsify(model, plan, factors, path="fast"), Counter() as counter:
        model(**inputs, use_cache=False).loss.backward()
    return counter.total


ALIKE = ((30, 20, 9), (12, 9, 4))  # lengths of prompts and of their answers, for one grid
UNLIKE = ((15, 550, *(14,) * 9), (5, 50, *(6,) * 9))  # and for several


@pytest.mark.parametrize("targets", [tiny.ALL, tiny.ATTENTION], ids=["all", "attention"])
def test_dora_s_norm_is_counted(targets: str) -> None:
    """As PEFT takes it, and as the fast path does, which makes no product of the adapter's factors."""
    config = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", use_dora=True)
    model = tiny.peft_model(tiny.base("llama", torch.float32, num_hidden_layers=3), config).train()
    inputs = tiny.batch((30, 20, 23), (12, 9, 10))
    shape, adapters = flops.Shape.of(model), flops.adapters_of(model)
    kinds = tokens.classify(inputs["labels"], inputs["attention_mask"])
    of_peft, of_fast, plan = work(inputs), flops.Workload.fast(kinds), tiny.plan(model, 0.75, selection="weights")
    for ran, cost in (
        (counted(model, **inputs), flops.step(shape, of_peft, adapters)),
        (counted_fast(model, tiny.plan(model, 0.0), inputs), flops.step(shape, of_fast, adapters)),
        (counted_fast(model, plan, inputs), flops.step(shape, of_fast, adapters, plan)),
    ):
        assert cost.total() == pytest.approx(ran, rel=1e-3)
    plain = [[replace(pair, dora=False) for pair in layer] for layer in adapters]
    assert cost.adapters > 1.05 * flops.step(shape, of_fast, plain, plan).adapters
    assert flops.step(shape, of_peft, plain).adapters < flops.step(shape, of_peft, adapters).adapters


def packed(prompts: tuple[int, ...], answers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Sequences of several lengths in one row, told apart by their positions."""
    pairs = zip(prompts, answers, strict=True)
    rows = [{name: t[0] for name, t in tiny.batch((p,), (a,)).items()} for p, a in pairs]
    joined = {name: torch.cat([row[name] for row in rows])[None] for name in ("input_ids", "labels")}
    return joined | {"position_ids": torch.cat([torch.arange(len(row["labels"])) for row in rows])[None]}


@pytest.mark.parametrize("lengths", [ALIKE, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("targets", [tiny.ALL, tiny.ATTENTION], ids=["all", "attention"])
def test_what_is_forecast_is_what_a_run_then_costs(targets: str, kind: str, lengths: Any) -> None:
    """Attention of packed rows is that of their sequences, not of the row; of sequences, that of their own grid."""
    model = tiny.lora("llama", targets, torch.float32, num_hidden_layers=3, max_position_embeddings=1024)
    inputs = (packed if kind == "packed" else tiny.batch)(*lengths)
    plan, nothing = tiny.plan(model, 0.75, selection="svd", rank=4), tiny.plan(model, 0.0)
    sparse, dense = (counted_fast(model, each, inputs) for each in (plan, nothing))
    told = forecast(model, [inputs], plan)
    assert told.flops["full"] == pytest.approx(sparse / dense, rel=0.01)
    (work,) = workloads([inputs])
    shape, adapters = flops.Shape.of(model), flops.adapters_of(model)
    assert flops.step(shape, work, adapters).total() == pytest.approx(dense, rel=0.01)
    one, other = flops.step(shape, work, adapters, plan), flops.step(shape, work, adapters)
    less = [cost.total() - cost.attention / 2 for cost in (one, other)]
    assert told.flops["half"] == pytest.approx(less[0] / less[1]) and told.speedup == 1 / told.flops["half"]
    less = [cost.total() - cost.head for cost in (one, other)]
    assert told.flops["full, without head"] == pytest.approx(less[0] / less[1])
    less = [cost.total() - cost.attention / 2 - cost.head for cost in (one, other)]
    assert told.flops["half, without head"] == pytest.approx(less[0] / less[1])


def test_the_speedup_depends_on_the_data() -> None:
    model = tiny.lora("llama", tiny.ATTENTION, torch.float32, hidden_size=64, intermediate_size=512)
    plan = tiny.plan(model, 0.9, selection="weights")
    short, long = (forecast(model, [tiny.batch((p, p), (a, a))], plan) for p, a in ((40, 10), (10, 40)))
    assert short.output_share == pytest.approx(0.2, abs=0.03) and long.output_share == pytest.approx(0.8, abs=0.03)
    assert short.speedup > 1.5 * long.speedup > 1.5
    assert f"expect at most {long.speedup:.2f}x over dense LoRA that computes no padding" in long.line()
    assert f"{long.output_share:.0%} of the tokens are outputs and stay dense" in long.line()
    assert short.speedup == pytest.approx(1 / short.flops["half"])
    assert short.flops["full, without head"] < short.flops["full"]  # the head is never sparse
    half = forecast(
        model, [tiny.batch((40, 40), (10, 10))], tiny.plan(model, 0.9, selection="weights", dense_steps=0.5)
    )
    assert half.flops["full"] == pytest.approx(0.5 + 0.5 * short.flops["full"])


def test_a_model_that_takes_the_reference_path_is_promised_no_speedup() -> None:
    model = tiny.lora("llama", tiny.ATTENTION, torch.float32, attention_dropout=0.1)
    told = forecast(model, [tiny.batch((40, 40), (10, 10))], tiny.plan(model, 0.9, selection="weights"))
    assert told.obstacle == "dropout in the model"
    assert told.line().startswith("expect no speedup: dropout in the model, so training takes the reference path")


@pytest.mark.parametrize("path", ["reference", "auto"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_that_is_sparse_already_is_promised_the_same(family: str, path: Any) -> None:
    model, batches = tiny.lora(family), [tiny.batch((40, 40), (10, 10))]
    plan = tiny.plan(model, 0.9)
    told = forecast(model, batches, plan)
    with sparsify(model, plan, path=path):
        assert told.obstacle is None and forecast(model, batches, plan) == told


LLAMA3_8B = flops.Shape(32, 4096, 14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256)
MATH10K = SparsityPlan(
    ModelFacts("llama", 32, 32, 8, 128, 4096, 14336),
    ffn=tuple(0.99 if 3 <= layer <= 30 else 0.0 for layer in range(32)),
    qk=tuple(0.75 if 14 <= layer <= 29 and layer not in (20, 24) else 0.0 for layer in range(32)),
    vo=tuple(0.75 if 14 <= layer <= 29 and layer not in (20, 24) else 0.0 for layer in range(32)),
    selection="svd",
)
ROWS = flops.Workload(lengths=(512,) * 8, context=8 * 384, logits=8 * 512)  # 25% output tokens
QKVO = flops.uniform_adapters(LLAMA3_8B, rank=32)


def test_the_paper_s_figures() -> None:
    """LLaMA3-8B, Math10K plan: 45.7% without the head, 49.5% with it, its 5% of dense steps included."""
    assert flops.relative(LLAMA3_8B, ROWS, QKVO, MATH10K, count=("base",)) == pytest.approx(0.457, abs=0.003)
    assert flops.relative(LLAMA3_8B, ROWS, QKVO, MATH10K, count=("base", "head")) == pytest.approx(0.495, abs=0.003)
    # the convention matters: everything that runs is not 46%
    assert flops.relative(LLAMA3_8B, ROWS, QKVO, MATH10K) > 0.505
    assert flops.relative(LLAMA3_8B, ROWS, QKVO, replace(MATH10K, dense_steps=0.0), count=("base",)) < 0.43


def test_the_estimator_is_cheap() -> None:
    cost = flops.step(LLAMA3_8B, ROWS, QKVO, MATH10K)
    assert 0 < cost.estimator < 0.002 * cost.total()  # the paper says 0.05% of the dense step
    sampled = flops.step(LLAMA3_8B, ROWS, QKVO, replace(MATH10K, selection="sampled"))
    assert cost.estimator < sampled.estimator < 0.01 * flops.step(LLAMA3_8B, ROWS, QKVO).total()
    oracle = flops.step(LLAMA3_8B, ROWS, QKVO, replace(MATH10K, selection="oracle"))
    assert oracle.estimator > 50 * cost.estimator
    assert flops.step(LLAMA3_8B, ROWS, QKVO, replace(MATH10K, selection="random")).estimator == 0
    assert flops.step(LLAMA3_8B, ROWS, QKVO, replace(MATH10K, selection="no-ffn")).base < cost.base


def test_sparsity_saves_and_more_of_it_saves_more() -> None:
    dense = flops.step(LLAMA3_8B, ROWS, QKVO)
    zero = replace(MATH10K, ffn=(0.0,) * 32, qk=(0.0,) * 32, vo=(0.0,) * 32)
    assert flops.step(LLAMA3_8B, ROWS, QKVO, zero) == dense
    totals = [
        flops.step(LLAMA3_8B, ROWS, QKVO, replace(zero, ffn=(s,) * 32, qk=(s,) * 32, vo=(s,) * 32)).total()
        for s in (0.0, 0.1, 0.3, 0.5, 0.9, 0.99)
    ]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)
    fewer = [flops.step(LLAMA3_8B, replace(ROWS, context=c), QKVO, MATH10K).base for c in (0, 1000, 4096)]
    assert fewer[0] == dense.base and fewer == sorted(fewer, reverse=True)


def test_one_pruned_layer_by_hand() -> None:
    shape = flops.Shape(1, 8, 20, heads=4, kv_heads=2, head_dim=2, vocabulary=11)
    plan = SparsityPlan(ModelFacts("llama", 1, 4, 2, 2, 8, 20), ffn=(0.5,), qk=(0.25,), vo=(0.75,), rank=2)
    plan = replace(plan, selection="svd")
    cost = flops.step(shape, flops.Workload((6, 4), context=7, logits=3), ((flops.Adapter(("q",), 3, 8, 8),),), plan)
    forward = 3 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 20)  # 3 dense tokens
    forward += 7 * (8 * 6 + 8 * 3 + 8 * 1 + 2 * 8 + 3 * 8 * 10)  # 7 context tokens: 6 q, 3 k, 1 v, 2 o, 10 FFN channels
    below = 3 * (8 * 8 + 8 * 4 + 8 * 4) + 7 * (8 * 6 + 8 * 3 + 8 * 1)  # q, k, v: nothing below needs a gradient
    assert cost.base == 2 * (2 * forward - below)
    assert cost.adapters == 2 * 10 * 3 * (2 * 8 + 3 * 8)
    assert cost.attention == 2 * (36 + 16) * 8 * (2 + 1 + 1)  # forward; dQ and dP, as K and V have no gradient
    scores = sum(2 * 7 * 2 * (8 + 2) + 2 * out * 4 for out in (8, 4, 4)) + 2 * (2 * 7 * 2 * (8 + 20))
    assert cost.estimator == scores
    assert cost.head == 2 * 3 * 8 * 11 * 2


def test_workload_of_a_batch() -> None:
    inputs = tiny.batch((5, 3), (3, 2))
    kinds = tokens.classify(inputs["labels"], inputs["attention_mask"])
    assert flops.Workload.of(kinds, padded=True) == flops.Workload((8, 8), 6, 16)
    # the last token of a row is read by nothing; 3 + 2 tokens are predicted
    assert flops.Workload.of(kinds, padded=False) == flops.Workload((7, 4), 6, 5)


def test_fused_adapters_are_counted_once() -> None:
    model = tiny.lora("phi3", tiny.ALL)
    pairs = flops.adapters_of(model)[0]
    assert [pair.projections for pair in pairs] == [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
    assert pairs[0] == flops.Adapter(("q", "k", "v"), 3, 32, 64)


def test_what_does_not_match_is_refused() -> None:
    with pytest.raises(InputError, match="adapters of 32 layers for a model of 2"):
        flops.step(replace(LLAMA3_8B, layers=2), ROWS, QKVO)
    with pytest.raises(InputError, match="plan has 32 layers, the model 2"):
        flops.step(replace(LLAMA3_8B, layers=2), ROWS, QKVO[:2], MATH10K)
