"""Named draws that no rule takes have a row for each line that draws."""

import torch
from torch import nn

import regraft


class TwoLines(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if not self.training or torch.rand([]) > 0.1:
            x = self.first(x)
        if not self.training or torch.rand([]) > 0.1:
            x = self.second(x)
        return x


def test_two_lines_that_leave_layers_out_are_two_rows():
    left = regraft.inspect(TwoLines().train(), inputs=torch.ones(2, 4)).left
    assert [(row["name"], row["count"]) for row in left] == [("LayerDrop", 1)] * 2
    assert len({row["source"] for row in left}) == 2
