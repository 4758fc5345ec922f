"""Importing elision changes nothing in the libraries that it stands on."""

from __future__ import annotations

import subprocess
import sys

# Runs in a process of its own, in which nothing else has touched the libraries. `state` names what a patch, a
# registration or a global switch would change; names that appear later are fine where lazy imports put them (modules),
# and a change where nothing should appear (classes, registries).
PROBE = """
import logging, os, signal, sys, types, warnings

import torch, transformers, peft
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto, configuration_auto
for name in ("LlamaForCausalLM", "OPTForCausalLM", "Trainer", "AutoModelForCausalLM", "AutoTokenizer"):
    getattr(transformers, name)
import peft.tuners.lora.layer

WATCHED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")

def state():
    seen = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] not in WATCHED or not isinstance(module, types.ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, type):
                seen[module_name, name] = id(value)
                if value.__module__ == module_name:
                    for attribute, inner in list(vars(value).items()):
                        seen[module_name, name, attribute] = id(inner)
                    seen[module_name, name, "names"] = frozenset(vars(value))
            elif callable(value):
                seen[module_name, name] = id(value)
    for name, registry in {
        "attention": ALL_ATTENTION_FUNCTIONS,
        "parallel": ALL_PARALLEL_STYLES,
        "models": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content,
        "configs": configuration_auto.CONFIG_MAPPING._extra_content,
        "tuners": peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
    }.items():
        seen["registry", name] = {str(key): id(value) for key, value in dict(registry).items()}
    for name, value in vars(torch.nn.modules.module).items():
        if name.startswith("_global"):
            seen["hooks", name] = repr(value)
    seen["default dtype"] = torch.get_default_dtype()
    seen["threads"] = torch.get_num_threads(), torch.get_num_interop_threads()
    seen["grad"] = torch.is_grad_enabled()
    seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
    seen["random"] = torch.random.get_rng_state().numpy().tobytes()
    seen["devices"] = torch.cuda.is_initialized(), torch.distributed.is_initialized()
    seen["environment"] = dict(os.environ)
    seen["warnings"] = list(warnings.filters)
    seen["logging"] = [id(handler) for handler in logging.root.handlers], logging.root.level
    seen["signals"] = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen["excepthook"] = id(sys.excepthook)
    return seen

def changed(before, after):
    return sorted(str(key) for key, value in before.items() if key not in after or after[key] != value)
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_every_module_changes_nothing() -> None:
    script = """
before = state()
import importlib, pkgutil
import elision
count = 0
for module in pkgutil.walk_packages(elision.__path__, "elision."):
    if not module.name.endswith((".__main__", ".vllm_models")):  # the second one is for vLLM to import, where it is
        importlib.import_module(module.name)
        count += 1
print(count)
print(changed(before, state()))
"""
    count, difference = run(PROBE + script).splitlines()
    assert int(count) >= 8  # it did import them
    assert difference == "[]"


def test_the_probe_sees_what_it_is_there_to_see() -> None:
    faults = {
        "torch.nn.Linear.forward = lambda self, x: x": "Linear",
        "torch.nn.Module.extra = 1": "Module",
        "transformers.Trainer.__init__ = lambda self: None": "Trainer",
        "peft.tuners.lora.layer.Linear.forward = lambda self, x: x": "peft.tuners.lora.layer",
        "torch.nn.functional.linear = lambda *a: None": "'linear'",
        "ALL_ATTENTION_FUNCTIONS.register('elision', print)": "registry",
        "ALL_PARALLEL_STYLES.register('elision', object())": "registry",
        "torch.nn.modules.module.register_module_forward_hook(print)": "hooks",
        "torch.set_default_dtype(torch.float64)": "default dtype",
        "torch.rand(1)": "random",
        "os.environ['ELISION_PROBE'] = '1'": "environment",
        "warnings.simplefilter('ignore')": "warnings",
    }
    script = f"""
for fault in {list(faults)!r}:
    before = state()
    exec(fault)
    print(changed(before, state()))
"""
    for (fault, sign), difference in zip(faults.items(), run(PROBE + script).splitlines(), strict=True):
        assert sign in difference, f"{fault} went unseen: {difference}"


def test_the_package_itself_is_light() -> None:
    out = run("import sys, elision, elision.cli; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))")
    assert out.strip() == "[]"


def test_serving_needs_torch_transformers_and_safetensors_alone() -> None:
    """vLLM's environment, where the plugin is loaded, has nothing else of ours."""
    script = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
import elision.spd, elision.spd.runtimes.vllm, elision.spd.runtimes.transformers
print("imported")
"""
    absent = ["peft", "accelerate", "datasets", "pydantic", "matplotlib"]
    assert run(script.format(absent=absent)).strip() == "imported"
