"""sparsify and its handle: when a forward is sparse, what stays as it was, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from elision import blocks, sparselora
from elision.errors import InputError
from elision.sparselora import SparsityPlan
from elision.sparselora.reference import MaskedLinear
from tests.sparselora import tiny

sparsify = partial(sparselora.sparsify, path="reference")


def masked(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, MaskedLinear)]


def everything(model: nn.Module) -> tuple:
    """Identity of every module, parameter and hook, the training flags, and the bits of the state dict."""
    modules = list(model.named_modules())
    hooks = [
        [list(getattr(module, name)) for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")]
        for _, module in modules
    ]
    return (
        [(name, id(module), type(module), module.training, sorted(vars(module))) for name, module in modules],
        [(name, id(parameter)) for name, parameter in model.named_parameters()],
        hooks,
        tiny.bits(model),
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_removal_leaves_the_model_as_it_was_bit_for_bit(family: str) -> None:
    model, inputs = tiny.lora(family), tiny.batch()
    before, dense = everything(model), tiny.loss_and_gradients(model, **inputs)
    names = list(model.state_dict())
    handle = sparsify(model, tiny.plan(model))
    assert masked(model)
    assert list(model.state_dict()) == names and tiny.bits(model) == before[3]
    assert not tiny.close(tiny.loss_and_gradients(model, **inputs), dense, 1e-6)
    assert [id(p) for p in model.parameters()] == [i for _, i in before[1]]
    handle.remove()
    handle.remove()  # a second time does nothing
    assert everything(model) == before
    assert tiny.close(tiny.loss_and_gradients(model, **inputs), dense, 0.0)
    assert "removed" in handle.summary()


def test_the_with_block_removes_after_an_error_too() -> None:
    model = tiny.lora()
    before = everything(model)
    with pytest.raises(ZeroDivisionError), sparsify(model, tiny.plan(model)):
        model.eval()
        model(**tiny.batch())
        raise ZeroDivisionError
    assert everything(model) != before
    model.train()  # what changed in between is the user's, as in any model
    assert everything(model) == before


def test_a_second_model_is_untouched_and_two_do_not_interfere() -> None:
    one, two, three, inputs = tiny.lora("llama"), tiny.lora("opt"), tiny.lora("llama"), tiny.batch()
    alone = {}
    for name, model, sparsity in (("one", one, 0.5), ("two", two, 0.7)):
        with sparsify(model, tiny.plan(model, sparsity)):
            alone[name] = tiny.loss_and_gradients(model, **inputs)
    dense, before = tiny.loss_and_gradients(three, **inputs), everything(three)
    with sparsify(one, tiny.plan(one, 0.5)), sparsify(two, tiny.plan(two, 0.7)):
        first, second = tiny.loss_of(one, **inputs), tiny.loss_of(two, **inputs)
        assert tiny.close(tiny.loss_and_gradients(three, **inputs), dense, 0.0)
        assert everything(three) == before
        (first + second).backward()
        assert tiny.close((first.detach(), tiny.gradients(one)), alone["one"], 0.0)
        assert tiny.close((second.detach(), tiny.gradients(two)), alone["two"], 0.0)


def test_no_class_is_changed() -> None:
    model = tiny.lora()
    kinds = {type(module) for module in model.modules()} | {nn.Linear, nn.Module}
    before = {kind: dict(vars(kind)) for kind in kinds}
    with sparsify(model, tiny.plan(model)):
        model(**tiny.batch()).loss.backward()
        assert {kind: dict(vars(kind)) for kind in kinds} == before


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_when_a_forward_is_dense() -> None:
    model, inputs = tiny.lora(), tiny.batch()
    bare = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = logits(model, **inputs)
    with model.disable_adapter():
        without = logits(model, **inputs)
    unlabelled = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    outputs = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    with sparsify(model, tiny.plan(model)) as handle:

        def reason(expected: Tensor, **inputs: Any) -> str:
            handle.forwards.clear()
            assert torch.equal(logits(model, **inputs), expected)
            assert handle.kept == {} or handle.forwards.total() == 1
            return next(iter(handle.forwards))

        assert reason(expected, **bare) == "dense (no labels in the call)"
        assert reason(expected, **unlabelled) == "dense (no label to predict)"
        assert reason(expected, **outputs) == "dense (no context token before an output token)"
        model.eval()
        assert reason(expected, **inputs) == "dense (eval mode)"
        model.train()
        with model.disable_adapter():
            assert reason(without, **inputs) == "dense (adapters disabled)"
        model.merge_adapter()
        handle.forwards.clear()
        assert torch.allclose(logits(model, **inputs), expected)
        assert handle.forwards == {"dense (adapters merged)": 1}
        model.unmerge_adapter()
        handle.forwards.clear()
        model.generate(**bare, max_new_tokens=3, do_sample=False)  # in train mode
        assert handle.forwards == {"dense (no labels in the call)": 3}
        past = model(input_ids=inputs["input_ids"][:, :2]).past_key_values
        handle.forwards.clear()
        model(input_ids=inputs["input_ids"][:, 2:], labels=inputs["labels"][:, 2:], past_key_values=past)
        assert handle.forwards == {"dense (a key/value cache in the call)": 1}
        handle.forwards.clear()
        assert not torch.equal(logits(model, **inputs), expected)  # under no_grad all the same
        assert handle.forwards == {"sparse": 1}


def test_generate_is_that_of_the_dense_model() -> None:
    model = tiny.lora().eval()
    ids = tiny.batch()["input_ids"][:1, :5]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**arguments)
    with sparsify(model, tiny.plan(model)):
        assert torch.equal(model.generate(**arguments), expected)
        assert torch.equal(model.train().generate(**arguments), expected)


def test_the_first_steps_are_dense() -> None:
    model, inputs = tiny.lora(), tiny.batch()
    with sparsify(model, tiny.plan(model, dense_steps=0.1)) as handle:
        for step in range(20):
            handle.step(step / 20)
            model(**inputs)
        assert handle.forwards == {"dense (first steps)": 2, "sparse": 18}
        with pytest.raises(InputError, match=r"step\(1\.5\) is not in \[0, 1\]"):
            handle.step(1.5)
        with pytest.raises(InputError, match=r"step\(nan\)"):
            handle.step(float("nan"))


def test_a_loop_that_forgets_the_schedule_is_told_once() -> None:
    model, inputs = tiny.lora(), tiny.batch()
    with sparsify(model, tiny.plan(model, dense_steps=0.1)) as handle:
        with pytest.warns(UserWarning, match=r"pass callbacks=\[handle.schedule\]"):
            model(**inputs)
        model(**inputs)  # warnings are errors here: a second one would fail
        assert handle.forwards == {"dense (the schedule was never told a step)": 2}
        handle.step(0.5)
        model(**inputs)
        assert handle.forwards["sparse"] == 1


@pytest.mark.parametrize("forgotten", ["train", "the model itself"])
def test_a_loop_without_a_training_forward_is_told_once(forgotten: str) -> None:
    model, inputs = tiny.lora(), tiny.batch()
    call = model if forgotten == "train" else model.get_base_model().forward
    with sparsify(model, tiny.plan(model)) as handle:
        handle.step(0.0)
        handle.step(0.0)  # a Trainer begins so
        model(**inputs)
        model.eval()(**inputs)  # evaluation
        model.train(forgotten != "train")
        handle.step(0.1)
        call(**inputs)
        with pytest.warns(UserWarning, match=r"no forward in train mode since the last step, .* call model.train\(\)"):
            handle.step(0.2)
        call(**inputs)
        handle.step(0.3)
        assert handle.forwards["sparse"] == 1


def test_a_run_behind_the_with_block_is_told_once() -> None:
    model = tiny.lora()
    with sparsify(model, tiny.plan(model)) as handle:
        handle.step(0.0)
    with pytest.warns(UserWarning, match="removed from the model, so training is dense: train within the with block"):
        handle.step(0.5)
    handle.step(0.6)


def test_the_summary_is_one_line_that_says_what_and_why() -> None:
    model = tiny.lora()
    with sparsify(model, SparsityPlan.uniform(model, 0.75, layers=[1])) as handle:
        assert handle.summary() == (
            "SparseLoRA, sampled selection: ffn 75% in 1; qk 75% in 1; vo 75% in 1; dense: output tokens, the "
            "first 5% of steps, adapters, eval and generate; on the reference path, as asked for"
        )
        assert str(handle) == handle.summary()
        handle.step(1.0)
        model(**tiny.batch())
        model.eval()(**tiny.batch())
        assert handle.summary().endswith("; forwards so far: 1 sparse, 1 dense (eval mode)")


def test_arguments_by_position_and_embeddings() -> None:
    model, inputs = tiny.lora(), tiny.batch()
    inner = model.get_base_model()
    embeddings = inner.get_input_embeddings()(inputs["input_ids"]).detach()
    with sparsify(model, tiny.plan(model)) as handle:
        expected = logits(model, **inputs)
        # PEFT's order is (input_ids, attention_mask, inputs_embeds, labels), that of transformers has positions third
        assert torch.equal(
            logits_of(model, inputs["input_ids"], inputs["attention_mask"], None, inputs["labels"]), expected
        )
        positions = torch.arange(8)[None].expand(2, 8)
        call = (inputs["input_ids"], inputs["attention_mask"], positions, None, None, inputs["labels"])
        assert torch.equal(logits_of(inner, *call), expected)
        rest = {name: inputs[name] for name in ("attention_mask", "labels")}
        assert torch.equal(logits(model, inputs_embeds=embeddings, **rest), expected)
        assert handle.forwards == {"sparse": 4}


def logits_of(model: Any, *args: Any) -> Tensor:
    with torch.no_grad():
        return model(*args).logits


def test_an_adapter_added_through_transformers() -> None:
    plain = tiny.base().train()
    plain.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    plain = plain.to(torch.float64)
    inputs = tiny.batch()
    with sparsify(plain, tiny.plan(plain)) as handle:
        plain(**inputs).loss.backward()
        assert handle.forwards == {"sparse": 1}
        plain.disable_adapters()
        plain(**inputs)
        assert handle.forwards["dense (adapters disabled)"] == 1


def as_it_is(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward and backward; in backward, where forwards are computed again, tiny.InDouble would not reach them."""
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), tiny.gradients(model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_equal_gradients(family: str, reentrant: bool) -> None:
    model, inputs = tiny.lora(family), tiny.batch()
    model.enable_input_require_grads()
    with sparsify(model, tiny.plan(model)) as handle:
        expected = as_it_is(model, **inputs)
        tiny.checkpoint(model, reentrant)
        assert tiny.close(as_it_is(model, **inputs), expected, 1e-14)
        assert handle.forwards == {"sparse": 2}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch on reentrant under no_grad
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("selection", ["oracle", "random"])
def test_recomputation_finds_its_own_batch_behind_other_forwards(reentrant: bool, selection: Any) -> None:
    """As in DPO (a dense reference pass between forward and backward) and with several losses in one backward."""
    model, one, two = tiny.lora(), tiny.batch(), tiny.batch((4, 2, 6), (2, 4, 1), left=True)
    model.enable_input_require_grads()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        with sparsify(model, tiny.plan(model, selection=selection)) as handle:
            loss = model(**one, use_cache=False).loss + 2 * model(**two, use_cache=False).loss
            with torch.no_grad(), model.disable_adapter():
                model(**one)
            model.eval()
            model(**two)
            model.train()
            loss.backward()
            assert handle.forwards["sparse"] == 2
        return loss.detach(), tiny.gradients(model)

    expected = run()
    tiny.checkpoint(model, reentrant)
    assert tiny.close(run(), expected, 1e-13)


def test_merging_while_sparse_gives_the_plain_merged_model() -> None:
    expected, model = tiny.lora().merge_and_unload(), tiny.lora()
    handle = sparsify(model, tiny.plan(model))
    tiny.loss_and_gradients(model, **tiny.batch())
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(expected.state_dict())
    assert tiny.bits(merged) == tiny.bits(expected)
    merged(**tiny.batch())
    assert handle.forwards["dense (no active adapter)"] == 1
    handle.remove()
    assert not masked(merged) and not masked(model)
    assert {type(m) for m in merged.modules()} == {type(m) for m in expected.modules()}
    assert torch.equal(logits(merged.eval(), **tiny.batch()), logits(expected.eval(), **tiny.batch()))


def test_adapters_come_and_go_while_sparse() -> None:
    model, inputs = tiny.lora(), tiny.batch()
    handle = sparsify(model, tiny.plan(model))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    model.set_adapter("other")
    assert handle.kept == {}
    _, gradients = tiny.loss_and_gradients(model, **inputs)
    assert handle.forwards == {"sparse": 1}
    assert all(".other." in name for name in gradients)
    model.set_adapter("default")
    model.delete_adapter("other")
    handle.remove()
    assert not masked(model)


def test_parameters_replaced_meanwhile_are_kept_on_removal() -> None:
    model = tiny.lora()
    handle = sparsify(model, tiny.plan(model))
    projection = blocks.decoder(model).blocks[0].q
    replaced = nn.Parameter(torch.zeros_like(projection.weight))
    projection.base.weight = replaced
    model.to(torch.float32)
    handle.remove()
    assert projection.base.weight is replaced and replaced.dtype == torch.float32
    assert type(projection.base) is nn.Linear


def test_hooks_on_frozen_maps_keep_firing() -> None:
    model, calls = tiny.lora(), []
    base = blocks.decoder(model).blocks[0].q.base
    hook = base.register_forward_hook(lambda *_: calls.append(1))
    with sparsify(model, tiny.plan(model)):
        model(**tiny.batch())
    model(**tiny.batch())
    assert len(calls) == 2
    hook.remove()
    assert not base._forward_hooks


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_a_sparse_model_is_not_copied(path: Any) -> None:
    model = tiny.lora()
    with sparsify(model, tiny.plan(model), path=path):
        before = everything(model)
        for part in (model, model.get_base_model(), model.get_base_model().model):
            with pytest.raises(InputError, match=r"copy it before sparsify, or remove\(\) its handle"):
                copy.deepcopy(part)
        assert everything(model) == before
    assert tiny.bits(copy.deepcopy(model)) == tiny.bits(model)


def test_held_channels_are_used_until_let_go() -> None:
    model, one, two = tiny.lora(), tiny.batch(), tiny.batch((7, 6), (1, 2))
    with sparsify(model, tiny.plan(model)) as handle:
        model(**one)
        first = {key: kept.tolist() for key, kept in handle.kept.items()}
        handle.hold(handle.kept)
        model(**two)
        assert {key: kept.tolist() for key, kept in handle.kept.items()} == first
        handle.hold(None)
        model(**two)
        assert {key: kept.tolist() for key, kept in handle.kept.items()} != first


def refused(model: nn.Module, plan: Any, message: str) -> None:
    before = everything(model)
    with pytest.raises(InputError, match=message) as caught:
        sparsify(model, plan)
    assert "\n" not in str(caught.value)
    assert everything(model) == before


def test_refusals_name_what_is_wrong_and_change_nothing() -> None:
    model = tiny.lora()
    plan = tiny.plan(model)
    refused(tiny.lora("opt"), plan, "type llama, this model has type opt: calibrate a plan for this model")
    refused(tiny.lora(num_hidden_layers=3), plan, "layers 2, this model has layers 3")
    refused(tiny.lora(intermediate_size=44), plan, "intermediate 40, this model has intermediate 44")
    refused(model, "plan.json", r"plan is a str, not a SparsityPlan: use SparsityPlan.load\(path\)")
    refused(nn.Linear(2, 2), plan, "Linear is not a transformers causal language model")
    refused(tiny.base(), plan, "no LoRA adapter to train: add one with peft.get_peft_model")
    dropping = LoraConfig(target_modules=["q_proj"], use_dora=True, lora_dropout=0.1)
    named = "q_proj of layer 0 has adapter 'default' with DoRA and lora_dropout"
    refused(tiny.peft_model(tiny.base(), dropping), plan, named)
    ia3 = tiny.peft_model(tiny.base(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    refused(ia3, plan, "no LoRA adapter to train")
    adalora = tiny.peft_model(tiny.base(), AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    refused(adalora, plan, "model has an AdaLoRA adapter: SparseLoRA covers LoRA and DoRA, use LoraConfig")
    told = sparselora.forecast(adalora, [tiny.batch()], plan)
    assert told.obstacle == "an AdaLoRA adapter at q in layer 0"
    inside = LoraConfig(target_modules=["k_proj"], target_parameters=["self_attn.v_proj.weight"])
    named = "v_proj of layer 0 has its adapter from target_parameters, which would be pruned with the base: name it"
    refused(tiny.peft_model(tiny.base(), inside), plan, named)
    opt = tiny.lora("opt")
    refused(
        opt, tiny.plan(opt, rotary_pairs=True), "rotary_pairs is set, but 0 of 8 dimensions of a head rotate in opt"
    )


def test_an_adapter_that_cannot_be_trained_is_refused() -> None:
    model = tiny.lora()
    plan = tiny.plan(model)
    with model.disable_adapter():
        refused(model, plan, "model has adapters disabled, so there is nothing to train")
    model.merge_adapter()
    refused(model, plan, "model has adapters merged")
    model.unmerge_adapter()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    refused(model, plan, "adapter 'default' is not trainable: load it with is_trainable=True")


def test_a_sparse_model_is_not_made_sparse_again() -> None:
    model = tiny.lora()
    with sparsify(model, tiny.plan(model)):
        refused(model, tiny.plan(model), r"model is sparse already: remove\(\) its first handle")
        with pytest.raises(InputError, match="model is sparse already"):
            sparselora.calibrate(model, [tiny.batch((9,), (2,))], flops=0.9)
    sparsify(model, tiny.plan(model)).remove()


@pytest.mark.parametrize("path", ["reference", "auto"])
def test_nor_is_one_with_a_handle_that_masks_nothing(path: Any) -> None:
    model = tiny.lora()
    with sparselora.lossless(model, path=path):
        refused(model, tiny.plan(model), r"model is sparse already: remove\(\) its first handle")
        with pytest.raises(InputError, match="model is sparse already"):
            sparselora.lossless(model)
    with sparsify(model, tiny.plan(model)), pytest.raises(InputError, match="model is sparse already"):
        sparselora.lossless(model)
    sparselora.lossless(model, path=path).remove()


def test_a_base_that_is_no_plain_linear_map_is_refused() -> None:
    class Quantised(nn.Linear):
        pass

    model = tiny.lora()
    plan = tiny.plan(model, selection="random", parts=("ffn",))
    holder, attribute = blocks.decoder(model).blocks[1].up.slot
    setattr(holder, attribute, Quantised(32, 40, bias=False))
    refused(
        model,
        plan,
        "up_proj of layer 1 is Quantised, not a plain nn.Linear: load the model unquantised, in bitsandbytes",
    )
    sparsify(model, tiny.plan(model, selection="random", parts=("qk", "vo"))).remove()  # not touched there
    with pytest.raises(InputError, match="up_proj of layer 1 is Quantised"):
        sparselora.calibrate(model, [tiny.batch((9,), (2,))], flops=0.9)


def test_a_base_that_has_no_weight_of_that_name_is_refused() -> None:
    class Packed(nn.Module):
        """As GPTQ and AWQ have them."""

        in_features, out_features, bias = 32, 32, None

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = tiny.lora(targets=r".*\.v_proj")
    blocks.decoder(model).blocks[0].attention.q_proj = Packed()
    message = "q_proj of layer 0 is Packed, not a plain nn.Linear"
    refused(model, tiny.plan(model), message)
    with pytest.raises(InputError, match=message):
        sparselora.calibrate(model, [tiny.batch((9,), (2,))], flops=0.9)
    with sparselora.lossless(model) as handle:
        model(**tiny.batch()).loss.backward()
        assert handle.paths == {"reference (Packed at q in layer 0)": 1}


def test_weights_that_deepspeed_partitions_are_refused() -> None:
    message = "partitioned by DeepSpeed ZeRO-3, which SparseLoRA does not cover: use ZeRO-2 or FSDP2"
    model = tiny.lora()
    with sparsify(model, tiny.plan(model)):
        blocks.decoder(model).blocks[0].q.weight.ds_id = 0  # type: ignore[attr-defined]  # as zero.Init marks them
        with pytest.raises(InputError, match=message):
            model(**tiny.batch())
    refused(model, tiny.plan(model), message)


def test_fsdp1_is_refused_when_it_comes() -> None:
    message = "flattened by FSDP1, which SparseLoRA does not cover: use FSDP2, fsdp_version=2"
    model = tiny.lora()
    layer = blocks.decoder(model).blocks[0].layer
    own = type(layer)
    with sparsify(model, tiny.plan(model)):
        layer.__class__ = FullyShardedDataParallel  # accelerate puts one around each layer, after sparsify
        with pytest.raises(InputError, match=message):
            model(**tiny.batch())
        with pytest.raises(InputError, match=message):
            sparselora.sparsify(model, tiny.plan(model))
        layer.__class__ = own


def test_an_unknown_family_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11))
    refused(model, tiny.plan(tiny.lora()), "model_type 'gpt2' is not supported")


def test_labels_of_another_shape_are_refused_in_the_forward() -> None:
    model, inputs = tiny.lora(), tiny.batch()
    with sparsify(model, tiny.plan(model)), pytest.raises(InputError, match=r"attention_mask has shape \(2, 1, 8, 8\)"):
        model(**{**inputs, "attention_mask": torch.ones(2, 1, 8, 8, dtype=torch.bool)})


def test_labels_of_another_length_are_refused() -> None:
    model = tiny.lora()
    ids = torch.randint(3, 61, (2, 10))
    labels = ids[:, :8].clone()
    labels[:, :5] = -100
    with sparsify(model, tiny.plan(model)), pytest.raises(InputError, match=r"labels have shape \(2, 8\), the inputs"):
        model(input_ids=ids, labels=labels)


@pytest.mark.parametrize("kept", ["tail", "padding", "logits"])
def test_sparse_outputs_beside_dense_rows_take_the_reference(kept: str) -> None:
    """The fast step takes a prefix of its rows as sparse; dense rows in between would be taken for them."""
    model, batch = tiny.lora(), tiny.batch()
    plan, elisions = tiny.plan(model, 0.5, dense_outputs=False), sparselora.Elisions(**{kept: False})
    losses = []
    for path in ("reference", "auto"):
        with sparsify(model, plan, path=path, elisions=elisions) as handle:
            losses.append(tiny.loss_of(model, **batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert "reference (sparse output tokens beside dense rows that are not left out)" in handle.paths


@pytest.mark.parametrize("path", ["reference", "auto"])
def test_replicas_of_data_parallel_are_refused(path: Any) -> None:
    """nn.DataParallel would run them in threads, on one handle, and through the original's forward."""
    model = tiny.lora()
    with sparsify(model, tiny.plan(model), path=path), pytest.raises(InputError, match=r"nn\.DataParallel, as Trainer"):
        model.get_base_model()._replicate_for_data_parallel()(**tiny.batch())
