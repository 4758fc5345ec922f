"""What the tests in vLLM's environment run under: CPU workers that leave the machine usable, no network, own caches."""

from __future__ import annotations

import os
import tempfile

import pytest

CACHE = tempfile.TemporaryDirectory(prefix="elision-vllm-")
os.environ.update(
    GLOO_SOCKET_IFNAME="lo",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # for functions of the tests themselves that workers run
    VLLM_CACHE_ROOT=CACHE.name,
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)


@pytest.fixture(scope="session", autouse=True)
def models_inspected_here():
    """vLLM looks at each model's class in a process that imports vLLM anew, to keep CUDA out of this one: no need.

    The server, whose processes are as vLLM starts them, does so all the same.
    """
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield
