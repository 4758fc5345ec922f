"""Where and when something was measured."""

from __future__ import annotations

import datetime
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def about() -> dict[str, Any]:
    """Processor or GPU, cores that this process may use, date, torch's version."""
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The processor's name as Linux tells it, else the architecture."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.machine()
