"""What norm_constrained.py trains: an MLP and a CNN on digits, and a transformer on characters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

CONTEXT = 64  # characters


@dataclass(frozen=True)
class Task:
    """A net, its data, and the learning rates to try."""

    net: Callable[[], nn.Module]
    batch: Callable[[Generator], tuple[Tensor, Tensor]]
    held_out: Callable[[], tuple[Tensor, Tensor]]
    steps: int
    radius: float
    head_radius: float
    rates: dict[str, tuple[float, ...]]
    rest_rate: float  # of Adam, for what Muon leaves: the best of Adam for all
    search_seeds: int
    other_seeds: int  # of the runs with the best rate, after those of the search
    classifies: bool = True  # and is judged by accuracy, and attacked


# Digits


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All digits, shuffled: the last 500 are held out."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=Generator().manual_seed(0))
    return torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]


def some_digits(generator: Generator) -> tuple[Tensor, Tensor]:
    x, y = digits()
    batch = torch.randint(len(y) - 500, (64,), generator=generator)
    return x[batch], y[batch]


def held_out_digits() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[-500:], y[-500:]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


# Characters


@cache
def text() -> Tensor:
    """The first 200,000 characters of Python's help, as numbers: the last 20,000 are held out."""
    characters = "\n".join(topics.values())[:200_000]
    number = {character: i for i, character in enumerate(sorted(set(characters)))}
    return torch.tensor([number[character] for character in characters])


def some_text(generator: Generator) -> tuple[Tensor, Tensor]:
    """Windows of the text, and for each character the next one."""
    starts = torch.randint(180_000 - CONTEXT, (16,), generator=generator)
    windows = text()[starts[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def held_out_text() -> tuple[Tensor, Tensor]:
    windows = text()[180_000:].unfold(0, CONTEXT + 1, CONTEXT)
    return windows[:, :-1], windows[:, 1:]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)
        query, key, value = qkv.transpose(-3, -2)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(-3, -2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        characters = int(text().max()) + 1
        self.character, self.place = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.character(x) + self.place.weight)))


TASKS = {
    "mlp": Task(
        mlp,
        some_digits,
        held_out_digits,
        steps=600,
        radius=4.0,
        head_radius=100.0,
        rates={
            "Adam": (0.001, 0.003, 0.01, 0.03, 0.1),
            "Muon": (0.003, 0.01, 0.03, 0.1, 0.3),
            "Scion": (0.001, 0.002, 0.005, 0.01, 0.02),
            "Scion, unconstrained": (0.0005, 0.001, 0.002, 0.005, 0.01),
        },
        rest_rate=0.01,
        search_seeds=5,
        other_seeds=3,
    ),
    "cnn": Task(
        cnn,
        some_digits,
        held_out_digits,
        steps=300,
        radius=4.0,
        head_radius=200.0,
        rates={
            "Adam": (0.01, 0.03, 0.1),
            "Muon": (0.03, 0.1, 0.3),
            "Scion": (0.01, 0.02, 0.04),
            "Scion, unconstrained": (0.003, 0.01, 0.03),
        },
        rest_rate=0.03,
        search_seeds=3,
        other_seeds=3,
    ),
    "transformer": Task(
        Transformer,
        some_text,
        held_out_text,
        steps=300,
        radius=2.0,
        head_radius=50.0,
        rates={
            "Adam": (0.003, 0.01, 0.03),
            "Muon": (0.03, 0.1, 0.3),
            "Scion": (0.01, 0.02, 0.04),
            "Scion, unconstrained": (0.005, 0.01, 0.02),
        },
        rest_rate=0.01,
        search_seeds=1,
        other_seeds=2,
        classifies=False,
    ),
}
