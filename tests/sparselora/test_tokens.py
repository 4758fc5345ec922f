"""Kinds of tokens, against the definition (maths: Who is dense) written as loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elision.errors import InputError
from elision.sparselora import tokens

X = -100


def by_loops(labels: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[list[str]]:
    """One letter a token: l loss-bearing, d dense but not loss-bearing, c context, e elided context, p padding."""
    rows, length = labels.shape
    kinds = []
    for row in range(rows):
        starts = [0]
        if mask is None and positions is not None:
            own = positions[row if len(positions) > 1 else 0].tolist()
            starts += [t for t in range(1, length) if own[t] != own[t - 1] + 1]
        letters = []
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            segment = labels[row, start:end].tolist()
            real = [True] * len(segment) if mask is None else [bool(m) for m in mask[row, start:end]]
            bearing = [t + 1 < len(segment) and segment[t + 1] != X for t in range(len(segment))]
            last = max((t for t, b in enumerate(bearing) if b), default=-1)
            for t, label in enumerate(segment):
                if bearing[t]:
                    letters.append("l")
                elif label != X:
                    letters.append("d")
                elif not real[t]:
                    letters.append("p")
                else:
                    letters.append("c" if t < last else "e")
        kinds.append(letters)
    return kinds


def letters(kinds: tokens.TokenKinds) -> list[list[str]]:
    """The same letters from the masks, checking that every token has one kind."""
    found = [["?"] * kinds.context.shape[1] for _ in kinds.context]
    named = {
        "l": kinds.loss_bearing,
        "d": kinds.dense & ~kinds.loss_bearing,
        "c": kinds.kept,
        "e": kinds.elided & kinds.context,
        "p": kinds.padding,
    }
    for letter, mask in named.items():
        for row, column in mask.nonzero().tolist():
            assert found[row][column] == "?", "a token of two kinds"
            found[row][column] = letter
    return found


def kinds(
    labels: list[list[int]], mask: list[list[int]] | None = None, positions: list[list[int]] | None = None
) -> str:
    found = tokens.classify(
        torch.tensor(labels),
        None if mask is None else torch.tensor(mask),
        None if positions is None else torch.tensor(positions),
    )
    return " ".join("".join(row) for row in letters(found))


def test_the_token_before_the_first_output_token_is_loss_bearing() -> None:
    assert kinds([[X, X, X, 7, 8]]) == "cclld"


def test_left_and_right_padding_are_neither() -> None:
    assert kinds([[X, X, 7, 8, X], [X, X, X, X, 9]], [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]) == "clldp ppcld"


def test_several_turns_leave_context_between_them() -> None:
    # user, answer, user, answer, and a last user turn that nothing reads
    assert kinds([[X, X, 5, 6, X, X, X, 7, X, X]]) == "clldccldee"


def test_elision_begins_after_the_last_loss_bearing_token() -> None:
    labels = torch.tensor([[X, X, 5, 6, X, X], [X, X, X, X, X, 4]])
    assert tokens.classify(labels).elided.tolist() == [[False] * 3 + [True] * 3, [False] * 5 + [True]]
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    assert tokens.classify(labels, mask).elided.tolist() == [[False] * 3 + [True, True, False], [False] * 5 + [True]]


def test_rows_without_a_target_are_elided_whole() -> None:
    assert kinds([[X, X, X], [X, 4, 5]]) == "eee lld"


def test_a_target_in_first_place_is_dense_and_predicted_by_nobody() -> None:
    assert kinds([[4, X, X, 5]]) == "dcld"


def test_every_token_an_output() -> None:
    assert kinds([[1, 2, 3]]) == "lld"


def test_packed_segments_are_separate() -> None:
    positions = [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    # the first segment's tail and the third segment are elided; 6 heads the second segment: predicted by nobody
    assert kinds([[X, X, 5, X, 6, X, 7, X, X]], positions=positions) == "cldedldee"
    # one row under a mask: attention crosses, so only what follows the row's last loss-bearing position is elided
    assert kinds([[X, X, 5, X, 6, X, 7, X, X]], mask=[[1] * 9], positions=positions) == "cldldldee"


def test_a_gap_in_the_positions_starts_a_segment() -> None:
    assert tokens.segments(torch.zeros(1, 5).long(), None, torch.tensor([[0, 1, 2, 7, 8]])).tolist() == [
        [0, 0, 0, 1, 1]
    ]
    assert kinds([[X, X, 5, X, 6]], positions=[[0, 1, 2, 7, 8]]) == "cldld"


def test_what_is_no_tensor_is_named() -> None:
    given = tokens.Given(torch.zeros(1, 4).long(), {"full_attention": None}, None)
    with pytest.raises(InputError, match=r"attention_mask is a dict: give a tensor \(batch, sequence\)"):
        _ = given.on_cpu


def test_one_row_of_positions_serves_all() -> None:
    assert kinds([[X, 1, X, X, 2], [X, X, X, X, 2]], positions=[[0, 1, 0, 1, 2]]) == "ldcld eecld"


def test_a_target_under_the_mask_counts_as_the_loss_counts_it() -> None:
    assert kinds([[X, 4, X, X]], [[0, 1, 1, 0]]) == "ldep"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_against_the_definition_in_loops(seed: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, 9, (4, 12), generator=generator)
    labels[torch.rand(4, 12, generator=generator) < 0.7] = X
    mask = positions = None
    if packed:
        positions = torch.arange(12).repeat(4, 1)
        for row in range(4):
            cut = int(torch.randint(1, 12, (1,), generator=generator))
            positions[row, cut:] -= cut
    elif seed % 2:
        lengths = torch.randint(1, 13, (4, 1), generator=generator)
        mask = (torch.arange(12) < lengths) if seed % 4 == 1 else (torch.arange(12) >= 12 - lengths)
        labels[~mask] = X
    found = letters(tokens.classify(labels, mask, positions))
    assert found == by_loops(labels, mask, positions)
    shifted = torch.roll(labels, 1, dims=1)  # a definition that forgets the shift by one would be seen
    assert letters(tokens.classify(shifted, mask, positions)) != found


def test_kinds_follow_the_rows() -> None:
    labels = torch.tensor([[X, X, 1, 2], [X, 3, X, X], [X, X, X, X]])
    order = torch.tensor([2, 0, 1])
    direct, permuted = tokens.classify(labels), tokens.classify(labels[order])
    assert torch.equal(direct.kept[order], permuted.kept)
    assert torch.equal(direct.dense[order], permuted.dense)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4,), None, None), r"labels have shape \(4,\)"),
        (((2, 4), (2, 5), None), r"attention_mask has shape \(2, 5\), labels \(2, 4\)"),
        (((2, 4), (2, 1, 4, 4), None), r"attention_mask has shape \(2, 1, 4, 4\)"),
        (((2, 4), None, (3, 4)), r"position_ids have shape \(3, 4\)"),
    ],
)
def test_shapes_that_do_not_match_are_refused(shapes: tuple, message: str) -> None:
    labels, mask, positions = (None if shape is None else torch.zeros(shape, dtype=torch.long) for shape in shapes)
    assert labels is not None
    with pytest.raises(InputError, match=message):
        tokens.classify(labels, mask, positions)
