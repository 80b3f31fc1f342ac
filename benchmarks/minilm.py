"""all-MiniLM-L6-v2 in plain torch: a BERT encoder, mean pooling, unit length.

The published weights under the published names, so that no other framework is needed to export
them (Devlin et al., 2019; the pooling is that of the model's sentence-transformers card).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Embeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, ids: Tensor, types: Tensor) -> Tensor:
        """Int64 ``[batch, tokens]`` twice to float32 ``[batch, tokens, hidden]``."""
        positions = torch.arange(ids.shape[1])
        total = self.word_embeddings(ids) + self.token_type_embeddings(types)
        normalised: Tensor = self.LayerNorm(total + self.position_embeddings(positions))
        return normalised


class SelfAttention(nn.Module):
    """Multi-head attention, written out as BERT's reference code has it."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.query = nn.Linear(c.hidden_size, c.hidden_size)
        self.key = nn.Linear(c.hidden_size, c.hidden_size)
        self.value = nn.Linear(c.hidden_size, c.hidden_size)

    def _split(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        return x.view(batch, tokens, self.heads, hidden // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x`` is ``[batch, tokens, hidden]``; ``bias`` is added to the scores."""
        query, key, value = (self._split(f(x)) for f in (self.query, self.key, self.value))
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        context = torch.softmax(scores + bias, dim=-1) @ value
        return context.transpose(1, 2).reshape(x.shape)


class Projection(nn.Module):
    """Linear, add the residual, normalise."""

    def __init__(self, c: Any, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """``[batch, tokens, width]`` and ``[batch, tokens, hidden]`` to the latter's shape."""
        normalised: Tensor = self.LayerNorm(self.dense(x) + residual)
        return normalised


class Attention(nn.Module):
    """Self-attention and its projection."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.self = SelfAttention(c)
        self.output = Projection(c, c.hidden_size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Shape-preserving."""
        projected: Tensor = self.output(self.self(x, bias), x)
        return projected


class Intermediate(nn.Module):
    """The wide half of the feed-forward network."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """Exact (erf) GELU."""
        return nn.functional.gelu(self.dense(x))


class Layer(nn.Module):
    """One transformer block, normalising after each half."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.attention = Attention(c)
        self.intermediate = Intermediate(c)
        self.output = Projection(c, c.intermediate_size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Shape-preserving."""
        x = self.attention(x, bias)
        projected: Tensor = self.output(self.intermediate(x), x)
        return projected


class Encoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Shape-preserving."""
        for layer in self.layer:
            x = layer(x, bias)
        return x


class SentenceEncoder(nn.Module):
    """Tokens to a sentence's embedding of unit length."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = Encoder(c)

    @classmethod
    def load(cls, folder: Path) -> SentenceEncoder:
        """Read ``config.json`` and ``model.safetensors`` as published."""
        from safetensors.torch import load_file

        model = cls(SimpleNamespace(**json.loads((folder / "config.json").read_text())))
        weights = load_file(folder / "model.safetensors")
        unused = {name for name in weights if name.startswith("pooler.")}
        unused.add("embeddings.position_ids")
        model.load_state_dict({k: v for k, v in weights.items() if k not in unused})
        return model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Int64 ``[batch, tokens]`` three times to float32 ``[batch, hidden]``."""
        mask = attention_mask.to(torch.float32)
        bias = (1.0 - mask[:, None, None, :]) * torch.finfo(torch.float32).min
        tokens = self.encoder(self.embeddings(input_ids, token_type_ids), bias)
        weights = mask[:, :, None]
        mean = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, p=2.0, dim=1)
