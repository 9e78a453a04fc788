"""UNet++ (Zhou, Siddiquee, Tajbakhsh, Liang 2018, arXiv:1807.10165): nested dense skips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.models.blocks import (
    ConvChain,
    Norm,
    check_depth,
    he_init,
    join,
    level_widths,
    max_pool,
)
from tilepipe.models.net import InferenceNet, Net, TrainingOutput


class UNetPlusPlus(Net):
    """Nodes X(i, j): level i, j-th step; X(i, j) joins X(i, 0..j-1) and the upsampled X(i+1, j-1).

    (B, C, Y, X) -> (B, K, Y, X); Y and X are multiples of 2^depth. Training returns the heads of
    X(0, depth), X(0, depth - 1), …, X(0, 1): the deep supervision.

    ``level`` says how ``inference()`` reads them: 0 takes the mean of all logits (the paper's
    accurate mode), d in 1..depth keeps X(0, d) alone and prunes all that it does not need (L^d).
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        base: int = 32,
        *,
        depth: int = 4,
        widths: Sequence[int] | None = None,
        norm: Norm = "batch",
        level: int = 0,
    ) -> None:
        super().__init__(in_channels, classes)
        width = level_widths(base, check_depth(depth) + 1, widths)
        if not isinstance(level, int) or not 0 <= level <= depth:
            raise ModelError(f"level {level!r}; pruned inference takes 0 (all) to {depth}")
        self.depth = depth
        self.level = level
        self.policy = (
            f"mean of the logits of {depth} heads" if level == 0 else f"head {level}, pruned"
        )
        previous = [in_channels, *width[:-1]]
        self.nodes = nn.ModuleDict()
        self.ups = nn.ModuleDict()
        for i in range(depth + 1):
            self.nodes[f"{i}_0"] = ConvChain(previous[i], width[i], norm=norm)
            for j in range(1, depth + 1 - i):
                self.ups[f"{i}_{j}"] = nn.ConvTranspose2d(width[i + 1], width[i], 2, stride=2)
                self.nodes[f"{i}_{j}"] = ConvChain((j + 1) * width[i], width[i], norm=norm)
        self.heads = nn.ModuleDict(
            {str(j): nn.Conv2d(width[0], classes, 1) for j in range(1, depth + 1)}
        )
        self.step_px = self.least_px = 2**depth
        he_init(self)

    def _rows(self, x: Tensor, steps: int) -> list[Tensor]:
        """X(0, 0) … X(0, steps), each (B, base, Y, X)."""
        columns: list[list[Tensor]] = []
        for i in range(steps + 1):
            x = self.nodes[f"{i}_0"](x if i == 0 else max_pool(x))
            columns.append([x])
        for j in range(1, steps + 1):
            for i in range(steps + 1 - j):
                up = self.ups[f"{i}_{j}"](columns[i + 1][j - 1])
                columns[i].append(self.nodes[f"{i}_{j}"](join(*columns[i], up)))
        return columns[0]

    def infer(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) -> logits (B, K, Y, X) by ``level``."""
        if self.level:
            logits: Tensor = self.heads[str(self.level)](self._rows(x, self.level)[-1])
            return logits
        row = self._rows(x, self.depth)
        heads = [self.heads[str(j)](row[j]) for j in range(1, self.depth + 1)]
        return torch.stack(heads).mean(dim=0)

    def forward(self, x: Tensor) -> TrainingOutput:
        """Return the logits of every head, the deepest first."""
        self.check_size(x)
        row = self._rows(x, self.depth)
        return {"logits": [self.heads[str(j)](row[j]) for j in range(self.depth, 0, -1)]}

    def main_heads(self) -> list[nn.Conv2d]:
        """Return the heads that ``infer`` reads."""
        names = [str(self.level)] if self.level else list(self.heads)
        return [head for name in names if isinstance(head := self.heads[name], nn.Conv2d)]

    def inference(self) -> InferenceNet:
        """Return the inference form; a pruned one holds only the nodes that it runs."""
        form = super().inference()
        net = form.net
        if isinstance(net, UNetPlusPlus) and self.level:
            for parts in (net.nodes, net.ups):
                for key in list(parts):
                    i, j = (int(number) for number in key.split("_"))
                    if i + j > self.level:
                        del parts[key]
            for key in list(net.heads):
                if key != str(self.level):
                    del net.heads[key]
        return form
