"""Which channels a batch keeps, decided once per block and part.

`SparseBatch` is what one forward knows: which of its rows are sparse, and the choices made so far. It belongs to that
forward and to its backward, so a recomputation under gradient checkpointing, even after other batches have passed
through the model, finds the rows and the very channels of the forward that it repeats.

`BlockChoices` scores the channels of one block from the input of the part (maths: Which channels, The estimator)
and lets every projection of the part read the same choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from elision.blocks import Block
from elision.sparselora import estimator, select
from elision.sparselora.factors import SCORED, Factors, estimated
from elision.sparselora.plan import PART_OF, PROJECTIONS, Part, SparsityPlan
from elision.sparselora.rows import sent

Kept = dict[tuple[int, str], Tensor]  # (layer, projection) to the channels kept, ascending


class SparseBatch:
    """One forward of the model: `rows` (batch, sequence) is True at the tokens computed sparsely.

    `number` of the forward is what the control "random" draws by; `opened` says whether a block has seen it. Not a
    dataclass: of such an argument FSDP2 hands a copy to every layer.
    """

    def __init__(self, rows: Tensor, number: int = 0, kept: Kept | None = None) -> None:
        self.rows = rows
        self.number = number
        self.kept: Kept = {} if kept is None else kept
        self.opened = False
        self._sent: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def rows_for(self, x: Tensor) -> Tensor:
        """`rows` in the leading shape and on the device of an activation (..., channels)."""
        return self._on(x.device)[0].reshape(x.shape[:-1])

    def sparse(self, x: Tensor) -> Tensor:
        """(T, channels): the sparse rows of an activation; by number, for a mask has to be counted where x is."""
        return x.flatten(0, -2).index_select(0, self._on(x.device)[1])

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The mask and the numbers of the sparse rows, sent to each device once."""
        if device not in self._sent:
            numbers = self.rows.flatten().nonzero().squeeze(1)
            self._sent[device] = sent(self.rows, device), sent(numbers, device)
        return self._sent[device]


class BlockChoices:
    """Chooses for one block. `batch` is the forward that the block is in, None while it is dense."""

    def __init__(self, block: Block, plan: SparsityPlan, factors: Factors | None) -> None:
        self.block = block
        self.plan = plan
        self.batch: SparseBatch | None = None
        self._products = {name: p for name in SCORED if (p := self._product(name, factors)) is not None}

    def kept(self, name: str, x: Tensor) -> Tensor:
        """Channels of projection `name` kept in this forward: of its outputs, or of the inputs of o and down.

        `x` (batch, sequence, inputs) is the input of the projection; the first of its part to ask has its channels
        chosen by it. q, k and v share one input, gate and up another, and o and down come later.
        """
        batch = self.batch
        assert batch is not None
        return self.kept_in(batch, name, lambda: batch.sparse(x))

    @torch.no_grad()
    def kept_in(self, batch: SparseBatch, name: str, rows: Callable[[], Tensor]) -> Tensor:
        """Like `kept`, in `batch`; `rows` is called for the sparse rows (T, inputs) where a choice is to be made."""
        key = (self.block.index, name)
        if key not in batch.kept:
            part = PART_OF[name]
            assert name not in ("o", "down"), "v chooses for o, up for down"
            chosen = self._choose(part, rows(), batch)
            batch.kept.update({(self.block.index, role): chosen[role] for role in PROJECTIONS[part]})
        return batch.kept[key]

    def _choose(self, part: Part, x: Tensor, batch: SparseBatch) -> dict[str, Tensor]:
        """Kept channels of every projection of `part`; `x` (T, inputs) are the sparse rows."""
        block, plan = self.block, self.plan
        if part == "ffn" and plan.selection == "no-ffn":
            return dict.fromkeys(PROJECTIONS[part], torch.empty(0, dtype=torch.long, device=x.device))
        with torch.autocast(x.device.type, enabled=False):
            scores = self._scores(part, x, batch.number)
        paired = part == "qk" and plan.rotary_pairs
        count = select.keep_count(len(scores), getattr(plan, part)[block.index], even=paired)
        kept = select.top_pairs(scores, count, block.head_dim) if paired else select.top(scores, count)
        if part == "ffn":
            return dict.fromkeys(PROJECTIONS[part], kept)
        queries = select.expand(kept, block.heads // block.kv_heads, block.head_dim)
        return {"q": queries, "k": kept} if part == "qk" else {"v": kept, "o": queries}

    def _scores(self, part: Part, x: Tensor, number: int) -> Tensor:
        """Scores of the channels of `part`, of the kv channels for qk and vo; `x` (T, inputs) are the sparse rows."""
        block, products = self.block, self._products
        if self.plan.selection == "random":
            channels = block.intermediate_size if part == "ffn" else block.kv_heads * block.head_dim
            seed = hashlib.sha256(f"{self.plan.seed} {number} {block.index} {part}".encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(seed))
            return sent(torch.rand(channels, generator=generator, device="cpu"), x.device)
        if self.plan.selection == "weights":
            return self._weight_scores(part)
        x = estimator.sample(x, tokens_read(self.plan, part))
        if part == "ffn":
            return estimator.ffn_scores(x, block.activation, products.get("gate"), products["up"])
        if part == "vo":
            return estimator.linear_scores(x, products["v"])
        queries = estimator.linear_scores(x, products["q"])
        keys = estimator.linear_scores(x, products["k"])
        return select.combine_groups(queries, block.kv_heads, block.head_dim) * keys

    def _weight_scores(self, part: Part) -> Tensor:
        """Scores of the channels of `part` without looking at tokens."""
        block = self.block
        norms = {
            name: estimator.weight_norms(block.projections[name].matrix)
            for name in PROJECTIONS[part]
            if name in SCORED and name in block.projections
        }
        if part == "qk":
            norms["q"] = select.combine_groups(norms["q"], block.kv_heads, block.head_dim)
        return torch.stack(list(norms.values())).prod(dim=0)

    def _product(self, name: str, factors: Factors | None) -> estimator.Product | None:
        """What stands for the base product of `name` in its score; None where nothing is scored by it."""
        projection = self.block.projections.get(name)
        if projection is None or self.plan.sparsity(self.block.index, name) == 0:
            return None
        if self.plan.selection in ("oracle", "sampled", "no-ffn"):
            return estimator.Exact(lambda: projection.matrix, lambda: projection.bias)
        if not estimated(self.plan, self.block.index, name):
            return None
        assert factors is not None
        b, a = factors.pairs[f"layers.{self.block.index}.{name}"]
        device = projection.base.weight.device
        return estimator.LowRank(b.to(device), a.to(device), lambda: projection.bias)


def tokens_read(plan: SparsityPlan, part: Part) -> int | None:
    """How many context tokens at most the plan's selection reads to score `part`; None: all."""
    if plan.selection in ("sampled", "no-ffn"):
        return estimator.SAMPLE
    return estimator.FFN_SAMPLE if part == "ffn" and plan.selection in ("svd", "whitened") else None
