"""What a served checkpoint says about itself: the plan in its config, and whether that can be run here.

A checkpoint with a plan (spd/artifact.py) is an ordinary one whose config.json carries `spd_plan` and names our
architectures, "SPD" before the family's own class name, so that an engine that does not know them refuses instead of
serving the dense model.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from elision.errors import InputError
from elision.families import TREATED, attention_shape, check_ranks, intermediate_size, refusal
from elision.spd.plan import ModelFacts, SyncPlan


def plan_of(config: PretrainedConfig, where: str = "the model's config") -> SyncPlan:
    """The plan that `config` carries, checked against the model that it describes.

    Raises:
        InputError: it carries none, or one that is broken, for another model or with corrections.
    """
    carried = getattr(config, "spd_plan", None)
    if carried is None:
        raise InputError(f"{where} carries no spd_plan: write the checkpoint with elision.spd.save, or give a plan")
    plan = SyncPlan.from_dict(carried, f"spd_plan of {where}")
    check_fits(config, plan)
    return plan


def check_fits(config: PretrainedConfig, plan: SyncPlan) -> None:
    """Pass where SPD's maths covers the model, `plan` was made for it, and its ranks can share and run it.

    Raises:
        InputError: one of them is not so.
    """
    if reason := refusal(config, "spd"):
        raise InputError(reason)
    text = config.get_text_config()
    check_ranks(text, plan.ranks)
    heads, kv_heads, head_dim = attention_shape(text)
    intermediate = intermediate_size(text)
    # A treated checkpoint's config may be of a class of its own, whose model_type says so (vllm.py).
    model_type = text.model_type.removeprefix(TREATED)
    plan.check(
        ModelFacts(model_type, text.num_hidden_layers, heads, kv_heads, head_dim, text.hidden_size, intermediate)
    )
    for block, kind in plan.corrections.items():
        raise InputError(
            f"plan corrects block {block} by {kind}, which only the simulation runs: heal the block instead, "
            "or run it with elision.spd.load"
        )
