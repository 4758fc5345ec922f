"""A worker that finds another plan than the rest, as one does whose machine has another checkpoint."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class OtherPlanOnRankOne(CPUWorker):
    """Reads a plan of its own where it is rank 1."""

    def load_model(self, **options: Any) -> None:
        if self.rank == 1:
            config = self.model_config.hf_config
            config.spd_plan = {**config.spd_plan, "dropped": [0, 1]}
        super().load_model(**options)
