"""Token Merging of a timm Vision Transformer, one image at a time, in float64 and in loops.

Written from arXiv 2210.09461 and kept apart from the code under test: only timm's parameters and
leaf modules (linear layers, norms, the MLP) are used, never its attention, pooling or head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn


@dataclass
class ReferenceOutput:
    logits: Tensor
    features: Tensor
    tokens: Tensor
    tokens_per_block: tuple[int, ...]
    token_map: list[int]
    sizes: list[int]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / norms if norms > 0 else 0.0


def match(metric: np.ndarray, r: int, prefix: int) -> list[list[int]]:
    """The input positions in each output token; in the order of the output tokens.

    metric: [tokens, channels]. Where nothing is merged, tokens stay in their places.
    """
    count = len(metric)
    r = min(r, (count - prefix) // 2)
    if r == 0:
        return [[i] for i in range(count)]
    sources = [i for i in range(prefix, count) if i % 2 == 0]
    destinations = [i for i in range(prefix, count) if i % 2 == 1]

    best_edge = {}
    for source in sources:
        best, best_score = -1, -math.inf
        for destination in destinations:
            score = cosine(metric[source], metric[destination])
            if score > best_score:  # an equal score later in the order does not win
                best, best_score = destination, score
        best_edge[source] = (best, best_score)

    strongest_first = sorted(sources, key=lambda source: (-best_edge[source][1], source))
    merging = strongest_first[:r]

    members = {destination: [destination] for destination in destinations}
    for source in merging:
        members[best_edge[source][0]].append(source)
    staying = [source for source in sources if source not in merging]
    return (
        [[i] for i in range(prefix)]
        + [[source] for source in staying]
        + [members[destination] for destination in destinations]
    )


def combine(x: np.ndarray, sizes: Sequence[float], groups: list[list[int]]) -> tuple[np.ndarray, list[float]]:
    """The size-weighted mean of each group. x: [tokens, channels]."""
    rows, new_sizes = [], []
    for group in groups:
        total = sum(sizes[i] for i in group)
        rows.append(sum(sizes[i] * x[i] for i in group) / total)
        new_sizes.append(total)
    return np.stack(rows), new_sizes


def attention(attn: nn.Module, x: Tensor, sizes: list[int], proportional: bool) -> tuple[Tensor, Tensor]:
    """The attention's output and the keys averaged over heads. x: [tokens, channels]."""
    heads, width = attn.num_heads, attn.head_dim
    q, k, v = attn.qkv(x).split(heads * width, dim=1)
    log_size = torch.tensor([math.log(size) for size in sizes], dtype=torch.float64)
    outputs, keys = [], []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        q_head, k_head = attn.q_norm(q[:, columns]), attn.k_norm(k[:, columns])
        scores = q_head @ k_head.T / math.sqrt(width)
        if proportional:
            scores = scores + log_size[None, :]
        outputs.append(scores.softmax(dim=1) @ v[:, columns])
        keys.append(k_head)
    out = attn.norm(torch.cat(outputs, dim=1))
    if attn.gate is not None:
        out = out * torch.sigmoid(attn.gate(x))
    return attn.proj(out), sum(keys) / heads


def attention_pool(pool: AttentionPoolLatent, x: Tensor, sizes: list[int]) -> Tensor:
    """One learned query attends to the tokens, each counted as often as its size."""
    heads, width = pool.num_heads, pool.head_dim
    q = pool.q(pool.latent[0])
    k, v = pool.kv(x).split(heads * width, dim=1)
    log_size = torch.tensor([math.log(size) for size in sizes], dtype=torch.float64)
    outputs = []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        scores = pool.q_norm(q[:, columns]) @ pool.k_norm(k[:, columns]).T / math.sqrt(width)
        outputs.append((scores + log_size).softmax(dim=1) @ v[:, columns])
    out = pool.proj(torch.cat(outputs, dim=1))
    return (out + pool.mlp(pool.norm(out)))[0]


def pool(model: nn.Module, x: Tensor, sizes: list[int]) -> Tensor:
    """[tokens, channels] to [channels]."""
    if model.global_pool == "token":
        return x[0]
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    x, sizes = x[first:], sizes[first:]
    if model.global_pool == "map":
        return attention_pool(model.attn_pool, x, sizes)
    mean = sum(size * row for size, row in zip(sizes, x, strict=True)) / sum(sizes)
    largest = torch.stack([column.max() for column in x.T])
    return {"avg": mean, "max": largest, "avgmax": (mean + largest) / 2}[model.global_pool]


@torch.no_grad()
def forward(model: nn.Module, image: Tensor, per_block: Sequence[int], *, proportional: bool = True) -> ReferenceOutput:
    """image: [channels, height, width]; model and image in float64."""
    assert image.dtype == torch.float64
    assert len(per_block) == len(model.blocks)
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    prefix = model.num_prefix_tokens
    sizes = [1] * len(x)
    members = [[position] for position in range(len(x))]  # input positions in each token
    counts = []

    for block, r in zip(model.blocks, per_block, strict=True):
        out, metric = attention(block.attn, block.norm1(x), sizes, proportional)
        x = x + block.ls1(out)
        groups = match(metric.numpy(), r, prefix)
        merged, sizes = combine(x.numpy(), sizes, groups)
        x = torch.from_numpy(merged)
        members = [[i for position in group for i in members[position]] for group in groups]
        x = x + block.ls2(block.mlp(block.norm2(x)))
        counts.append(len(x))

    x = model.norm(x)
    owner = {i: token for token, inside in enumerate(members) for i in inside}
    token_map = [owner[i] for i in range(prefix, len(owner))]
    if isinstance(model, VisionTransformerDistilled):
        features = (x[0] + x[1]) / 2
        logits = (model.head(x[0]) + model.head_dist(x[1])) / 2
    else:
        features = model.fc_norm(pool(model, x, sizes))
        logits = model.head(features)
    return ReferenceOutput(logits, features, x, tuple(counts), token_map, sizes)
