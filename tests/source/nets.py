"""Small networks as a user's own code would have them; named in tests with --source."""

from __future__ import annotations

import functools
import os
import signal
import time

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu_(self.bn(self.conv(x))))


class Small(nn.Module):
    """Convolutions, in-place operations, a resize, attention in one operation, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3), Block(8))
        self.query = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(x)
        y = nn.functional.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        y = nn.functional.max_pool2d(y, 3, 2)
        y = y.flatten(2).transpose(1, 2)
        q = self.query(y)
        q, k = q[:, None], y[:, None]  # one head
        y = self.norm(y + nn.functional.scaled_dot_product_attention(q, k, k)[:, 0])
        y = nn.functional.gelu(y)
        return self.head(y.mean(1))


def small() -> nn.Module:
    torch.manual_seed(0)
    made = Small()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as training leaves them
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return made.eval()


def in_training_mode() -> nn.Module:
    return small().train()


def crashes() -> nn.Module:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def hangs() -> nn.Module:
    time.sleep(600)
    raise AssertionError


def fails() -> nn.Module:
    raise RuntimeError("no weights on this machine")


def no_module() -> dict[str, Tensor]:
    return small().state_dict()


class Branches(Small):
    """What it executes depends on its input."""

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x)
        return made.sigmoid() if x.mean() > 0 else made


def branches() -> nn.Module:
    made = Branches()
    made.load_state_dict(small().state_dict())
    return made.eval()


def compiled() -> nn.Module:
    made = small()
    made.forward = torch.compile(made.forward)
    return made


def unwritten() -> nn.Module:
    """No line of the user's own code runs in it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()


class Sequence(nn.Module):
    """Tokens with positions and a reshape, whose sizes a tracer may hold fast."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 12)
        self.places = nn.Embedding(64, 12)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.mix(x).reshape(ids.shape[0], ids.shape[1], 3, 4).softmax(-1)
        return self.head(x.reshape(ids.shape[0], ids.shape[1], 12))


class FrozenSequence(Sequence):
    """The same with its size as a number, as exporting code may have it."""

    def forward(self, ids: Tensor) -> Tensor:
        tokens = int(ids.shape[1])
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.mix(x).reshape(ids.shape[0], tokens, 3, 4).softmax(-1)
        return self.head(x.reshape(ids.shape[0], ids.shape[1], 12))


class Branching(Sequence):
    """What it does depends on the length."""

    def forward(self, ids: Tensor) -> Tensor:
        made = super().forward(ids)
        return made * 2 if ids.shape[1] > 8 else made


def sequence() -> nn.Module:
    torch.manual_seed(0)
    return Sequence().eval()


def branching() -> nn.Module:
    made = Branching()
    made.load_state_dict(sequence().state_dict())
    return made.eval()


def _without_cache(forward):
    @functools.wraps(forward)
    def filled_in(self, *args, **named):
        return forward(self, *args, **{"use_cache": False, **named})

    return filled_in


class Keyed(Branching):
    """Keywords with defaults, one of them filled in, and a mapping, as transformers has them."""

    @_without_cache
    def forward(self, ids: Tensor, mask: Tensor | None = None, use_cache: bool | None = None):
        made = super().forward(ids)
        return {"logits": made if mask is None else made * mask[..., None]}


def keyed() -> nn.Module:
    made = Keyed()
    made.load_state_dict(sequence().state_dict())
    return made.eval()
