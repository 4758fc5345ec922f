"""Serve a plan with vLLM: an out-of-tree plugin, nothing to import and no engine of our own.

    pip install elision                                        # declares the plugin
    vllm serve model-spd --tensor-parallel-size 8              # its config.json names SPDLlamaForCausalLM and the plan

vLLM calls `register` in each of its processes, some more than once. It makes vLLM know our architectures, by lazy path
to subclasses of vLLM's own models (`vllm_models`), so that nothing is imported before a model asks for it. It also has
vLLM check each such model when its configuration is complete, in the main process and before any worker starts: what
the plan cannot run under is refused there, with one sentence. Without the plugin vLLM does not know the architecture
and refuses as well, instead of serving the dense model.

The plan is read from the model's config and from nowhere else: that is part of the key of vLLM's compile cache.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoConfig, LlamaConfig, MistralConfig, OPTConfig, Phi3Config, Qwen2Config, Qwen3Config

from elision.errors import InputError
from elision.families import TREATED, intermediate_size
from elision.spd.runtimes.checkpoint import family_config, plan_of

logger = logging.getLogger(__name__)

TESTED = "0.32.0"  # the versions of vLLM that our tests run against

MODELS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "opt": "OPTForCausalLM",
}


# Configs of treated checkpoints: classes of this module, because vLLM sends them to its workers by name.
class SPDLlamaConfig(LlamaConfig):
    """Config of a treated Llama."""

    model_type = f"{TREATED}llama"


class SPDMistralConfig(MistralConfig):
    """Config of a treated Mistral."""

    model_type = f"{TREATED}mistral"


class SPDQwen2Config(Qwen2Config):
    """Config of a treated Qwen2."""

    model_type = f"{TREATED}qwen2"


class SPDQwen3Config(Qwen3Config):
    """Config of a treated Qwen3."""

    model_type = f"{TREATED}qwen3"


class SPDPhi3Config(Phi3Config):
    """Config of a treated Phi-3."""

    model_type = f"{TREATED}phi3"


class SPDOPTConfig(OPTConfig):
    """Config of a treated OPT."""

    model_type = f"{TREATED}opt"


CONFIGS = (SPDLlamaConfig, SPDMistralConfig, SPDQwen2Config, SPDQwen3Config, SPDPhi3Config, SPDOPTConfig)


def register() -> None:
    """Make this process's vLLM know our architectures; safe to call twice. The entry point of the plugin.

    A vLLM that lacks what this needs goes on without it: it serves all other models, and refuses ours by their names.
    """
    try:
        from vllm import ModelRegistry  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        logger.warning("no checkpoint with a plan can be served by this vLLM (%s): use vLLM %s", error, TESTED)
        return
    for name in MODELS.values():
        architecture = f"SPD{name}"
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, f"elision.spd.runtimes.vllm_models:{architecture}")
        MODELS_CONFIG_MAP[architecture] = CheckPlan
    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)


class CheckPlan:
    """What vLLM calls, by these names, once its configuration of one of our architectures is complete."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing can be said before the parallel configuration is known."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what the plan cannot run under.

        Raises:
            InputError: no plan or a broken one, a plan for another model or number of ranks, or a feature of vLLM
                that changes what the plan was made for.
        """
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        config = family_config(model.hf_config)
        plan = plan_of(config, f"config.json of {model.model}")
        size = parallel.tensor_parallel_size
        if size != plan.ranks:
            raise InputError(
                f"plan is for {plan.ranks} ranks, --tensor-parallel-size is {size}: use {plan.ranks}, "
                f"or calibrate for {size}"
            )
        if parallel.pipeline_parallel_size > 1:
            raise InputError(
                f"--pipeline-parallel-size {parallel.pipeline_parallel_size} cuts the plan's stack of blocks: "
                "serve with tensor parallelism alone"
            )
        if plan.skipped:
            raise InputError(
                f"plan skips block {plan.skipped[0]}'s attention, which the vLLM plugin does not do: drop its sync "
                "instead, or serve with transformers"
            )
        if model.quantization is not None:
            raise InputError(
                f"quantization {model.quantization} has not been tested with SPD: serve without --quantization"
            )
        lora = vllm_config.lora_config
        if lora is not None and lora.fully_sharded_loras:
            raise InputError(
                "--fully-sharded-loras leaves no rank its own part of an adapter's product, which SPD's MLP input "
                "needs: leave it out"
            )
        if config.model_type == "qwen3" and config.attention_bias:
            raise InputError("attention_bias is set, but vLLM leaves out Qwen3's output bias: serve with transformers")
        passes = vllm_config.compilation_config.pass_config
        if getattr(passes, "enable_sp", False):
            raise InputError("enable_sp splits the residual stream that SPD keeps whole: turn off sequence parallelism")
        offload = getattr(vllm_config, "offload_config", None)
        if offload is not None and (offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0):
            raise InputError("weight offloading keeps the blocks' own forward, which SPD replaces: leave it out")
        intermediate = intermediate_size(config)
        if intermediate % size:
            raise InputError(
                f"vLLM cannot split intermediate size {intermediate} over {size} ranks: "
                "calibrate for a number of ranks that divides it"
            )
