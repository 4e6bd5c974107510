"""What is dropped together: channels, positions, blocks, examples."""

from __future__ import annotations

import pytest
import torch

from regraft import nn
from regraft.variants.token import token_dropout


def same_along(y: torch.Tensor, *axes: int) -> bool:
    """Is the mask the same along these axes (and not everywhere the same)?"""
    first = y
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    return bool((y == first).all()) and len(y.unique()) == 2


@pytest.mark.parametrize(
    ("module", "shape", "axes", "free"),
    [
        (nn.SpatialDropout(0.5), (8, 16, 5, 4), (2, 3), (0, 1)),
        (nn.SpatialDropout(0.5), (8, 5, 16), (1,), (0, 2)),
        (nn.SpatialDropout(0.5), (8, 16), (), (0, 1)),
        (nn.SpatialDropout(0.5, channel_axis=-1), (8, 5, 4, 16), (1, 2), (0, 3)),
        (nn.TokenDropout(0.5), (8, 16, 5), (2,), (0, 1)),
        (nn.TokenDropout(0.5), (8, 5, 4, 6), (1,), (0, 2, 3)),
        (nn.TokenDropout(0.5, channel_axis=-1), (8, 4, 6, 5), (3,), (0, 1, 2)),
        (nn.DropPath(0.5), (32, 3, 4), (1, 2), (0,)),
        (nn.DropPath(0.5), (32,), (), (0,)),
    ],
    ids=str,
)
def test_the_mask_is_shared_along_these_axes_and_no_others(module, shape, axes, free):
    torch.manual_seed(0)
    y = module(torch.ones(shape))
    assert same_along(y, *axes)
    for axis in free:
        assert not same_along(y, axis)


def test_padding_is_left_as_it_is():
    x = torch.ones(64, 5, 3)
    mask = torch.tensor([1, 1, 1, 0, 0]).expand(64, 5)
    torch.manual_seed(0)
    y = nn.TokenDropout(0.5)(x, mask)
    assert torch.equal(y[:, 3:], x[:, 3:])
    assert set(y[:, :3].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(token_dropout(x, 0.5, mask=torch.zeros(64, 5)), x)


def test_blocks_are_squares_of_their_size():
    """At a rate so low that blocks rarely meet, whatever is dropped is such a square."""
    torch.manual_seed(3)
    y = nn.DropBlock(0.0005, block_size=3)(torch.ones(20, 4, 40, 40))
    dropped = (y == 0).float()
    eroded = -torch.nn.functional.max_pool2d(-dropped, 3, 1)
    inner = dropped[..., 2:-2, 2:-2].sum()
    assert inner > 0
    opened = torch.nn.functional.max_pool2d(torch.nn.functional.pad(eroded, (2, 2, 2, 2)), 3, 1)
    assert torch.equal(opened[..., 3:-3, 3:-3], dropped[..., 3:-3, 3:-3])


@pytest.mark.parametrize("shape", [(2000, 1, 9, 9), (2000, 9, 4), (2000, 2, 3, 3)])
def test_the_border_is_dropped_as_often_as_the_middle(shape):
    p, count = 0.3, 2000
    torch.manual_seed(0)
    dropped = (nn.DropBlock(p, block_size=5)(torch.ones(shape)) == 0).double().mean(0)
    assert (dropped - p).abs().max() < 5 * (p * (1 - p) / count) ** 0.5


def test_blocks_of_a_sequence_are_stretches_of_positions():
    torch.manual_seed(0)
    y = nn.DropBlock(0.02, block_size=4)(torch.ones(50, 60, 2))
    runs = [
        len(run)
        for row in (y == 0).transpose(1, 2).flatten(0, 1).int().tolist()
        for run in "".join(map(str, row)).strip("1").split("0")
        if run
    ]
    assert runs
    assert min(runs) >= 4
