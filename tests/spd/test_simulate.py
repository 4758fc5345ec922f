"""The simulation against Hugging Face's model, against ranks that compute for themselves, and as a good guest."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from elision import InputError
from elision.blocks import decoder
from elision.spd import SyncPlan, simulate
from tests.spd.ranks import logits_in_threads
from tests.spd.tiny import FAMILIES, bits, left_padded, tiny, token_ids

ALL = (0, 1, 2)
EXACT = {"rtol": 0.0, "atol": 1e-12}


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    return model(**(inputs or {"input_ids": token_ids()})).logits


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_empty_plan_is_the_model_bit_for_bit(self, family):
        model = tiny(family)
        dense = logits(model)
        with simulate(model, SyncPlan(ranks=3)):
            assert torch.equal(logits(model), dense)

    def test_one_rank_is_the_model_for_any_plan(self, family):
        model = tiny(family)
        dense = logits(model)
        for dropped in ((0,), (1, 2), ALL):
            with simulate(model, SyncPlan(ranks=1, dropped=dropped)):
                torch.testing.assert_close(logits(model), dense, **EXACT)

    def test_ranks_with_all_syncs_are_the_model(self, family):
        model = tiny(family)
        for ranks in (2, 3, 6):
            if family == "opt" or ranks != 2:  # 2 ranks cannot share 3 key/value heads
                torch.testing.assert_close(logits_in_threads(model, token_ids(), ranks, ()), logits(model), **EXACT)

    @pytest.mark.parametrize("dropped", [(1,), ALL])
    def test_dropped_syncs_are_what_the_ranks_compute(self, family, dropped):
        model = tiny(family)
        dense = logits(model)
        for ranks in (3, 6):  # 6: each key/value head on two ranks; neither divides the 40 channels
            expected = logits_in_threads(model, token_ids(), ranks, dropped)
            with simulate(model, SyncPlan(ranks, dropped)):
                torch.testing.assert_close(logits(model), expected, **EXACT)
            assert (expected - dense).abs().max() > 1e-3  # the test could fail: dropping matters here

    def test_skipped_attention_is_attention_that_puts_out_nothing(self, family):
        model = tiny(family)
        dense, silent = logits(model), copy.deepcopy(model)
        for block in decoder(silent).blocks[:2]:
            for parameter in block.o.base.parameters():
                torch.nn.init.zeros_(parameter)
        for ranks in (1, 3, 6):
            with simulate(model, SyncPlan(ranks, skipped=(0, 1))):
                torch.testing.assert_close(logits(model), logits(silent), **EXACT)
        assert (logits(silent) - dense).abs().max() > 1e-3

    @pytest.mark.parametrize("plan", [SyncPlan(3, (0, 2)), SyncPlan(3, (1,), int8=(2,), skipped=(0,))])
    def test_generate_with_cache_is_greedy_without(self, family, plan):
        model = tiny(family)
        batch = left_padded()
        with simulate(model, plan):
            cached = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            for _ in range(6):
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                step = logits(model, input_ids=ids, attention_mask=mask, position_ids=positions)[:, -1:].argmax(-1)
                ids, mask = torch.cat([ids, step], -1), torch.cat([mask, torch.ones_like(step)], -1)
        assert torch.equal(cached, ids)
        dense = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert not torch.equal(cached, dense)

    def test_a_static_cache_filled_in_chunks_is_told_of_tokens_that_attention_skips(self, family):
        model = tiny(family)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        with simulate(model, SyncPlan(3, skipped=(0, 2))):
            cached = model.generate(**left_padded(), **options)
            static = {"cache_implementation": "static", "prefill_chunk_size": 3}  # which makes room ahead of all blocks
            assert torch.equal(model.generate(**left_padded(), **options, **static), cached)

    def test_removal_restores_bit_for_bit(self, family):
        model = tiny(family)
        dense, state, keys = logits(model), bits(model), [vars(module).keys() for module in model.modules()]
        keys = [set(names) for names in keys]
        handle = simulate(model, SyncPlan(ranks=3, dropped=ALL))
        assert bits(model) == state
        assert not torch.equal(logits(model), dense)
        handle.remove()
        handle.remove()
        assert torch.equal(logits(model), dense) and bits(model) == state
        assert [set(vars(module)) for module in model.modules()] == keys


def test_padding_does_not_reach_real_tokens():
    model = tiny("llama")
    batch = left_padded()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with simulate(model, SyncPlan(ranks=3, dropped=ALL)):
        together = logits(model, **batch, position_ids=positions)[0, 3:]
        alone = logits(model, input_ids=batch["input_ids"][:1, 3:])[0]
    torch.testing.assert_close(together, alone, **EXACT)


def few_lines_llama(model, ids: torch.Tensor, ranks: int) -> torch.Tensor:
    """Llama with every sync after attention dropped, from the state dict alone; one key/value head per head."""
    w, config = dict(model.named_parameters()), model.config
    heads, d = config.num_attention_heads, config.head_dim
    mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)
    # Hugging Face makes the rotation's angles and the norms in float32, and so does this; all else is float64.
    inverse = 1.0 / 10000.0 ** (torch.arange(0, d, 2).float() / d)
    angle = (torch.arange(ids.shape[1]).float()[:, None] * inverse).repeat(1, 2)
    cos, sin = angle.cos().double(), angle.sin().double()

    def norm(t, name):
        t = t.float()
        return (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)).double() * w[name]

    def turn(t):
        return t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * sin

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}."
        h = norm(x, p + "input_layernorm.weight")
        q, k, v = (
            (h @ w[f"{p}self_attn.{n}_proj.weight"].T + w[f"{p}self_attn.{n}_proj.bias"])
            .unflatten(-1, (heads, d))
            .transpose(1, 2)
            for n in "qkv"
        )
        a = ((turn(q) @ turn(k).mT * d**-0.5 + mask).softmax(-1) @ v).transpose(1, 2)
        total = 0
        for rank in range(ranks):
            own = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
            columns = slice(own.start * d, own.stop * d)
            partial = a[:, :, own].flatten(-2) @ w[p + "self_attn.o_proj.weight"][:, columns].T
            h = norm(x + partial + w[p + "self_attn.o_proj.bias"], p + "post_attention_layernorm.weight")
            size = config.intermediate_size // ranks
            mine = slice(rank * size, (rank + 1) * size)
            gate = h @ w[p + "mlp.gate_proj.weight"][mine].T + w[p + "mlp.gate_proj.bias"][mine]
            up = h @ w[p + "mlp.up_proj.weight"][mine].T + w[p + "mlp.up_proj.bias"][mine]
            total = total + partial + (gate * gate.sigmoid() * up) @ w[p + "mlp.down_proj.weight"][:, mine].T
        x = x + total + w[p + "self_attn.o_proj.bias"] + w[p + "mlp.down_proj.bias"]
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def few_lines_opt(model, ids: torch.Tensor, ranks: int) -> torch.Tensor:
    """The same for OPT, whose norms have a mean and whose every map has a bias."""
    w, config = dict(model.named_parameters()), model.config
    heads, d = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)

    def norm(t, name):
        centred = t - t.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[name + ".weight"] + w[name + ".bias"]

    x = w["model.decoder.embed_tokens.weight"][ids] + w["model.decoder.embed_positions.weight"][2:][: ids.shape[1]]
    for layer in range(config.num_hidden_layers):
        p = f"model.decoder.layers.{layer}."
        h = norm(x, p + "self_attn_layer_norm")
        q, k, v = (
            (h @ w[f"{p}self_attn.{n}_proj.weight"].T + w[f"{p}self_attn.{n}_proj.bias"])
            .unflatten(-1, (heads, d))
            .transpose(1, 2)
            for n in "qkv"
        )
        a = ((q @ k.mT * d**-0.5 + mask).softmax(-1) @ v).transpose(1, 2)
        total = 0
        for rank in range(ranks):
            own = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
            columns = slice(own.start * d, own.stop * d)
            partial = a[:, :, own].flatten(-2) @ w[p + "self_attn.out_proj.weight"][:, columns].T
            h = norm(x + partial + w[p + "self_attn.out_proj.bias"], p + "final_layer_norm")
            size = config.ffn_dim // ranks
            mine = slice(rank * size, (rank + 1) * size)
            inner = (h @ w[p + "fc1.weight"][mine].T + w[p + "fc1.bias"][mine]).relu()
            total = total + partial + inner @ w[p + "fc2.weight"][:, mine].T
        x = x + total + w[p + "self_attn.out_proj.bias"] + w[p + "fc2.bias"]
    return norm(x, "model.decoder.final_layer_norm") @ w["model.decoder.embed_tokens.weight"].T


@pytest.mark.parametrize(
    ("family", "formula", "sizes"),
    [
        ("llama", few_lines_llama, {"num_key_value_heads": 6, "intermediate_size": 36}),
        ("opt", few_lines_opt, {"ffn_dim": 36}),
    ],
)
@pytest.mark.parametrize("ranks", [2, 6])
def test_all_dropped_is_an_independent_formula_with_its_gradients(family, formula, sizes, ranks):
    model = tiny(family, **sizes)
    expected = formula(model, token_ids(), ranks)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weight).sum(), list(model.parameters()))
    with simulate(model, SyncPlan(ranks, ALL)):
        simulated = model(token_ids()).logits
        own = torch.autograd.grad((simulated * weight).sum(), list(model.parameters()))
    torch.testing.assert_close(simulated, expected, **EXACT)
    for mine, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_permuting_whole_heads_changes_spd_and_not_the_plain_ranks():
    """Query heads move with their key/value head; plain tensor parallelism must not notice."""
    model = tiny("llama")
    permuted = copy.deepcopy(model)
    kv_order = [2, 0, 1]
    q_order = [kv * 2 + g for kv in kv_order for g in (0, 1)]
    d = model.config.head_dim
    q_rows, kv_rows = ([h * d + c for h in order for c in range(d)] for order in (q_order, kv_order))
    with torch.no_grad():
        for layer in permuted.model.layers:
            for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
                projection = getattr(layer.self_attn, name)
                projection.weight.copy_(projection.weight[rows])
                projection.bias.copy_(projection.bias[rows])
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight[:, q_rows])
    plain = [logits_in_threads(m, token_ids(), 3, ()) for m in (model, permuted)]
    spd = [logits_in_threads(m, token_ids(), 3, ALL) for m in (model, permuted)]
    torch.testing.assert_close(*plain, **EXACT)
    assert (spd[0] - spd[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bf16_is_as_close_to_float64_as_the_dense_model_is(family):
    exact, low = tiny(family), tiny(family, dtype=torch.bfloat16)
    dense_error = (logits(low).double() - logits(exact)).abs().mean()
    plan = SyncPlan(ranks=3, dropped=ALL)
    with simulate(exact, plan), simulate(low, plan):
        error = (logits(low).double() - logits(exact)).abs().mean()
    assert 0 < error <= 2 * dense_error


def test_a_second_model_is_untouched_and_a_copy_is_its_own():
    model, other = tiny("llama"), tiny("llama", seed=5)
    before = logits(other)
    with simulate(model, SyncPlan(ranks=3, dropped=ALL)):
        assert torch.equal(logits(other), before)
        twin = copy.deepcopy(model)
        simulated = logits(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(logits(twin), simulated)  # still simulated, with weights of its own
        assert not torch.equal(logits(model), simulated)


def test_an_exception_inside_removes_the_simulation():
    model = tiny("opt")
    dense = logits(model)
    with pytest.raises(RuntimeError, match="inside"), simulate(model, SyncPlan(ranks=2, dropped=ALL)):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), dense)


def test_hidden_states_and_attentions_are_recorded():
    model = tiny("llama", attn_implementation="eager")
    with torch.no_grad():
        dense = model(token_ids(), output_hidden_states=True, output_attentions=True)
        with simulate(model, SyncPlan(ranks=3, dropped=(1,))):
            spd = model(token_ids(), output_hidden_states=True, output_attentions=True)
    assert len(spd.hidden_states) == 4 and len(spd.attentions) == 3
    assert torch.equal(spd.hidden_states[1], dense.hidden_states[1])
    assert torch.equal(spd.attentions[1], dense.attentions[1])  # same input, heads do not mix
    assert not torch.equal(spd.hidden_states[2], dense.hidden_states[2])


# peft 0.21 asks transformers 5.23 for a property by its former name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_merged_adapter_is_simulated_and_an_unmerged_one_refused():
    model = tiny("llama")
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    plan = SyncPlan(ranks=3, dropped=ALL)
    with pytest.raises(InputError, match=r"block 0's q projection carries an adapter: .*merge_and_unload"):
        simulate(peft_model, plan)
    dense = logits(peft_model)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(merged), dense, rtol=0, atol=1e-5)  # peft keeps adapters in float32
    expected = logits_in_threads(merged, token_ids(), plan.ranks, plan.dropped)
    with simulate(merged, plan):
        torch.testing.assert_close(logits(merged), expected, **EXACT)


def test_an_adapter_put_on_a_simulated_model_is_refused_where_it_would_not_act():
    where = {
        "q_proj": None,
        "o_proj": (0, "o"),
        "gate_proj": (0, "gate"),
        "up_proj": (0, "up"),
        "down_proj": (0, "down"),
    }
    for plan in (SyncPlan(3, ALL), SyncPlan(3, int8=ALL), SyncPlan(3, skipped=ALL)):
        for target, refused in where.items():
            model = tiny("llama")
            with simulate(model, plan) as simulation:
                adapted = get_peft_model(model, LoraConfig(target_modules=[target], r=2, init_lora_weights=False))
                if refused is not None:
                    sentence = "block {}'s {} projection carries an adapter, .*: merge it".format(*refused)
                    with pytest.raises(InputError, match=sentence):
                        logits(adapted)
                    continue
                found = logits(adapted)
            simulation.remove()
            with simulate(adapted.merge_and_unload(), plan):
                torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-5)


class TestRefusals:
    def refuse(self, match: str, model, plan: SyncPlan) -> None:
        before = [set(vars(module)) for module in model.modules()]
        with pytest.raises(InputError, match=match) as caught:
            simulate(model, plan)
        assert "\n" not in str(caught.value)
        assert [set(vars(module)) for module in model.modules()] == before

    def test_ranks_that_do_not_divide_the_heads(self):
        self.refuse("ranks=3 .* 8 attention heads", tiny("llama", num_attention_heads=8, head_dim=4), SyncPlan(3))

    def test_ranks_that_do_not_fit_the_key_value_heads(self):
        self.refuse("ranks=2 .* 3 key/value heads", tiny("llama"), SyncPlan(ranks=2))

    def test_a_block_that_does_not_exist(self):
        self.refuse("dropped block 3 does not exist", tiny("llama"), SyncPlan(ranks=3, dropped=(1, 3)))

    def test_a_model_whose_norms_sit_elsewhere(self):
        self.refuse("do_layer_norm_before", tiny("opt", do_layer_norm_before=False), SyncPlan(ranks=2, dropped=(0,)))

    def test_a_second_simulation_whatever_its_blocks(self):
        model = tiny("llama")
        with simulate(model, SyncPlan(ranks=3, dropped=(1,))):
            for dropped in ((0, 1), (0,), ()):
                self.refuse("block 1's forward is replaced already", model, SyncPlan(ranks=3, dropped=dropped))
        with simulate(model, SyncPlan(ranks=3, dropped=(0,))):
            pass

    def test_a_device_map_of_several_devices(self):
        from accelerate import dispatch_model

        devices = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        model = dispatch_model(tiny("llama"), {**devices, "model.rotary_emb": "cpu"}, force_hooks=True)
        self.refuse("block 1 is dispatched by accelerate, .* or read it block by block", model, SyncPlan(3, (1,)))

    def test_offloaded_weights(self):
        model = tiny("llama")
        model.model.layers[1].mlp.to("meta")
        self.refuse("block 1's gate projection is offloaded", model, SyncPlan(ranks=3, dropped=(1,)))
