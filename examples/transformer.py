"""A transformer whose heads project orthonormally: each head's queries, keys and values keep their own subspaces.

It learns to sort: for each place of a sequence of digits, which digit stands there when they are in order.
"""

import sys
import warnings

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

import subspace_meta as sm

HEADS, WIDTH, LENGTH, DIGITS = 4, 32, 12, 10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        found = self.norms[0](x)
        layers = (self.queries, self.keys, self.values)
        q, k, v = (rearrange(layer(found), "b t (h c) -> b h t c", h=HEADS) for layer in layers)
        x = x + self.out(rearrange(functional.scaled_dot_product_attention(q, k, v), "b h t c -> b t (h c)"))
        return x + self.perceptron(self.norms[1](x))


class Sorter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.digits = nn.Embedding(DIGITS, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, DIGITS)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.blocks(self.digits(sequences) + self.places))


# The weight of a projection holds all heads; seen through this view each head's part is a tall orthonormal matrix.
PER_HEAD = sm.Rule(sm.Stiefel(), sm.MatrixView.heads(HEADS))
RULES = {f"*.{name}.weight": PER_HEAD for name in ("queries", "keys", "values")}


def main(steps: int = 300) -> float:
    torch.manual_seed(0)
    model, generator = Sorter(), torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.optim.ProjectionWarning)  # PyTorch's random projections are not orthonormal
        optimizer = sm.optim.SubspaceMeta(model, RULES, others=None)
    share = 0.0
    for step in range(1, steps + 1):
        sequences = torch.randint(DIGITS, (64, LENGTH), generator=generator)
        in_order = sequences.sort(dim=-1).values
        found = model(sequences)
        optimizer.zero_grad()
        functional.cross_entropy(found.flatten(0, 1), in_order.flatten()).backward()
        optimizer.step()
        share = (found.argmax(-1) == in_order).float().mean().item()
        if step % 50 == 0:
            print(f"step {step}: {share:.1%} of the digits at their place")
    print(f"largest violation of the {3 * HEADS * 2} projections {max(optimizer.check().values()):.1e}")
    return share


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
