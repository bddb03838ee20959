"""Token Merging of timm's Vision Transformers, one image at a time, in float64 and in loops.

Written from arXiv 2210.09461 and kept apart from the code under test: only timm's parameters, embeddings, tables of
sines and cosines, and leaf modules (linear layers, norms, the MLP) are used, never its blocks, attention, pooling or
head.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
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


def rotate(vector: Tensor, sine: Tensor, cosine: Tensor, halves: bool) -> Tensor:
    """Turn each pair of channels, neighbours or half a vector apart, by its angle: a product of complex numbers."""
    half = len(vector) // 2
    first, second = (slice(0, half), slice(half, None)) if halves else (slice(0, None, 2), slice(1, None, 2))
    turned = torch.complex(vector[first], vector[second]) * torch.complex(cosine[first], sine[first])
    out = torch.empty_like(vector)
    out[first], out[second] = turned.real, turned.imag
    return out


def rotate_all(x: Tensor, table: Tensor | None, positions: list[int | None], halves: bool) -> Tensor:
    """x: one head's queries or keys, [tokens, channels]; table: [patches, 2 * channels]; None has no position."""
    if table is None:
        return x
    sines, cosines = table.double().chunk(2, dim=1)
    rows = [
        row if position is None else rotate(row, sines[position], cosines[position], halves)
        for row, position in zip(x, positions, strict=True)
    ]
    return torch.stack(rows)


@dataclass
class Tokens:
    """What attention needs to know of the tokens beside their channels."""

    sizes: list[int]
    positions: list[int | None]
    proportional: bool

    def log_sizes(self) -> Tensor:
        return torch.tensor([math.log(size) if self.proportional else 0.0 for size in self.sizes], dtype=torch.float64)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor) -> Tensor:
    """One head: [tokens, channels] each."""
    return (q @ k.T / math.sqrt(q.shape[1]) + log_sizes[None, :]).softmax(dim=1) @ v


def queries_keys_values(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[tokens, channels] each."""
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    if getattr(attn, "q_bias", None) is not None:  # keys have no bias
        weights = attn.qkv.weight.chunk(3)
        return x @ weights[0].T + attn.q_bias, x @ weights[1].T, x @ weights[2].T + attn.v_bias
    return attn.qkv(x).chunk(3, dim=1)


def attention(attn: nn.Module, x: Tensor, tokens: Tokens, table: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The attention's output, and each head's keys, not rotated.

    x: [tokens, channels]; table: [heads or 1, patches, 2 * channels] sines and cosines of each position.
    """
    heads, width = attn.num_heads, attn.head_dim
    shared = heads // getattr(attn, "num_kv_heads", heads)
    q, k, v = queries_keys_values(attn, x)
    halves = getattr(attn, "rotate_half", False)
    outputs, keys = [], []
    for head in range(heads):
        own, of = slice(head * width, (head + 1) * width), slice(head // shared * width, (head // shared + 1) * width)
        q_head, k_head = attn.q_norm(q[:, own]), attn.k_norm(k[:, of])
        keys.append(k_head)
        angles = None if table is None else table[head if len(table) > 1 else 0]
        q_head = rotate_all(q_head, angles, tokens.positions, halves)
        k_head = rotate_all(k_head, angles, tokens.positions, halves)
        outputs.append(softmax_attention(q_head, k_head, v[:, of], tokens.log_sizes()))
    out = attn.norm(torch.cat(outputs, dim=1))
    if attn.gate is not None:
        out = out * torch.sigmoid(attn.gate(x))
    return attn.proj(out), keys


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


def parallel_scaling(block: nn.Module, x: Tensor, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
    """What attention and MLP, side by side, add to x, and each head's keys."""
    heads, width = block.num_heads, block.head_dim
    projected = block.in_proj(block.in_norm(x))
    hidden, rest = projected[:, : -3 * heads * width], projected[:, -3 * heads * width :]
    if block.mlp_bias is not None:
        hidden = hidden + block.mlp_bias
    q, k, v = rest.chunk(3, dim=1)
    outputs, keys = [], []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        q_head, k_head = block.q_norm(q[:, own]), block.k_norm(k[:, own])
        outputs.append(softmax_attention(q_head, k_head, v[:, own], tokens.log_sizes()))
        keys.append(k_head)
    attended, activated = torch.cat(outputs, dim=1), block.mlp_act(hidden)
    if block.out_proj is not None:
        weight = block.out_proj.weight
        found = attended @ weight[:, : heads * width].T + activated @ weight[:, heads * width :].T
        if block.out_proj.bias is not None:
            found = found + block.out_proj.bias
    else:
        found = block.attn_out_proj(attended) + block.mlp_out_proj(activated)
    return block.ls(found), keys


def before_merging(block: nn.Module, x: Tensor, tokens: Tokens, table: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The tokens [tokens, channels] as they are merged, and each head's keys."""
    if isinstance(block, ParallelScalingBlock):
        found, keys = parallel_scaling(block, x, tokens)
        return x + found, keys
    if isinstance(block, ParallelThingsBlock):
        each = [(branch, attention(branch.attn, branch.norm(x), tokens)) for branch in block.attns]
        found = sum(branch.ls(out) for branch, (out, _) in each)
        return x + found, [key for _, (_, keys) in each for key in keys]
    if isinstance(block, ResPostBlock | EvaBlockPostNorm):
        out, keys = attention(block.attn, x, tokens, table)
        return x + block.norm1(out), keys
    out, keys = attention(block.attn, block.norm1(x), tokens, table)
    return x + (scaled(out, block.gamma_1) if isinstance(block, EvaBlock) else block.ls1(out)), keys


def after_merging(block: nn.Module, x: Tensor) -> Tensor:
    """[tokens, channels]"""
    if isinstance(block, ParallelScalingBlock):
        return x
    if isinstance(block, ParallelThingsBlock):
        return x + sum(branch.ls(branch.mlp(branch.norm(x))) for branch in block.ffns)
    if isinstance(block, ResPostBlock | EvaBlockPostNorm):
        return x + block.norm2(block.mlp(x))
    out = block.mlp(block.norm2(x))
    return x + (scaled(out, block.gamma_2) if isinstance(block, EvaBlock) else block.ls2(out))


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
    # Eva's attention pooling reads all tokens, its other pooling patches alone.
    everything = model.global_pool == "map" if isinstance(model, Eva) else model.pool_include_prefix
    first = 0 if everything else model.num_prefix_tokens
    x, sizes = x[first:], sizes[first:]
    if model.global_pool == "map":
        return attention_pool(model.attn_pool, x, sizes)
    mean = sum(size * row for size, row in zip(sizes, x, strict=True)) / sum(sizes)
    largest = torch.stack([column.max() for column in x.T])
    return {"avg": mean, "max": largest, "avgmax": (mean + largest) / 2}[model.global_pool]


def embed(model: nn.Module, image: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """The tokens [tokens, channels], and each block's table [heads or 1, patches, 2 * channels]."""
    depth = len(model.blocks)
    if isinstance(image, Mapping):
        embedded = model._forward_embeds(image["patches"][None], image["patch_coord"][None], None, None)
        x, rope = embedded["patches"], embedded["rope_embeds"]
        if rope is None:
            return x[0], [None] * depth
        return x[0], [table[0] for table in rope] if model.rope_is_mixed else [rope[0]] * depth
    if isinstance(model, NaFlexVit):
        embedded = model._forward_embeds(image[None], None, None, None)
        x, rope, mixed = embedded["patches"], embedded["rope_embeds"], model.rope_is_mixed
    elif isinstance(model, Eva):
        x, rope = model._pos_embed(model.patch_embed(image[None]))
        x, mixed = model.norm_pre(x), model.rope_mixed
    else:
        return model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0], [None] * depth
    if rope is None:
        return x[0], [None] * depth
    return x[0], list(rope) if mixed else [rope[None]] * depth


@torch.no_grad()
def forward(
    model: nn.Module, image: Tensor | Mapping[str, Tensor], per_block: Sequence[int], *, proportional: bool = True
) -> ReferenceOutput:
    """image: [channels, height, width], or patches without padding; model and image in float64."""
    assert len(per_block) == len(model.blocks)
    x, tables = embed(model, image)
    prefix = model.num_prefix_tokens
    sizes = [1] * len(x)
    positions: list[int | None] = [None] * prefix + list(range(len(x) - prefix))
    members = [[position] for position in range(len(x))]  # input positions in each token
    counts = []

    for block, table, r in zip(model.blocks, tables, per_block, strict=True):
        x, keys = before_merging(block, x, Tokens(sizes, positions, proportional), table)
        groups = match((sum(keys) / len(keys)).numpy(), r, prefix)
        merged, sizes = combine(x.numpy(), sizes, groups)
        x = after_merging(block, torch.from_numpy(merged))
        positions = [positions[group[0]] for group in groups]  # the destination comes first
        members = [[i for position in group for i in members[position]] for group in groups]
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
