"""What a config alone says: its family, what each method's maths makes of it, how many ranks may share it.

A family is a row of `FAMILIES`, keyed by the config's model_type: the names its modules go by, and no code. The
trade-off: a table must be told of each new family, where a search through module names would guess. A wrong guess
trains silently wrong, so an unknown family is refused with one sentence; `UNCOVERED` has the reason for known ones.

Where norms sit decides whether SPD's algebra holds (maths: The block): it needs the MLP's input to be a norm of the
residual stream plus a partial sum of attention outputs. With f attention or MLP and r the residual multiplier:

    pre       x + r f(norm(x))           Llama and its kin, Phi-3, Granite, OPT: SPD holds
    sandwich  x + norm'(f(norm(x)))      Gemma 2 and 3: norm' needs the sum over all ranks
    output    x + norm'(f(x))            OLMo 2: the same
    post      norm'(x + f(x))            OPT-350m: the same
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from elision import files
from elision.errors import InputError

Method = Literal["sparselora", "spd"]
NormPlacement = Literal["pre", "sandwich", "output", "post"]
Names = tuple[str | None, str | None]

METHODS: dict[Method, str] = {"sparselora": "SparseLoRA", "spd": "SPD"}
TREATED = "spd_"  # begins the model_type of a checkpoint that only its SyncPlan makes whole (spd/artifact.py)
REFERENCE = Path(__file__).parent / "reference_model"  # what the word "reference" stands for
# Which files of a Hugging Face id are its weights; "consolidated" ones hold them once more, for other code.
WEIGHTS: dict[str, Any] = {
    "allow_patterns": ["*.safetensors", "*.json"],
    "ignore_patterns": ["consolidated*"],
}


@dataclass(frozen=True)
class Family:
    """One row of the table: the names under which a family keeps what a block is made of.

    Projections that share one name are fused in that module, their rows one after the other in the order given.
    """

    name: str
    qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    o: str = "o_proj"
    gate_up: tuple[str | None, str] = ("gate_proj", "up_proj")  # no gate: a plain two-layer MLP
    down: str = "down_proj"
    mlp: str | None = "mlp"  # None: the decoder layer itself owns the MLP's projections
    activation: tuple[str, str] = ("act_fn", "hidden_act")  # where the function sits, the config's field for it
    norms: NormPlacement = "pre"
    attention_norms: Names = ("input_layernorm", None)  # before, after
    mlp_norms: Names = ("post_attention_layernorm", None)
    unit_offset: bool = False  # RMS norms hold their weight less one
    qk_norms: bool = False
    rotary: bool = True
    window: Literal["none", "all", "by layer type"] = "none"  # the blocks that config.sliding_window applies to
    final_norm: str = "norm"
    spd: str | None = None  # why SPD's maths does not hold, None where it does


_SANDWICH = Family(
    "",
    unit_offset=True,
    activation=("act_fn", "hidden_activation"),
    norms="sandwich",
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    window="by layer type",
    spd="its sandwich norms include one on the attention output, which needs the sum over all ranks",
)
_GEMMA3 = replace(_SANDWICH, name="Gemma 3", qk_norms=True)

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window="all"),
    "qwen2": Family("Qwen2", window="by layer type"),
    "qwen3": Family("Qwen3", qk_norms=True, window="by layer type"),
    "gemma": Family("Gemma", unit_offset=True),
    "gemma2": replace(_SANDWICH, name="Gemma 2"),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,  # with a vision tower: the view is of its text model
    "phi3": Family(
        "Phi-3",
        qkv=("qkv_proj", "qkv_proj", "qkv_proj"),
        gate_up=("gate_up_proj", "gate_up_proj"),
        activation=("activation_fn", "hidden_act"),
        window="all",
    ),
    "olmo2": Family(
        "OLMo 2",
        norms="output",
        attention_norms=(None, "post_attention_layernorm"),
        mlp_norms=(None, "post_feedforward_layernorm"),
        qk_norms=True,
        spd="its post-norm on the attention output needs the sum over all ranks, and its q/k norms all heads",
    ),
    "granite": Family("Granite"),
    "opt": Family(
        "OPT",
        o="out_proj",
        gate_up=(None, "fc1"),
        down="fc2",
        mlp=None,
        activation=("activation_fn", "activation_function"),
        attention_norms=("self_attn_layer_norm", None),
        mlp_norms=("final_layer_norm", None),
        rotary=False,
        final_norm="final_layer_norm",
    ),
}

UNCOVERED: dict[str, str] = {
    model_type: reason
    for reason, model_types in {
        "it is a mixture of experts, and the maths of neither method covers an MLP that routes tokens": (
            "mixtral qwen2_moe qwen3_moe phimoe olmoe flex_olmo granitemoe granitemoeshared deepseek_v2 deepseek_v3 "
            "gpt_oss dbrx jetmoe llama4 llama4_text glm4_moe ernie4_5_moe dots1 hunyuan_v1_moe minimax minimax_m2"
        ),
        "it runs attention and MLP in parallel, so SPD has no sync between them to drop, "
        "and its modules are not described here for SparseLoRA": "gpt_neox gptj codegen falcon cohere cohere2 phi",
        "it mixes tokens by recurrence or convolution in some or all blocks, where both methods need attention": (
            "mamba mamba2 falcon_mamba rwkv xlstm recurrent_gemma jamba zamba zamba2 bamba nemotron_h falcon_h1 "
            "granitemoehybrid qwen3_next qwen3_5 qwen3_5_text lfm2 lfm2_moe"
        ),
        "it normalises the attention output, so SPD's maths does not hold, "
        "and its modules are not described here for SparseLoRA": "olmo3 exaone4 glm4",
        "it keeps Q, K and V interleaved or in transposed Conv1D modules, which are not described here": (
            "gpt2 bloom gpt_bigcode"
        ),
        "it is not a decoder-only language model": "t5 mt5 bart mbart pegasus whisper bert roberta",
        "its blocks may well fit both methods, but they are not described here": (
            "starcoder2 smollm3 stablelm glm arcee seed_oss ministral olmo nemotron helium"
        ),
    }.items()
    for model_type in model_types.split()
}


def family_of(config: PretrainedConfig) -> Family:
    """The row of `FAMILIES` for this config.

    Raises:
        InputError: there is none; the sentence names the model_type, the reason where known and the families.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(_unsupported(config.model_type))
    return family


def refusal(config: PretrainedConfig, method: Method) -> str | None:
    """One sentence saying why `method`'s maths does not cover this model, or None where it does."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return _unsupported(config.model_type)
    reason = _reason(family, config.get_text_config(), method)
    if reason is None:
        return None
    covered = ", ".join(sorted(row.name for row in set(FAMILIES.values()) if method != "spd" or row.spd is None))
    return f"{METHODS[method]} does not cover this {family.name} model: {reason}; it covers {covered}"


def _reason(family: Family, config: PretrainedConfig, method: Method) -> str | None:
    if getattr(config, "use_bidirectional_attention", False):
        return "use_bidirectional_attention is set, and without a causal mask it is no causal language model"
    if method != "spd":
        return None
    if not getattr(config, "do_layer_norm_before", True):
        return "do_layer_norm_before is false (OPT-350m), so a norm follows attention and needs the sum over all ranks"
    width = getattr(config, "word_embed_proj_dim", config.hidden_size)
    if width != config.hidden_size:
        return f"word_embed_proj_dim {width} differs from hidden_size {config.hidden_size} (OPT-350m)"
    return family.spd


def _unsupported(model_type: str) -> str:
    reason = UNCOVERED.get(model_type, "its blocks are not described here")
    return f"model_type '{model_type}' is not supported: {reason}; use one of {', '.join(sorted(FAMILIES))}"


def norm_names(family: Family, config: PretrainedConfig) -> tuple[NormPlacement, Names, Names]:
    """Where norms sit, and the names of attention's and the MLP's (before, after)."""
    if getattr(config, "do_layer_norm_before", True):
        return family.norms, family.attention_norms, family.mlp_norms
    (before, after), (mlp_before, mlp_after) = family.attention_norms, family.mlp_norms
    return "post", (after, before), (mlp_after, mlp_before)  # OPT-350m: the same names, after the residual


def attention_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """(heads, kv_heads, head_dim) of every block; head_dim is not always hidden_size / heads."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def intermediate_size(config: PretrainedConfig) -> int:
    """Channels between up and down projection."""
    return config.ffn_dim if config.model_type == "opt" else config.intermediate_size


def rotary_dim(family: Family, config: PretrainedConfig) -> int:
    """How many leading dimensions of a head rotate: d pairs with d + rotary_dim / 2. 0 where none does (OPT)."""
    if not family.rotary:
        return 0
    rope = getattr(config, "rope_parameters", None) or {}  # nested by layer type in Gemma 3, which rotates all
    return int(attention_shape(config)[2] * rope.get("partial_rotary_factor", 1.0))


def sliding_window(family: Family, config: PretrainedConfig, index: int) -> int | None:
    """How many tokens block `index` sees, itself included; None: all before it."""
    if family.window == "all" or (
        family.window == "by layer type" and config.layer_types[index] == "sliding_attention"
    ):
        return config.sliding_window
    return None


def allowed_ranks(config: PretrainedConfig) -> tuple[int, ...]:
    """Every number N of tensor-parallel ranks that can share this model's heads (maths: The block), ascending from 1.

    N divides the query heads, and divides the kv heads or is a multiple of them (kv heads are then replicated). The
    intermediate size sets no limit: where N does not divide it, shards differ by at most one unit.
    """
    heads, kv_heads, _ = attention_shape(config.get_text_config())
    return tuple(n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0))


def check_ranks(config: PretrainedConfig, ranks: int) -> None:
    """Pass where `ranks` tensor-parallel ranks can share this model's heads.

    Raises:
        InputError: they cannot; the sentence has the reason and the numbers that can.
    """
    allowed = allowed_ranks(config)
    if ranks in allowed:
        return
    heads, kv_heads, _ = attention_shape(config.get_text_config())
    if ranks < 1:
        reason = "at least one is needed"
    elif heads % ranks:
        reason = f"they do not divide its {heads} attention heads"
    else:
        reason = f"they neither divide its {kv_heads} key/value heads nor are a multiple of them"
    raise InputError(f"ranks={ranks} cannot share this model, {reason}: use one of {', '.join(map(str, allowed))}")


def check_positions(config: PretrainedConfig | None, tokens: int, what: str) -> None:
    """Pass where a row of `tokens` tokens has a position for each: rotations know no end, a table (OPT's) has one.

    Raises:
        InputError: it is longer; `what` names the row.
    """
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if config is None or family is None or family.rotary or tokens <= config.max_position_embeddings:
        return
    limit = config.max_position_embeddings
    raise InputError(f"{what} has {tokens} tokens, this {family.name} model has {limit} positions: give shorter rows")


def treatment(config: PretrainedConfig) -> str | None:
    """What is to be said of weights that were made for the SyncPlan they carry; None: they are an original's."""
    carried = getattr(config, "spd_plan", None)
    if isinstance(carried, dict) and any(carried.get(name) for name in ("healed", "corrections", "heads")):
        return f"carries a plan for {carried.get('ranks', 1)} ranks and serves only under it"
    return None


def check_original(config: PretrainedConfig, source: str | Path) -> None:
    """Pass where the weights are an original model's, and not made for the SyncPlan that the checkpoint carries.

    Raises:
        InputError: they were healed, corrected or regrouped, so that without the plan they compute something else.
    """
    if treatment(config) is not None:
        raise InputError(
            f"{source} has weights made for the plan that it carries: load it with elision.spd.load, or give the "
            "original model"
        )


def model_path(source: str | Path) -> str:
    """What from_pretrained takes: a directory, "~" spelt out, a Hugging Face id, or for "reference" our own."""
    return str(REFERENCE) if str(source) == "reference" else os.path.expanduser(str(source))


def load_config(source: str | Path) -> PretrainedConfig:
    """Read the config of a model: a directory, a Hugging Face id, or "reference" for the embedded model.

    Code that comes with a checkpoint is never run. HF_HUB_OFFLINE is respected. A checkpoint that SPD treated gives the
    config of its family, which says what it is made of; its weights are for elision.spd.load.

    Raises:
        InputError: nothing is there, config.json is broken, or transformers does not know the model_type.
    """
    name = model_path(source)
    directory = Path(name)
    if name and directory.is_dir():
        place = directory / "config.json"
        if not place.exists() and (adapter := directory / "adapter_config.json").exists():
            raise InputError(f"{name} is a PEFT adapter, not a model: give the base model that {adapter} names")
        raw = files.read_json(place, "model config")
        where, name = str(place), str(directory)
    else:
        raw, where = _from_hub(name), f"config.json of {name}"
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise InputError(f"{where} names no model_type: give the directory of a transformers checkpoint")
    original = model_type.removeprefix(TREATED)
    if model_type not in FAMILIES and model_type not in CONFIG_MAPPING and original not in FAMILIES:
        raise InputError(f"{where}: {_unsupported(model_type)}")
    try:
        if original != model_type:
            return CONFIG_MAPPING[original].from_dict({**raw, "model_type": original})
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a config class may raise anything on a value that it did not foresee
        raise InputError(f"{where} is not a valid {model_type} config ({_line(error)}): correct it") from error


def _from_hub(name: str) -> dict:
    """The raw config of a Hugging Face id, from the local cache or the network."""
    missing = f"model '{name}' is not a directory"
    remedy = "give a model's directory, its Hugging Face id or 'reference'"
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_file():
        raise InputError(f"{missing}: {remedy}")
    if not is_offline_mode() and not _cached(name) and (reason := _unreachable()):
        raise InputError(f"{missing} nor in the local cache, and the hub cannot be reached ({reason}): {remedy}")
    try:
        return PretrainedConfig.get_config_dict(name)[0]
    except Exception as error:  # the hub client's errors have no common class
        where = "in the local cache (HF_HUB_OFFLINE is set)" if is_offline_mode() else f"on the hub ({_line(error)})"
        raise InputError(f"{missing}, nor is it {where}: {remedy}") from error


def _cached(name: str) -> bool:
    """Whether the local cache has the config of this id."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no id at all
        return False


def _unreachable() -> str | None:
    """Why nobody answers at the hub's address, twice within a second; None where somebody does, or is only slow.

    The hub client itself would try for half a minute.
    """
    for pause in (1.0, 0.0):
        try:
            get_session().head(constants.ENDPOINT, timeout=10.0)
        except Exception as error:  # the client's library is one or another
            if type(error).__name__ != "ConnectError":
                return None
            reason = _line(error)
            time.sleep(pause)
        else:
            return None
    return f"{constants.ENDPOINT}: {reason}"


def _line(error: Exception) -> str:
    """The error's beginning, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:157]}..."
