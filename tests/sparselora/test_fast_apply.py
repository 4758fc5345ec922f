"""The fast path of `sparsify` against its reference: equal loss and gradients, the same handle, named fall-backs."""

from __future__ import annotations

import inspect
import itertools
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from elision import blocks
from elision.errors import InputError
from elision.sparselora import Elisions, SparsityPlan, estimator, lossless, mlp, rows, sparsify
from tests.sparselora import tiny

COVERED = tiny.FAMILIES
TARGETS = {
    "all": tiny.ALL,
    "attention": tiny.ATTENTION,
    "q and v": r".*\.(q_proj|v_proj|qkv_proj)",
    "mlp": r".*\.(up_proj|down_proj|gate_up_proj|fc1|fc2)",
    "layer 1": r".*\.1\..*\.(q_proj|o_proj|out_proj|qkv_proj|gate_proj)",
}
Result = tuple[Tensor, dict[str, Tensor]]


def turns(left: bool = False) -> dict[str, Tensor]:
    """Rows of several turns, with unread tails and a row without any target."""
    inputs = tiny.batch((5, 3, 4, 9), (4, 3, 1, 2), left)
    if not left:
        inputs["labels"][0, 6:8] = -100
        inputs["labels"][1, 5:] = -100
        inputs["labels"][2] = -100
    return inputs


def packed() -> dict[str, Tensor]:
    """Three sequences in one row, told apart by their positions."""
    padded = tiny.batch((6, 3, 4), (3, 2, 4))
    lengths = padded["attention_mask"].sum(1).tolist()
    joined = {
        name: torch.cat([padded[name][row, :length] for row, length in enumerate(lengths)])[None]
        for name in ("input_ids", "labels")
    }
    return {**joined, "position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


def holed() -> dict[str, Tensor]:
    """Masked tokens in the midst of rows."""
    inputs = tiny.batch((6, 7), (3, 4))
    inputs["attention_mask"][0, 2] = inputs["attention_mask"][1, 1] = inputs["attention_mask"][1, 4] = 0
    return inputs


BATCHES: dict[str, Any] = {
    "right": turns,
    "left": lambda: turns(left=True),
    "packed": packed,
    "holes": holed,
    "full": lambda: {name: t for name, t in tiny.batch((5, 6), (3, 2)).items() if name != "attention_mask"},
    "a row of outputs alone": lambda: tiny.batch((5, 0, 4), (3, 6, 2)),
    "sum of losses": lambda: {**turns(), "num_items_in_batch": torch.tensor(23)},
}


def run(model: Any, inputs: dict[str, Any], path: Any, plan: SparsityPlan, **settings: Any) -> Result:
    """Loss and gradients of one forward and backward that is sure to have taken `path`."""
    with sparsify(model, plan, path=path, **settings) as handle:
        result = tiny.loss_and_gradients(model, **inputs)
        assert handle.paths == ({"fast": 1} if path == "fast" else {})
    return result


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", COVERED)
def test_equal_to_the_reference_for_every_family_and_adapter(family: str, targets: str) -> None:
    model, inputs = tiny.lora(family, TARGETS[targets]), turns()
    plan = tiny.plan(model, 0.6)
    expected = run(model, inputs, "reference", plan)
    assert tiny.close(run(model, inputs, "fast", plan), expected)
    assert not tiny.close(run(model, inputs, "fast", tiny.plan(model, 0.3)), expected, 1e-6)


KINDS = [(family, batch) for family in COVERED for batch in BATCHES if (family, batch) != ("opt", "packed")]


@pytest.mark.parametrize(("family", "batch"), KINDS)  # packed rows of OPT take the reference by name
def test_equal_to_the_reference_for_every_kind_of_batch(family: str, batch: str) -> None:
    model, inputs = tiny.lora(family), BATCHES[batch]()
    plan = tiny.plan(model, 0.6)
    assert tiny.close(run(model, inputs, "fast", plan), run(model, inputs, "reference", plan))


def unequal() -> dict[str, Tensor]:
    """Sequences of very different lengths in one row, one of them without a target."""
    lengths = {2: 1, 30: 3, 4: 2, 6: 0, 12: 5, 3: 1}  # and how many of the tokens are an answer
    ids = torch.randint(3, tiny.VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(length) for length in lengths])
    answers = torch.cat([torch.arange(length) >= length - answer for length, answer in lengths.items()])
    return {"input_ids": ids, "labels": ids.where(answers, -100), "position_ids": positions[None]}


@pytest.mark.parametrize("elisions", [Elisions(), Elisions(tail=False), Elisions.none()], ids=["all", "tail", "none"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])  # without and with windows, of all layers or some
def test_segments_of_unequal_length_have_grids_of_their_own(
    family: str, elisions: Elisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_SHORT", 1)
    model, inputs = tiny.lora(family), unequal()
    plan, right, seen = tiny.plan(model, 0.6), rows.arrange, []

    def watched(*args: Any) -> rows.Rows:
        seen.append(right(*args))
        return seen[-1]

    monkeypatch.setattr("elision.sparselora.apply.arrange", watched)
    for implementation in ("eager",) if family == "gemma2" else ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert tiny.close(run(model, inputs, "fast", plan, elisions=elisions), run(model, inputs, "reference", plan))
    shapes = [(grid.segments, grid.length) for grid in seen[0].grids]
    with_tails = [(1, 30), (1, 12), (2, 6), (2, 3)]
    assert shapes == ([(1, 29), (1, 11), (2, 3), (1, 1)] if elisions.tail else with_tails)


def test_how_segments_share_grids() -> None:
    def shapes(*lengths: int) -> list[tuple[int, int]]:
        grids, starts = rows._grids(list(lengths))
        places = sorted((start, start + length) for start, length in zip(starts, lengths, strict=True))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
        assert grids[-1].slots.stop >= places[-1][1]
        return [(grid.segments, grid.length) for grid in grids]

    assert shapes(7) == [(1, 7)]
    assert shapes(500, 480, 300, 260) == [(4, 500)]
    assert shapes(10, 1, 60, 30) == [(4, 60)]  # too short to tell
    assert shapes(20, 600, 20, 100, 20) == [(1, 600), (4, 100)]
    assert shapes(512, 512, 512, 200) == [(4, 512)]  # not worth it


def test_a_batch_of_outputs_alone_is_dense_by_name() -> None:
    model, inputs = tiny.lora(), BATCHES["full"]()
    inputs["labels"] = inputs["input_ids"].clone()
    expected = tiny.loss_and_gradients(model, **inputs)
    with sparsify(model, tiny.plan(model, 0.6), path="fast") as handle:
        assert tiny.close(tiny.loss_and_gradients(model, **inputs), expected)
        assert handle.forwards == {"dense (no context token before an output token)": 1} and handle.paths == {"fast": 1}


SETTINGS: list[dict[str, Any]] = [
    {"parts": ("ffn",)},
    {"parts": ("qk",)},
    {"parts": ("vo",)},
    {"layers": (1,)},
    {"rotary_pairs": True},
    {"selection": "svd", "rank": 2},
    {"selection": "sampled"},
    {"selection": "weights"},
    {"selection": "random"},
    {"selection": "no-ffn"},
    {"dense_outputs": False},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_equal_to_the_reference_for_every_kind_of_plan(setting: dict[str, Any]) -> None:
    for targets in (tiny.ALL, tiny.ATTENTION):
        model, inputs = tiny.lora("llama", targets), turns()
        plan = tiny.plan(model, 0.6, **setting)
        assert tiny.close(run(model, inputs, "fast", plan), run(model, inputs, "reference", plan))


@pytest.mark.parametrize(
    "setting", [{"selection": "sampled"}, {"selection": "svd", "rank": 2, "parts": ("ffn",)}], ids=str
)
def test_both_paths_sample_the_same_tokens(setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.lora("llama"), turns()
    plan = tiny.plan(model, 0.6, **setting)
    everything = run(model, inputs, "reference", plan)
    monkeypatch.setattr("elision.sparselora.estimator.SAMPLE", 3)
    monkeypatch.setattr("elision.sparselora.estimator.FFN_SAMPLE", 3)
    sampled = run(model, inputs, "reference", plan)
    assert tiny.close(run(model, inputs, "fast", plan), sampled)
    assert not tiny.close(sampled, everything, 1e-6)


@pytest.mark.parametrize("name", [item.name for item in fields(Elisions)])
@pytest.mark.parametrize("batch", ["right", "left", "packed"])
def test_every_elision_is_exact_alone_and_together(name: str, batch: str) -> None:
    model, inputs = tiny.lora(), BATCHES[batch]()
    model.enable_input_require_grads()
    plan = tiny.plan(model, 0.6)
    expected = run(model, inputs, "reference", plan)
    alone = Elisions(**{item.name: item.name == name for item in fields(Elisions)})
    others = Elisions(**{item.name: item.name != name for item in fields(Elisions)})
    for elisions in (alone, others):
        assert tiny.close(run(model, inputs, "fast", plan, elisions=elisions), expected)


@pytest.mark.parametrize("family", COVERED)
def test_lossless_is_dense_fine_tuning(family: str) -> None:
    model, inputs = tiny.lora(family), turns()
    dense = tiny.loss_and_gradients(model, **inputs)
    with lossless(model) as handle:
        assert tiny.close(tiny.loss_and_gradients(model, **inputs), dense)
        assert handle.paths == {"fast": 1} and handle.kept == {}
    with sparsify(model, tiny.plan(model, 0.6, dense_steps=0.5), path="fast") as handle:
        handle.step(0.0)
        assert tiny.close(tiny.loss_and_gradients(model, **inputs), dense)
        assert handle.forwards == {"dense (first steps)": 1} and handle.paths == {"fast": 1}


def test_what_is_elided() -> None:
    """Counted in rows that reach a module of the model: embeddings, final norm."""
    model, inputs = tiny.lora(), turns()
    view, seen = blocks.decoder(model), {}
    assert view.final_norm is not None
    for name, module in (("embedded", view.embeddings), ("normed", view.final_norm)):

        def count(*args: Any, name: str = name, forward: Any = module.forward) -> Tensor:
            output = forward(*args)
            seen[name] = output.numel() // output.shape[-1]
            return output

        module.forward = count  # not a hook: one on the embeddings takes the reference
    everything = inputs["labels"].numel()
    real = int(inputs["attention_mask"].sum())
    bearing = int((inputs["labels"][:, 1:] != -100).sum())
    read = sum(max([0, *(row != -100).nonzero().flatten().tolist()]) for row in inputs["labels"])
    expected = {
        Elisions(): (read, bearing),
        Elisions(tail=False): (real, bearing),
        Elisions(tail=False, padding=False): (everything, bearing),
        Elisions(padding=False): (everything - (real - read), bearing),
        Elisions(logits=False): (real, real),
    }
    assert len(set(expected.values())) == 5
    for elisions, counts in expected.items():
        with lossless(model, elisions) as handle:
            output = model(**inputs)
            assert (seen["embedded"], seen["normed"]) == counts and handle.paths == {"fast": 1}
            assert (output.logits is None) == elisions.logits


def test_all_logits_on_demand() -> None:
    model, inputs = tiny.lora(), turns()
    with tiny.InDouble():
        expected = model(**inputs)
        with lossless(model, Elisions(logits=False)):
            output = model(**inputs)
    real = inputs["attention_mask"] != 0
    assert torch.allclose(output.logits[real], expected.logits[real], rtol=1e-12, atol=1e-12)
    assert bool((output.logits[~real] == 0).all())


def test_context_rows_compute_kept_channels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[tuple[int, int]] = []
    right = mlp._hidden

    def measured(z: Tensor, frozen: mlp.MLP) -> Tensor:
        widths.append((len(z), z.shape[1] // 2))
        return right(z, frozen)

    monkeypatch.setattr(mlp, "_hidden", measured)
    model, inputs = tiny.lora("llama", tiny.ATTENTION), tiny.batch()
    with sparsify(model, tiny.plan(model, 0.75), path="fast"):
        model(**inputs)
    assert widths == [(6, 10), (5, 40), (5, 40)]  # context, dense; in the last block loss-bearing tokens only


def test_low_precision_errs_no_more_than_plain_pytorch() -> None:
    errors: dict[str, float] = {}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    inputs = tiny.batch((11, 9, 14), (6, 7, 3))
    double, low = tiny.lora(**shape), tiny.lora(dtype=torch.bfloat16, **shape)
    plan = tiny.plan(double, 0.6)
    with sparsify(double, plan, path="reference") as handle:
        exact, kept = tiny.loss_and_gradients(double, **inputs), handle.kept
    for path in ("reference", "fast"):
        with sparsify(low, plan, path=path) as handle:
            handle.hold(kept)
            loss = low(**inputs).loss
            loss.backward()
            gradients = tiny.gradients(low)
        errors[path] = sum(float((g.double() - exact[1][n]).square().sum()) for n, g in gradients.items()) ** 0.5
        errors[f"{path} loss"] = abs(float(loss.detach()) - float(exact[0]))
    assert errors["fast"] <= 2 * errors["reference"]
    assert errors["fast loss"] <= 2 * errors["reference loss"] + 2**-8 * float(exact[0])
    assert errors["reference"] > 1e-4 * sum(float(g.square().sum()) for g in exact[1].values()) ** 0.5


def test_single_precision_adapters_on_a_low_precision_base() -> None:
    """PEFT's default: factors in fp32, with fp32 gradients."""
    model = tiny.lora(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with sparsify(model, tiny.plan(model), path="fast"):
        model(**turns()).loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16), sparsify(model, tiny.plan(model), path="fast") as handle:
        model(**turns()).loss.backward()
        assert handle.paths == {"fast": 1}


@pytest.mark.parametrize("family", COVERED)
def test_removal_leaves_the_model_as_it_was_bit_for_bit(family: str) -> None:
    model, inputs = tiny.lora(family), turns()
    before, names = tiny.bits(model), list(model.state_dict())
    identities = [id(p) for p in model.parameters()]
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    dense = tiny.loss_and_gradients(model, **inputs)
    handle = sparsify(model, tiny.plan(model), path="fast")
    tiny.loss_and_gradients(model, **inputs)
    assert list(model.state_dict()) == names and tiny.bits(model) == before
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} != strides  # laid out by rows
    handle.remove()
    assert tiny.bits(model) == before and [id(p) for p in model.parameters()] == identities
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides
    assert "forward" not in vars(model.get_base_model())
    assert tiny.close(tiny.loss_and_gradients(model, **inputs), dense, 0.0)


def test_weights_are_not_copied() -> None:
    model = tiny.lora("llama", tiny.ATTENTION)

    def held() -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        return sum(storages.values())

    before = held()
    with sparsify(model, tiny.plan(model), path="fast") as handle:
        model(**turns())
        assert held() == before
        assert handle._fast is not None
        ours = {
            m(torch.float64).untyped_storage().data_ptr() for w in handle._fast.layout.weights for m in vars(w).values()
        }
        assert ours <= {p.untyped_storage().data_ptr() for p in model.parameters()} and len(ours) == 8


def test_saving_while_fast(tmp_path: Path) -> None:
    model = tiny.lora(dtype=torch.float32)
    inner = model.get_base_model()
    inner.save_pretrained(tmp_path / "before")
    with sparsify(model, tiny.plan(model), path="fast"):
        model(**turns())
        inner.save_pretrained(tmp_path / "during")
        model.save_pretrained(tmp_path / "adapter")
    from safetensors.torch import load_file

    before, during = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "during"))
    assert before.keys() == during.keys() and all(torch.equal(before[name], during[name]) for name in before)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_model_that_moves_or_is_replaced_meanwhile_is_laid_out_again() -> None:
    model, inputs = tiny.lora(), turns()
    plan = tiny.plan(model)
    with sparsify(model, plan, path="fast") as handle:
        expected = tiny.loss_and_gradients(model, **inputs)
        model.to(torch.float32).to(torch.float64)
        base = blocks.decoder(model).blocks[0].q.base
        base.weight = nn.Parameter(base.weight.detach() * 2, requires_grad=False)
        doubled = tiny.loss_and_gradients(model, **inputs)
        assert not tiny.close(doubled, expected, 1e-6)
        assert handle.paths == {"fast": 2}
    assert tiny.close(run(model, inputs, "reference", plan), doubled)


def test_eval_generate_and_disabled_adapters_take_the_models_own_way() -> None:
    model, inputs = tiny.lora(), tiny.batch()
    ids = {"input_ids": inputs["input_ids"][:1, :5], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    expected = model.generate(**ids, max_new_tokens=5, do_sample=False)
    signature = inspect.signature(model.get_base_model().forward)
    with sparsify(model, tiny.plan(model), path="fast") as handle:
        assert handle.summary().endswith("; on the fast path")
        assert inspect.signature(model.get_base_model().forward) == signature
        assert torch.equal(model.generate(**ids, max_new_tokens=5, do_sample=False), expected)
        assert model.eval()(**inputs).logits.shape == (2, 8, tiny.VOCABULARY)
        model.train()
        with model.disable_adapter():
            assert model(**inputs).logits is not None
        assert handle.paths == {}
        assert model(**inputs).logits is None
        assert handle.summary().endswith("; training paths: 1 fast")


def obstacles() -> dict[str, Any]:
    def dropout(model: Any) -> None:
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
        model.base_model.set_adapter(["default", "other"])

    def bias(model: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT: the base has no bias to merge it into
            model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"], lora_bias=True))
        model.set_adapter("other")

    def hook(model: Any) -> None:
        blocks.decoder(model).blocks[1].mlp.register_forward_hook(lambda *_: None)

    def stack_hook(model: Any) -> None:
        model.get_base_model().model.register_forward_hook(lambda *_: None)

    def embeddings_hook(model: Any) -> None:
        shift = nn.Parameter(torch.zeros(32, dtype=torch.float64))
        model.get_input_embeddings().register_forward_hook(lambda _, args, output: output + shift)

    def norm(model: Any) -> None:
        next(p for n, p in model.named_parameters() if "layers.1.input_layernorm" in n).requires_grad_(True)

    def own_loss(model: Any) -> None:
        model.get_base_model().loss_function = lambda logits, labels, **_: logits.float().square().mean()

    def attention_dropout(model: Any) -> None:
        model.get_base_model().config.attention_dropout = 0.1

    def replaced(model: Any) -> None:
        module = blocks.decoder(model).blocks[0].mlp
        module.forward = module.forward

    return {
        "dropout with adapters default, other at once at q in layer 0": dropout,
        "a bias in an adapter at k in layer 0": bias,
        "a hook on mlp in layer 1": hook,
        "a hook on LlamaModel": stack_hook,
        "a hook on the embeddings": embeddings_hook,
        "trained parameters of input_layernorm in layer 1": norm,
        "a loss function of its own": own_loss,
        "dropout in the model": attention_dropout,
        "a replaced forward of mlp in layer 0": replaced,
    }


@pytest.mark.parametrize("reason", obstacles())
def test_what_is_not_covered_takes_the_reference_by_name(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny.lora(), turns()
    plan = tiny.plan(model)
    with sparsify(model, plan) as handle:
        model(**inputs)
        obstacles()[reason](model)  # seen in the forward
        assert f"; on the reference path ({reason})" in str(handle)
        output = model(**inputs)
        assert handle.paths == {"fast": 1, f"reference ({reason})": 1}
        told = [record.getMessage() for record in caplog.records if record.name.startswith("elision")]
        assert told == [f"SparseLoRA trains on the path: reference ({reason}) (exact, but slower than dense training)"]
        assert output.logits is not None
        output.loss.backward()
        assert f"1 reference ({reason})" in handle.summary()
    with pytest.raises(InputError, match=r"path='fast' does not cover .*: use path='auto'"):
        sparsify(model, plan, path="fast")
    assert "forward" not in vars(model.get_base_model())


def test_eager_attention_is_the_models_own() -> None:
    for family in ("llama", "mistral", "opt"):
        model, inputs = tiny.lora(family), BATCHES["holes"]()
        model.get_base_model().set_attn_implementation("eager")
        plan = tiny.plan(model)
        assert tiny.close(run(model, inputs, "fast", plan), run(model, inputs, "reference", plan))


def test_what_is_not_a_plain_block_takes_the_reference_by_name() -> None:
    opt = tiny.lora("opt", dropout=0.1)
    with sparsify(opt, tiny.plan(opt)) as handle:
        opt(**turns())
        assert handle.paths == {"reference (dropout in the model)": 1}
    opt = tiny.lora("opt")
    with sparsify(opt, tiny.plan(opt)) as handle:
        opt(**packed())
        assert handle.paths == {"reference (packed rows, which this family's attention does not tell apart)": 1}
    model = tiny.lora()
    with sparsify(model, tiny.plan(model)) as handle:
        model.get_base_model().config._attn_implementation = "flash_attention_2"  # seen before any forward of it
        assert handle._fast is not None
        assert handle._fast.obstacle() == "attention implementation flash_attention_2"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_activation_that_is_not_0_at_0_takes_the_reference(family: str) -> None:
    """A channel without base product would not be 0 behind it, as the fast step takes it to be."""
    name = "activation_function" if family == "opt" else "hidden_act"
    model, inputs = tiny.lora(family, r".*\.(up_proj|down_proj|fc1|fc2)", **{name: "sigmoid"}), turns()
    plan = tiny.plan(model)
    expected = run(model, inputs, "reference", plan)
    with sparsify(model, plan) as handle:
        assert tiny.close(tiny.loss_and_gradients(model, **inputs), expected, 0.0)
        assert handle.paths == {"reference (an activation that is not 0 at 0 in layer 0)": 1}


@pytest.mark.parametrize("size", [32, 24], ids=["OPT-350m's norms", "and narrow embeddings"])
def test_norms_behind_the_residual(size: int) -> None:
    model, inputs = tiny.lora("opt", do_layer_norm_before=False, word_embed_proj_dim=size), turns()
    plan = tiny.plan(model)
    assert tiny.close(run(model, inputs, "fast", plan), run(model, inputs, "reference", plan))


def test_calls_that_ask_for_more_take_the_reference_by_name() -> None:
    model, inputs = tiny.lora(), tiny.batch(left=True)
    everything = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    joined = packed()
    joined["labels"] = joined["input_ids"].clone()
    calls = {
        "output_hidden_states": {**inputs, "output_hidden_states": True},
        "use_cache": {**inputs, "use_cache": True},
        "return_dict": {**inputs, "return_dict": False},
        "a target at or after a masked position": everything,
        "a target at the start of a packed sequence": joined,
    }
    for reason, call in calls.items():
        with sparsify(model, tiny.plan(model)) as handle:
            model(**call)
            named = reason if reason.startswith("a target") else f"{reason} in the call"
            assert handle.paths == {f"reference ({named})": 1}
        with sparsify(model, tiny.plan(model), path="fast"), pytest.raises(InputError, match=reason):
            model(**call)


def test_a_forward_replaced_later_takes_the_reference() -> None:
    model, inputs = tiny.lora(), turns()
    inner = model.get_base_model()
    expected = run(model, inputs, "reference", tiny.plan(model))
    with sparsify(model, tiny.plan(model)) as handle:
        ours = inner.forward
        inner.forward = lambda *args, **kwargs: ours(*args, **kwargs)
        assert tiny.close(tiny.loss_and_gradients(model, **inputs), expected, 0.0)
        assert handle.paths == {"reference (a replaced forward of the model)": 1}
    assert "forward" in vars(inner)  # theirs


def test_trained_head_and_embeddings_get_their_gradients() -> None:
    model, inputs = tiny.lora(), turns()
    for name, parameter in model.named_parameters():
        if "lm_head" in name or "embed_tokens" in name or name.endswith("model.norm.weight"):
            parameter.requires_grad_(True)
    expected = run(model, inputs, "reference", tiny.plan(model))
    assert len([name for name in expected[1] if "lora_" not in name]) == 3
    assert tiny.close(run(model, inputs, "fast", tiny.plan(model)), expected)


def test_embeddings_given_by_the_caller_get_their_gradient() -> None:
    model, inputs = tiny.lora(), turns()
    plan = tiny.plan(model, 0.6)
    found = [run(model, inputs, "reference", plan)]
    given = []
    for path in ("reference", "fast"):
        given.append(model.get_base_model().get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_())
        call = {**{name: t for name, t in inputs.items() if name != "input_ids"}, "inputs_embeds": given[-1]}
        found.append(run(model, call, path, plan))
    assert torch.allclose(given[0].grad, given[1].grad, rtol=1e-11, atol=1e-13) and bool(given[0].grad.any())
    assert tiny.close(found[1], found[0]) and tiny.close(found[2], found[0])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_inputs_by_position_are_those_by_name(family: str) -> None:
    model, inputs = tiny.lora(family), turns()
    plan = tiny.plan(model, 0.6)
    expected = run(model, inputs, "reference", plan)
    later = {name: t for name, t in inputs.items() if name != "input_ids"}
    for path in ("reference", "fast"):
        with sparsify(model, plan, path=path) as handle, tiny.InDouble():
            loss = model(inputs["input_ids"], **later, use_cache=False).loss
            loss.backward()
            assert handle.paths == ({"fast": 1} if path == "fast" else {})
        assert tiny.close((loss.detach(), tiny.gradients(model)), expected)


def test_an_unknown_path_is_refused() -> None:
    model = tiny.lora()
    with pytest.raises(InputError, match="path 'quick' is not known: use one of auto, reference, fast"):
        sparsify(model, tiny.plan(model), path="quick")  # type: ignore[arg-type]


def test_a_row_order_that_is_wrong_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.lora(), turns()
    expected = run(model, inputs, "reference", tiny.plan(model))
    right = rows.arrange

    def one_too_many(*args: Any) -> rows.Rows:
        found = right(*args)
        return rows.Rows(**{**vars(found), "sparse": found.sparse + 1})

    monkeypatch.setattr("elision.sparselora.apply.arrange", one_too_many)
    assert not tiny.close(run(model, inputs, "fast", tiny.plan(model)), expected, 1e-6)


@pytest.mark.parametrize("selection", ["sampled", "random", "svd"])
def test_a_default_device_of_the_caller_s_is_left_alone(selection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.set_default_device("cuda")` with a batch, or a model, on the CPU; "meta" stands for a GPU here."""
    monkeypatch.setattr(estimator, "_DIRECT", 1)
    model, inputs = tiny.lora(), holed()
    plan = tiny.plan(model, 0.6, selection=selection)
    expected = run(model, inputs, "fast", plan)
    with torch.device("meta"):
        for path in ("fast", "reference"):
            assert tiny.close(run(model, inputs, path, plan), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_precision_trains_on_either_path(dtype: torch.dtype) -> None:
    """With adapters in single precision, PEFT's default, and in the base's own; against double precision."""
    exact = run(tiny.lora(), turns(), "reference", tiny.plan(tiny.lora(), 0.6))
    for widened in (True, False):
        for path in ("reference", "fast"):
            model = tiny.lora(dtype=dtype)
            for name, parameter in model.named_parameters():
                if "lora_" in name and widened:
                    parameter.data = parameter.data.float()
            with sparsify(model, tiny.plan(model, 0.6), path=path) as handle:
                loss = model(**turns()).loss
                loss.backward()
                assert handle.forwards == {"sparse": 1}
            assert loss.dtype == torch.float32 or path == "reference"
            assert abs(float(loss.detach()) - float(exact[0])) < 0.05 * float(exact[0])
            gradients = tiny.gradients(model)
            assert {g.dtype for g in gradients.values()} == {torch.float32 if widened else dtype}
            assert all(bool(g.isfinite().all()) for g in gradients.values())


def beside() -> dict[str, Any]:
    """What may come to the embeddings and the head of a model that is sparse already."""

    def adapter(**options: Any) -> Any:
        def add(model: Any) -> None:
            model.add_adapter("late", LoraConfig(r=2, init_lora_weights=False, **options))
            model.set_adapter("late")

        return add

    def resized(model: Any) -> None:
        model.get_base_model().resize_token_embeddings(tiny.VOCABULARY + 9, mean_resizing=False)

    return {
        "adapters": adapter(target_modules=["q_proj", "lm_head", "embed_tokens"]),
        "a trained copy": adapter(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "other sizes": resized,
    }


@pytest.mark.parametrize("change", beside())
def test_embeddings_and_head_that_change_later_are_those_that_are_used(change: str) -> None:
    found = []
    for path in ("reference", "fast"):
        model = tiny.lora(targets=tiny.ATTENTION)
        with sparsify(model, tiny.plan(model), path=path) as handle:
            tiny.loss_and_gradients(model, **turns())
            torch.manual_seed(3)
            beside()[change](model)
            model.double()
            found.append(tiny.loss_and_gradients(model, **turns()))
            assert handle.paths == ({"fast": 2} if path == "fast" else {})
    assert tiny.close(found[0], found[1])
    assert any("lm_head" in name for name in found[0][1]) == (change != "other sizes")


@pytest.mark.parametrize("way", ["hook", "forward"])
def test_what_is_trained_on_top_of_the_embeddings_has_its_gradient(way: str) -> None:
    model, found = tiny.lora(), []
    embeddings, shift = model.get_input_embeddings(), nn.Parameter(torch.zeros(32, dtype=torch.float64))
    forward = embeddings.forward
    if way == "hook":
        embeddings.register_forward_hook(lambda _, args, output: output + shift)
    else:
        embeddings.forward = lambda ids: forward(ids) + shift
    for path in ("reference", "auto"):
        with sparsify(model, tiny.plan(model), path=path):
            loss, gradients = tiny.loss_and_gradients(model, **turns())
        assert shift.grad is not None
        found.append((loss, {**gradients, "shift": shift.grad}))
        shift.grad = None
    assert tiny.close(*found)


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_packed_rows_stay_apart_where_nobody_speaks_of_caches(path: Any) -> None:
    """transformers makes a cache unless it is told not to, and with one it tells no sequences of a row apart."""
    model, inputs = tiny.lora(), packed()
    expected = run(model, inputs, "reference", tiny.plan(model))  # which says use_cache=False
    assert model.get_base_model().config.use_cache
    with sparsify(model, tiny.plan(model), path=path), tiny.InDouble():
        loss = model(**inputs).loss
        loss.backward()
    assert tiny.close((loss.detach(), tiny.gradients(model)), expected)
