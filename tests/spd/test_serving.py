"""Who serves a plan is what the runtimes themselves refuse and take."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from elision.errors import InputError
from elision.families import allowed_ranks
from elision.spd import SyncPlan
from elision.spd.runtimes import transformers, vllm
from elision.spd.runtimes.checkpoint import facts_of
from elision.spd.serving import VLLM, in_words, served_by
from tests.spd.tiny import CONFIGS, FAMILIES


def test_the_families_are_those_of_the_plugin():
    assert set(VLLM) == set(vllm.MODELS)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_serves_what_it_does_not_refuse(family, tmp_path):
    seen = set()
    for kv_heads in (2, 4, 8):
        for intermediate in (38, 39, 40, 48):
            sizes = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "intermediate_size": intermediate}
            if family == "opt":
                sizes = {"num_attention_heads": 8, "ffn_dim": intermediate}
            config = CONFIG_MAPPING[family](**{**CONFIGS[family], **sizes})
            config.save_pretrained(tmp_path)
            for ranks in allowed_ranks(config):
                try:
                    transformers.planned(tmp_path, SyncPlan(ranks))
                except InputError as error:
                    taken = False
                    vllm_serves = "vLLM" in served_by(facts_of(config), SyncPlan(ranks))
                    assert "key/value" not in str(error) or ("serve with vLLM" in str(error)) == vllm_serves
                else:
                    taken = True
                seen.add(taken)
                assert ("transformers" in served_by(facts_of(config), SyncPlan(ranks))) == taken
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("family", "ranks", "skipped", "words"),
    [
        ("llama", 2, (), "vLLM and transformers"),
        ("llama", 2, (1,), "transformers"),
        ("llama", 4, (), "vLLM"),  # each key/value head on two ranks
        ("llama", 4, (1,), "no runtime: elision.spd.load computes it in one process"),
        ("gemma", 2, (), "transformers"),
        ("granite", 2, (), "transformers"),
    ],
)
def test_family_ranks_heads_and_plan_decide(family, ranks, skipped, words):
    config = CONFIG_MAPPING[family](**{**CONFIGS[family], "num_attention_heads": 4, "num_key_value_heads": 2})
    assert in_words(served_by(facts_of(config), SyncPlan(ranks, skipped=skipped))) == words
