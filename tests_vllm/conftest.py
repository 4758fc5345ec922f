"""What the tests in vLLM's environment run under: CPU workers that leave the machine usable, no network, own caches."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

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
    VLLM_RPC_BASE_PATH=CACHE.name,  # of its sockets
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


@pytest.fixture(autouse=True)
def no_memory_left_behind():
    """vLLM ends its workers by killing them, and each engine leaves 8 MB of shared memory that no process maps."""
    yield
    mapped = "".join(_maps(path) for path in Path("/proc").glob("[0-9]*/maps"))
    for segment in Path("/dev/shm").glob("vllm_dist_*"):
        if str(segment) not in mapped and segment.stat().st_uid == os.getuid():
            segment.unlink()
            (Path(tempfile.gettempdir()) / segment.name.partition("-")[0]).unlink(missing_ok=True)  # its rendezvous


def _maps(path: Path) -> str:
    """What a process maps, unless it is another user's or has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""
