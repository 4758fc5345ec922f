"""SPD: serve a tensor-parallel model with fewer synchronisations.

`calibrate` measures what each dropped sync costs on the user's data and returns a `SyncPlan`; `simulate` makes one
process compute what N ranks would under a plan, and returns a handle that undoes it. `save` writes a checkpoint that
carries its plan; `load` brings it back, simulated, and `read` brings model and plan back one beside the other.
"""

from elision.spd.adapter import load_adapter, save_adapter
from elision.spd.artifact import Treated, load, read, read_plan, save
from elision.spd.calibration import calibrate, calibrations
from elision.spd.distill import Recipe, heal
from elision.spd.fit import correct, uncorrect
from elision.spd.healing import carry_out
from elision.spd.plan import Calibration, ModelFacts, SyncPlan, Verified
from elision.spd.planner import Workload
from elision.spd.proxies import order, scores
from elision.spd.regroup import regroup, ungroup
from elision.spd.sensitivity import Sensitivity, curve, sensitivities, sensitivity
from elision.spd.simulate import Simulation, simulate
from elision.streaming import open_streamed

__all__ = [
    "Calibration",
    "ModelFacts",
    "Recipe",
    "Sensitivity",
    "Simulation",
    "SyncPlan",
    "Treated",
    "Verified",
    "Workload",
    "calibrate",
    "calibrations",
    "carry_out",
    "correct",
    "curve",
    "heal",
    "load",
    "load_adapter",
    "open_streamed",
    "order",
    "read",
    "read_plan",
    "regroup",
    "save",
    "save_adapter",
    "scores",
    "sensitivities",
    "sensitivity",
    "simulate",
    "uncorrect",
    "ungroup",
]
