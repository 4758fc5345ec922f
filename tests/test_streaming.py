"""A model read block by block: the same numbers, little memory, and one line for what cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import LlamaConfig, LlamaForCausalLM

from elision import InputError, streaming
from elision.blocks import decoder
from elision.layerwise import layer_calls
from elision.sparselora import SparsityPlan
from elision.spd import SyncPlan, calibrate, open_streamed, read_plan, simulate
from elision.streaming import STREAM, Stream, resident
from tests.spd.test_calibration import APART
from tests.spd.test_sensitivity import DATA
from tests.spd.tiny import tiny

TIED: dict[str, Any] = {"llama": {"tie_word_embeddings": True}}


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "granite"])
def test_it_calibrates_to_the_same_bytes(family, tmp_path):
    model = tiny(family, **TIED.get(family, {}))
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")  # several files
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    streamed = open_streamed(tmp_path / "model")
    blocks = [block.layer for block in decoder(streamed).blocks]
    assert all(parameter.is_meta for layer in blocks for parameter in layer.parameters())
    state = tmp_path / "state.json"
    for method in ("sequential", "fisher"):
        plans, sizes = [], []
        for each in (model, streamed):
            plans.append(calibrate(each, DATA, 3, drop=0.5, method=method, held_out=APART, state=state, quiet=True))
            sizes.append(len(json.loads(state.read_text())["losses"]))
        assert plans[0] == plans[1]
        assert sizes[0] == sizes[1]  # what the one had measured the other did not measure again
        assert plans[1] == calibrate(streamed, DATA, 3, drop=0.5, method=method, held_out=APART, quiet=True)
    assert all(parameter.is_meta for layer in blocks for parameter in layer.parameters())


def test_a_block_is_resident_only_while_it_is_visited(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    block = decoder(open_streamed(tmp_path, dtype=torch.float32)).blocks[1]
    with resident(block.layer):
        with resident(block.layer):
            pass
        assert block.o.weight.dtype == torch.float32 and not block.o.weight.is_meta
        torch.testing.assert_close(block.o.weight.double(), decoder(model).blocks[1].o.weight, rtol=1e-6, atol=1e-7)
    assert block.o.weight.is_meta


def test_a_plain_forward_reads_block_by_block(tmp_path, monkeypatch):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    streamed = open_streamed(tmp_path)
    layers = [block.layer for block in decoder(streamed).blocks]
    held, enter = [], Stream.enter

    def count(stream: Stream, layer: torch.nn.Module) -> None:
        enter(stream, layer)
        held.append([not next(each.parameters()).is_meta for each in layers])

    monkeypatch.setattr(Stream, "enter", count)
    with torch.no_grad():
        assert torch.equal(streamed(**DATA[0]).logits, model(**DATA[0]).logits)
    assert held == torch.eye(3).bool().tolist()
    held.clear()
    layer_calls(decoder(streamed), DATA[0])  # only notes what blocks would be given
    assert not held and all(parameter.is_meta for layer in layers for parameter in layer.parameters())


def test_a_second_copy_of_the_weights_is_neither_fetched_nor_read(tmp_path, monkeypatch):
    tiny("mistral").save_pretrained(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"for other code than transformers")
    open_streamed(tmp_path)
    asked = []
    monkeypatch.setattr(streaming, "snapshot_download", lambda name, **given: asked.append(given) or str(tmp_path))
    assert streaming._checkpoint("org/name") == streaming._checkpoint(str(tmp_path))
    names = ["config.json", "model-00001-of-00002.safetensors", "consolidated.safetensors"]
    assert list(filter_repo_objects(names, **asked[0])) == names[:2]


def test_generation_goes_by_the_checkpoint_s_own_config(tmp_path):
    whole = tiny("llama")
    whole.generation_config.update(eos_token_id=[5, 7], max_new_tokens=3)
    whole.save_pretrained(tmp_path)
    found = open_streamed(tmp_path).generation_config
    assert (found.eos_token_id, found.max_new_tokens) == ([5, 7], 3)
    (tmp_path / "generation_config.json").unlink()
    assert open_streamed(tmp_path).generation_config.eos_token_id == whole.config.eos_token_id


def test_weights_are_let_go_after_a_failure(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    streamed = open_streamed(tmp_path)
    layer = decoder(streamed).blocks[0].layer
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 1, 5, dtype=torch.float64))  # of another width
    assert all(parameter.is_meta for parameter in layer.parameters()) and vars(layer)[STREAM].users == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint of 24 blocks, 10 MB each."""
    path = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


# MB beyond the imports: two blocks are 20, a block in training (its gradients, two moments, its best weights) 50;
# activations, garbage and what is imported late take the rest.
ALLOWED = {"calibrate": 80.0, "heal": 110.0, "sparselora": 80.0}
limited = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limit on address space")


def in_little_memory(job: str, *more: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    paths = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed is given back
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "tests.spd.in_little_memory", job, *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@limited
def test_the_limit_on_memory_binds(large, tmp_path):
    whole = in_little_memory("heal", str(large), str(tmp_path / "out"), str(max(ALLOWED.values())), "whole")
    assert whole.returncode != 0 and "memory" in whole.stderr.lower(), whole.stderr
    assert not (tmp_path / "out").exists()


@limited
@pytest.mark.parametrize("job", ALLOWED)
def test_a_model_larger_than_memory(job, large, tmp_path):
    weights = sum(file.stat().st_size for file in large.glob("*.safetensors")) / 2**20
    assert weights > 2 * ALLOWED[job]
    out = tmp_path / "out"
    done = in_little_memory(job, str(large), str(out), str(ALLOWED[job]))
    assert done.returncode == 0, done.stderr
    if job == "calibrate":
        assert len(SyncPlan.load(out).dropped) == 12
    elif job == "heal":
        assert read_plan(out).healed == (4, 5, 6) and len(list(out.glob("*.safetensors"))) == 25
    else:
        found = SparsityPlan.load(out).calibration
        assert found is not None and found.limit == 0.9 >= found.flops["full"]


class TestRefusals:
    @pytest.fixture
    def saved(self, tmp_path) -> Path:
        tiny("llama").save_pretrained(tmp_path)
        return tmp_path

    def refused(self, match, path):
        with pytest.raises(InputError, match=match) as caught:
            open_streamed(path)
        assert "\n" not in str(caught.value)

    def test_no_weights(self, saved):
        (saved / "model.safetensors").unlink()
        self.refused("holds no safetensors", saved)

    def test_a_header_cut_short(self, saved):
        with open(saved / "model.safetensors", "r+b") as file:
            file.truncate(100)
        self.refused("is no safetensors file, or a truncated one", saved)

    def test_weights_cut_short(self, saved):
        size = (saved / "model.safetensors").stat().st_size
        with open(saved / "model.safetensors", "r+b") as file:
            file.truncate(size - 8)
        with pytest.raises(InputError, match="is truncated"):
            calibrate(open_streamed(saved), DATA, 3, quiet=True)

    def test_another_models_weights(self, saved):
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
        self.refused("gate_proj.weight has shape .40, 24., the config makes it .48, 24.", saved)
        (saved / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
        self.refused(r"holds no tensor model.layers.3", saved)

    def test_what_needs_all_weights_at_once(self, saved):
        for use in (
            lambda model: simulate(model, SyncPlan(3, (0,))),
            lambda model: calibrate(model, DATA, 3, method="integrated", quiet=True),
        ):
            with pytest.raises(InputError, match="block 0 is read from disk when it is visited, and this needs all"):
                use(open_streamed(saved))
