"""What SPD can save beyond the machines that we have: predictions of the alpha-beta model, from public measurements.

    python benchmarks/spd_costs.py            the tables of docs/does-spd-pay.md, then one JSON line
    python benchmarks/spd_costs.py --write    put them into the page

Every alpha and beta below is a number that somebody measured on real links and published; `source` says where. They
come from other machines than each other and than yours, so a prediction is good for an order of magnitude:
`elision spd probe` measures your own links. Computation is a roofline with shares of the data sheet that are assumed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from elision.spd.costs import Device, Link, Saving, Shape, saving

PAGE = Path(__file__).parents[1] / "docs" / "does-spd-pay.md"
MARKS = ("<!-- tables: python benchmarks/spd_costs.py --write -->", "<!-- end of tables -->")

ARITHMETIC, BANDWIDTH = 0.6, 0.75  # assumed shares of the data sheet that serving reaches


def device(teraflops: float, gigabytes: float) -> Device:
    """A device of these data-sheet rates (dense 16-bit arithmetic, memory), as serving reaches them."""
    return Device(teraflops * 1e12 * ARITHMETIC, gigabytes * 1e9 * BANDWIDTH)


A100, H100, RTX4090 = device(312, 2039), device(989, 3350), device(165, 1008)

LLAMA2_70B = Shape(80, 8192, 28672, 64, 8, 128, 32_000)
LLAMA3_70B = Shape(80, 8192, 28672, 64, 8, 128, 128_256)
LLAMA3_405B = Shape(126, 16384, 53248, 128, 8, 128, 128_256)


@dataclass(frozen=True)
class Measured:
    """A published measurement of an all-reduce: microseconds for a small one, bus bandwidth in GB/s for a large one."""

    name: str
    alpha: float
    bus: float
    source: str

    def link(self, ranks: int) -> Link:
        """As a cost model for `ranks`; alpha is taken as it was measured, on about as many."""
        return Link(ranks, self.alpha * 1e-6, 1 / (self.bus * 1e9))


ONE_SHOT = Measured(
    "NVLink, one-shot kernel",
    5.7,
    370,
    "alpha: 8 H100, 4096 elements, [sglang #2904](https://github.com/sgl-project/sglang/pull/2904); "
    "bandwidth: 8 H100, ring, [nccl-tests #212](https://github.com/NVIDIA/nccl-tests/issues/212)",
)
NVLINK = Measured(
    "NVLink, NCCL",
    16.7,
    370,
    "alpha: 8 H20, 4096 bytes, [DeepEP #303](https://github.com/deepseek-ai/DeepEP/issues/303); bandwidth: as above",
)
PCIE = Measured(
    "PCIe, NCCL",
    42.1,
    25.9,
    "alpha: 8 RTX 4090, 8 bytes, [nccl #1530](https://github.com/NVIDIA/nccl/issues/1530); bandwidth: 4 RTX 4090, "
    "peer to peer, [open-gpu-kernel-modules #36](https://github.com/tinygrad/open-gpu-kernel-modules/issues/36)",
)
INFINIBAND = Measured(
    "InfiniBand between nodes, NCCL",
    61.6,
    96,
    "alpha: 32 H100, 128 bytes, in a report of poor performance, "
    "[nccl #1453](https://github.com/NVIDIA/nccl/issues/1453); bandwidth: 24 A100 on three nodes, four HDR cards each, "
    "[nccl-tests #119](https://github.com/NVIDIA/nccl-tests/issues/119)",
)
ETHERNET = Measured(
    "100 Gbit Ethernet between nodes, TCP, NCCL",
    45.8,
    5,
    "alpha: a broadcast of 8 bytes between two nodes, which an all-reduce cannot beat, "
    "[nccl-tests #82](https://github.com/NVIDIA/nccl-tests/issues/82); bandwidth: middle of 4 to 6 for 32 V100 on "
    "four nodes, [nccl #450](https://github.com/NVIDIA/nccl/issues/450)",
)
LINKS = (ONE_SHOT, NVLINK, PCIE, INFINIBAND, ETHERNET)


@dataclass(frozen=True)
class Work:
    """One forward pass: `new` tokens in each of `batch` sequences, after `before` in the cache."""

    name: str
    batch: int
    new: int
    before: int = 0


DECODE = (Work("decode, batch 1", 1, 1, 1024), Work("decode, batch 32", 32, 1, 1024))
PREFILL = (Work("prefill 512", 1, 512), Work("prefill 8 x 2048", 8, 2048))
WORK = (*DECODE, *PREFILL)


@dataclass(frozen=True)
class System:
    """A model on `ranks` devices behind one kind of link; `width` is the bytes of a weight, cache entries included."""

    name: str
    shape: Shape
    device: Device
    ranks: int
    links: tuple[Measured, ...]
    width: int = 2


SYSTEMS = (
    System("LLaMA3-70B, 16-bit, 8 x H100", LLAMA3_70B, H100, 8, (ONE_SHOT, NVLINK)),
    System("LLaMA3-70B, 16-bit, 8 x RTX 4090", LLAMA3_70B, RTX4090, 8, (PCIE,)),
    System("LLaMA3-70B, 16-bit, 2 nodes of 4 x H100", LLAMA3_70B, H100, 8, (INFINIBAND, ETHERNET)),
    System("LLaMA3-405B, 8-bit, 8 x H100", LLAMA3_405B, H100, 8, (ONE_SHOT, NVLINK), width=1),
    System("LLaMA3-405B, 16-bit, 2 nodes of 8 x H100", LLAMA3_405B, H100, 16, (INFINIBAND, ETHERNET)),
)


def predicted(system: System, link: Link, work: Work, treatment: str, share: float = 1.0) -> Saving:
    """What `treatment` of a share of the blocks saves in one forward pass."""
    layers = system.shape.layers
    count = round(share * layers)
    compute, rest = system.shape.compute(
        system.device, system.ranks, batch=work.batch, new=work.new, before=work.before, width=system.width
    )
    treated = [treatment] * count + ["dense"] * (layers - count)
    return saving(treated, link, system.shape.hidden, work.batch * work.new, compute=compute, rest=rest)


def predictions() -> list[dict]:
    """One row a system, link and kind of work."""
    rows = []
    for system in SYSTEMS:
        for measured in system.links:
            link = measured.link(system.ranks)
            for work in WORK:
                everything = predicted(system, link, work, "dropped")
                rows.append(
                    {
                        "system": system.name,
                        "link": measured.name,
                        "work": work.name,
                        "ms": round(1e3 * everything.before, 2),
                        "in_syncs": round(2 * everything.share, 4),
                        "drop_70": round(predicted(system, link, work, "dropped", 0.7).share, 4),
                        "drop_all": round(everything.share, 4),
                        "int8_all": round(predicted(system, link, work, "int8").share, 4),
                    }
                )
    return rows


@dataclass(frozen=True)
class Figure:
    """A latency figure of the SPD paper, and the range of settings that it may have been measured in."""

    name: str
    reported: str
    bus: float
    alphas: tuple[float, float]


FIGURES = (
    Figure("10 GB/s links", "19.7%", 10, (NVLINK.alpha, PCIE.alpha)),
    Figure("300 GB/s links", "not known to us", 300, (ONE_SHOT.alpha, NVLINK.alpha)),
    Figure("two nodes, 50 GB/s", "over 10%", 50, (NVLINK.alpha, INFINIBAND.alpha)),
)
PAPER = System("LLaMA2-70B, 16-bit, 8 x A100", LLAMA2_70B, A100, 8, ())
PAPER_WORK = (Work("", 1, 1, 128), Work("", 32, 1, 2048), Work("", 1, 128), Work("", 1, 2048), Work("", 16, 2048))


def held_against_the_paper() -> list[dict]:
    """Least and most saving at 70% of the blocks that each figure's range of settings gives."""
    rows = []
    for figure in FIGURES:
        found = {"decode": [], "prefill": []}
        for alpha in figure.alphas:
            link = Measured("", alpha, figure.bus, "").link(PAPER.ranks)
            for work in PAPER_WORK:
                kind = "decode" if work.new == 1 else "prefill"
                found[kind].append(predicted(PAPER, link, work, "dropped", 0.7).share)
        rows.append({"figure": figure.name, "reported": figure.reported})
        rows[-1] |= {kind: [round(min(shares), 4), round(max(shares), 4)] for kind, shares in found.items()}
    return rows


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, text columns left and numbers right."""
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(' --- ' for _ in heads)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def percent(value: float) -> str:
    """A share for people."""
    return f"{100 * value:.1f}%"


def tables() -> str:
    """All that the page shows."""
    links = table(
        ("link", "alpha, us", "bus bandwidth, GB/s", "measured by others"),
        ((m.name, f"{m.alpha:g}", f"{m.bus:g}", m.source) for m in LINKS),
    )
    paper = table(
        ("LLaMA2-70B, 8 x A100, 70% of the blocks", "paper", "prediction, decode", "prediction, prefill"),
        (
            (r["figure"], r["reported"], *(f"{percent(r[k][0])} to {percent(r[k][1])}" for k in ("decode", "prefill")))
            for r in held_against_the_paper()
        ),
    )
    heads = ("link", "work", "one pass, ms", "in syncs", "70% dropped", "all dropped: at most", "all in int8")
    parts = [f"### Links\n\n{links}", f"### Held against the paper\n\n{paper}"]
    rows = predictions()
    for system in SYSTEMS:
        own = [row for row in rows if row["system"] == system.name]
        cells = (
            (
                r["link"],
                r["work"],
                f"{r['ms']:g}",
                *(percent(r[k]) for k in ("in_syncs", "drop_70", "drop_all", "int8_all")),
            )
            for r in own
        )
        parts.append(f"### Prediction: {system.name}\n\n{table(heads, cells)}")
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables or write them into the page; end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables of docs/does-spd-pay.md")
    text = tables()
    if parser.parse_args().write:
        before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")
    print(text)
    links = [asdict(measured) for measured in LINKS]
    print(
        json.dumps(
            {
                "benchmark": "spd_costs",
                "kind": "prediction",
                "links": links,
                "paper": held_against_the_paper(),
                "rows": predictions(),
            }
        )
    )


if __name__ == "__main__":
    main()
