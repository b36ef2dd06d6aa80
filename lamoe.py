"""LaMoE: a Llama-2-style decoder whose feed-forward layers are sparse mixtures of experts.

A dense transformer sends every token through every weight. A sparse mixture of experts (MoE) keeps
many feed-forward networks in each layer, and a small router picks a few of them for each token: the
model grows, the work for a token does not. This file is the whole model, from config to text.

- Llama's decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, a cache
- sorted dispatch: one matrix product an expert, and a backward that only gathers
- four routers (topk, noisy, switch, deepseek), each one short class; a fifth is a class and a line
- `n_experts=1` is a dense Llama: the baseline is the same file
- Hugging Face folders both ways: Mixtral, Llama, Qwen3, Qwen3-MoE (section 9)

References
 [1] Llama 2                     Touvron et al. 2023    arXiv:2307.09288
 [2] RMSNorm                     Zhang & Sennrich 2019  arXiv:1910.07467
 [3] Rotary positions (RoPE)     Su et al. 2021         arXiv:2104.09864
 [4] Grouped-query attention     Ainslie et al. 2023    arXiv:2305.13245
 [5] SwiGLU                      Shazeer 2020           arXiv:2002.05202
 [6] Mixtral                     Jiang et al. 2024      arXiv:2401.04088
 [7] Noisy top-k gating          Shazeer et al. 2017    arXiv:1701.06538
 [8] Switch Transformer          Fedus et al. 2021      arXiv:2101.03961
 [9] ST-MoE (router z-loss)      Zoph et al. 2022       arXiv:2202.08906
[10] DeepSeek-V3                 DeepSeek-AI 2024       arXiv:2412.19437
[11] QK-norm                     Henry et al. 2020      arXiv:2010.04245
[12] Llama 3                     Llama team 2024        arXiv:2407.21783

A tensor's name ends in its shape, one letter a dimension:
  B batch   T time (new positions)   S cached positions, or sorted rows in the dispatch
  N = B*T tokens    D dim    H query heads    G key/value heads    R = H/G    K head dim
  E experts    A active experts a token (top_k)    F hidden dim of one expert    V vocabulary
  L layers with experts    1, 2, 3 that many
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- 1. Config: the architecture, and nothing else ------------------------------------------------


@dataclass(frozen=True)
class Config:
    """One line a field; [n: x] says that reference n uses x there.

    Every check raises ValueError with the cause and a remedy.
    """

    vocab_size: int  # distinct token ids, special token included
    dim: int = 128  # width of the residual stream
    n_layers: int = 4  # blocks
    n_heads: int = 2  # query heads
    n_kv_heads: int = 2  # key/value heads; n_heads / n_kv_heads queries share one [4]
    head_dim: int | None = None  # width of a head; None: dim / n_heads
    hidden_dim: int = 256  # hidden width of ONE expert
    n_experts: int = 4  # experts a layer; 1 is a dense Llama, without a router
    top_k: int = 2  # experts a token is sent to
    router: str = "topk"  # which class of section 5
    n_shared_experts: int = 0  # experts that every token passes through besides [10: 1]
    n_dense_layers: int = 0  # first layers that are dense, of the same active width [10: 3]
    seq_len: int = 256  # context [tokens]
    rope_theta: float = 10_000.0  # base of the rotary wavelengths [3]
    rope_factor: float = 1.0  # stretch of the long wavelengths in Llama 3.1 [12: 8; Llama 3.2: 32]
    norm_eps: float = 1e-5  # inside RMSNorm's root [1]
    qk_norm: bool = False  # RMSNorm on each query and key head, before RoPE [11]
    tie_embeddings: bool = False  # the output head is the embedding, transposed
    dropout: float = 0.0  # share of embeddings and layer outputs left out, in training [8: 0.1]
    balance_weight: float = 0.01  # of the balance losses of topk, noisy and switch [8: 0.01]
    z_weight: float = 0.001  # topk: of the router z-loss [9: 0.001]
    capacity_factor: float = 1.25  # switch: places over tokens, in training [8: 1 to 1.25]
    eval_capacity_factor: float | None = None  # in evaluation; None: none, so batches don't matter
    jitter: float = 0.01  # switch: noise on the router's input, in training [8: 0.01]
    n_groups: int = 1  # deepseek: groups the experts are in [10: 8]
    top_groups: int = 1  # deepseek: groups a token may choose from [10: 4]
    bias_rate: float = 0.001  # deepseek: step of the balancing bias [10: 0.001]
    routed_scale: float = 1.0  # deepseek: factor on the routed experts [10: 2.5]
    sequence_weight: float = 0.0001  # deepseek: of the loss within a sequence [10: 0.0001]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name not in MAY_BE_ZERO)
            real = field.type in (float, float | None)
            fits = isinstance(value, field.type) or (type(value) is int and real)
            if not fits or (type(value) is bool and field.type is not bool):
                kind = getattr(field.type, "__name__", field.type)
                raise ValueError(f"{field.name}={value!r:.80} must be of the type {kind}")
            if type(value) is int and abs(value) >= 2**63:
                raise ValueError(f"{field.name} must be less than 2^63")
            if field.type is int and value < least:
                raise ValueError(f"{field.name}={value} must be at least {least}")
            if real and value is not None and not 0 <= value < 1e30:
                raise ValueError(f"{field.name}={value} must be a number from 0 on")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 0; try 10000")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout} must be below 1; try 0.1")
        if self.rope_factor < 1:
            raise ValueError(f"rope_factor={self.rope_factor} must be at least 1; 1 is off")
        if self.head_dim is None and self.dim % (2 * self.n_heads):
            step = 2 * self.n_heads  # each head of an even width, for RoPE turns pairs
            near = max(step, self.dim // step * step)
            raise ValueError(
                f"dim={self.dim} does not divide into n_heads={self.n_heads} heads of an even "
                f"width; try dim={near} or dim={near + step}"
            )
        if self.head_size < 2 or self.head_size % 2:
            fits = max(2, self.head_dim + self.head_dim % 2)
            raise ValueError(f"head_dim={self.head_dim} must be even (RoPE); try head_dim={fits}")
        if self.n_heads % self.n_kv_heads:
            fits = [g for g in range(1, self.n_heads + 1) if self.n_heads % g == 0]
            raise ValueError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}; "
                f"try n_kv_heads from {fits}"
            )
        if self.router not in ROUTERS:
            raise ValueError(f"router={self.router!r} is unknown; try one of {sorted(ROUTERS)}")
        if self.n_experts == 1:
            return
        if self.n_experts % self.n_groups or self.top_groups > self.n_groups:
            raise ValueError(
                f"n_groups={self.n_groups}, top_groups={self.top_groups} do not divide "
                f"n_experts={self.n_experts}; try n_groups=1 top_groups=1"
            )
        choosable = self.n_experts // self.n_groups * self.top_groups
        if self.n_active > choosable:
            raise ValueError(
                f"top_k={self.top_k} is more than the {choosable} experts to choose from "
                f"(n_experts={self.n_experts}, n_groups={self.n_groups}, top_groups="
                f"{self.top_groups}); try top_k={choosable}"
            )

    @property
    def head_size(self) -> int:
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def n_active(self) -> int:
        """Experts a token is sent to: top_k, but Switch is always top-1."""
        return 1 if self.router == "switch" else self.top_k


MAY_BE_ZERO = ("n_shared_experts", "n_dense_layers")

# --- 2. Attention: RMSNorm, RoPE, the cache, grouped-query attention ------------------------------


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, (..., rows of W).

    When a step of generation is compiled for a GPU (section 6, `Step`), the product with its one
    token is written out as products and a sum: the compiler then makes one kernel of it and its
    neighbours, which reads the weights at the memory's full speed.
    """
    if fusing(x) and x.numel() == x.shape[-1]:
        y = (weight.to(x.dtype) * x.reshape(-1)).sum(-1, dtype=torch.float32)
        return y.to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def fusing(x: Tensor) -> bool:
    """Whether x is in code being compiled for a GPU, where what is written out gets fused."""
    return torch.compiler.is_compiling() and x.is_cuda


class Linear(nn.Linear):
    """x W^T, without a bias, as everywhere in Llama."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 [2, eq. 4].

    LayerNorm without mean and bias. eps stands inside the root: outside, a row near zero explodes.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * scale * self.weight).to(x.dtype)


def rope_table(head_dim, length, theta: float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, K) each, of the angle by which a position turns a pair [3, eq. 15].

    Pair i turns by position * theta^(-2i/K): the first pairs spin fast and tell neighbours apart,
    the last ones slowly and tell paragraphs apart. Llama 3.1 reads beyond the 8,192 positions that
    Llama 3 knew: pairs that turned less than once in those turn `factor` times slower, those that
    turned more than 4 times as before, and between the two the speed changes linearly.
    """
    inverse_wavelength = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    if factor != 1:
        turns = 8192 * inverse_wavelength / (2 * math.pi)
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
        inverse_wavelength = inverse_wavelength * (kept + (1 - kept) / factor)
    angles = torch.outer(torch.arange(length).float(), inverse_wavelength).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """x with each pair (i, i + K/2) turned by its position's angle.

    After this, q_t . k_s depends on t - s alone: positions become relative for free. Pairs are the
    two halves of a head, as in Hugging Face's Llama. Meta's own files interleave them (2i, 2i + 1);
    mixing the two up gives a model that runs and talks nonsense.
    """
    left, right = x_BHTK.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (x_BHTK * cos_TK + turned * sin_TK).to(x_BHTK.dtype)


class Cache:
    """Keys and values of the positions seen so far: of each layer (B, G, S, K), of a fixed size.

    With it a new token costs one position of work instead of the whole text again. `position` is
    where the next token goes, on the device: a captured step reads it anew at every replay.
    """

    def __init__(self, config: Config, batch: int, length: int, device=None, dtype=torch.float32):
        shape = (batch, config.n_kv_heads, length, config.head_size)
        # Each layer's apart: a compiled step, told to write into a part of one big tensor, would
        # first copy all of it.
        self.k, self.v = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
            for _ in "kv"
        )
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.length = 0  # the same for Python; a captured step moves only position
        self.whole = False  # look at all S positions and mask, so that no shape ever changes

    def layer(self, i: int, positions_T: Tensor) -> "CacheLayer":
        end = self.k[i].shape[2] if self.whole else self.length + len(positions_T)
        return CacheLayer(self.k[i], self.v[i], positions_T, end)


class CacheLayer(NamedTuple):
    k_BGSK: Tensor
    v_BGSK: Tensor
    positions_T: Tensor  # of the new tokens
    end: int  # positions to look at

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values; returns all up to `end`, (B, G, S, K) each."""
        self.k_BGSK.index_copy_(2, self.positions_T, k_BGTK.detach().to(self.k_BGSK.dtype))
        self.v_BGSK.index_copy_(2, self.positions_T, v_BGTK.detach().to(self.v_BGSK.dtype))
        return self.k_BGSK[:, :, : self.end], self.v_BGSK[:, :, : self.end]


def attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_TS: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, (B, H, T, K); a query sees the keys that mask_TS allows.

    Without a mask the queries are the last T of S positions, and each sees those up to its own.
    Query head h reads key head h // (H/G) [4]. The scale is 1/sqrt(head_dim), not 1/sqrt(dim).
    """
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1:3]
    if fusing(q_BHTK) and q_BHTK.numel() == H * K:
        return attend_one(q_BHTK, k_BGSK, v_BGSK, mask_TS)
    if mask_TS is None and 1 < T and (T < S or not has_flash(q_BHTK)):
        mask_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTK.device).tril(S - T)
    if has_flash(q_BHTK):  # one query, or as many as keys, needs no mask tensor
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, mask_TS, is_causal=mask_TS is None and T > 1, enable_gqa=H != G
        )
    # The same in three lines: torch's fused kernel is 2-3 times slower than this in bf16 on a CPU.
    # The H/G query heads of a group become rows of one product, so k and v are never repeated.
    scores = (q_BHTK * K**-0.5).reshape(B, G, -1, K) @ k_BGSK.transpose(-2, -1)
    scores_BHTS = scores.view(B, H, T, S)
    if mask_TS is not None:
        scores_BHTS = scores_BHTS + torch.where(mask_TS, 0.0, -torch.inf).to(scores.dtype)
    return (scores_BHTS.softmax(-1).view(B, G, -1, S) @ v_BGSK).view(B, H, T, K)


def attend_one(q_BH1K: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_1S: Tensor) -> Tensor:
    """The same for one token, written as products and sums, which the compiler fuses."""
    B, H, _, K = q_BH1K.shape
    q_BGR1K = (q_BH1K.float() * K**-0.5).reshape(B, k_BGSK.shape[1], -1, 1, K)
    scores_BGRS = (q_BGR1K * k_BGSK[:, :, None]).sum(-1)
    probs_BGRS = scores_BGRS.masked_fill(~mask_1S, -torch.inf).softmax(-1)
    y_BGRK = (probs_BGRS[..., None] * v_BGSK[:, :, None]).sum(-2)
    return y_BGRK.view(B, H, 1, K).to(q_BH1K.dtype)


def has_flash(x: Tensor) -> bool:
    """Whether torch's fused attention is the faster one for these queries, (B, H, T, K).

    On a GPU not for single ones: it would plan anew for each number of keys, 0.1 s every time.
    """
    return x.shape[2] > 1 if x.is_cuda else x.dtype == torch.float32


class Attention(nn.Module):
    """Grouped-query attention [4]: H query heads share G key/value heads; the cache is G/H."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_size = c.head_size
        self.q_proj = Linear(c.dim, c.n_heads * c.head_size)
        self.k_proj = Linear(c.dim, c.n_kv_heads * c.head_size)
        self.v_proj = Linear(c.dim, c.n_kv_heads * c.head_size)
        self.o_proj = Linear(c.n_heads * c.head_size, c.dim)
        self.q_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x_BTD, cos_TK, sin_TK, mask_TS=None, cache: CacheLayer | None = None):
        B, T, _ = x_BTD.shape
        heads = (B, T, -1, self.head_size)
        q_BHTK = self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2)
        k_BGTK = self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2)
        v_BGTK = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        q_BHTK, k_BGTK = rotate(q_BHTK, cos_TK, sin_TK), rotate(k_BGTK, cos_TK, sin_TK)
        if cache is not None:
            k_BGTK, v_BGTK = cache.append(k_BGTK, v_BGTK)
        y_BHTK = attend(q_BHTK, k_BGTK, v_BGTK, mask_TS)
        return self.o_proj(y_BHTK.transpose(1, 2).reshape(B, T, -1))


# --- 3. Experts: one SwiGLU, and E of them in stacked parameters ----------------------------------


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where the last dimension holds gate first, then up [5, eq. 6]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """The dense feed-forward layer: down(silu(gate(x)) * up(x)) [5]."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up_proj = Linear(dim, 2 * hidden_dim)
        self.down_proj = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Experts(nn.Module):
    """E SwiGLUs in two stacked parameters, so that one grouped product can run them all."""

    def __init__(self, n_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))

    def forward(self, x_SD: Tensor, weight_S1: Tensor, ends_E: Tensor) -> Tensor:
        """weight * expert(x), rows sorted by expert: those of expert e end before row ends_E[e].

        Section 4 sorts them: there a row is a copy of a token for one of its experts.

        The weight is multiplied in before the down projection. That is linear, so the result is the
        same, but compiled the product joins the elementwise kernel of the SwiGLU and is no pass of
        its own over the output.
        """
        gate_up_proj, down_proj = self.gate_up_proj.to(x_SD.dtype), self.down_proj.to(x_SD.dtype)
        if has_grouped_mm(x_SD):
            h_SF = swiglu(F.grouped_mm(x_SD, gate_up_proj.transpose(-2, -1), offs=ends_E))
            return F.grouped_mm(h_SF * weight_S1, down_proj.transpose(-2, -1), offs=ends_E)
        counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
        rows = zip(x_SD.split(counts), weight_S1.split(counts), strict=True)
        # unbind, not [e]: its backward stacks E gradients, where [e] would add E full-size tensors
        each = zip(rows, gate_up_proj.unbind(), down_proj.unbind(), strict=True)
        return torch.cat([expert(*row, *weights) for row, *weights in each if len(row[0])])


def expert(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert's rows: weight * down(silu(gate(x)) * up(x))."""
    return F.linear(swiglu(F.linear(x, gate_up)) * weight, down)


def has_grouped_mm(x: Tensor) -> bool:
    """Whether F.grouped_mm has a kernel for x: bf16 on an NVIDIA card from Ampere on."""
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0)


# --- 4. Dispatch: bring each token to its experts and the results back ----------------------------
# With A experts a token there are N*A pairs (token, expert). Sorting the pairs by expert makes each
# expert's work one dense matrix product. Three index tensors describe the trip:
#   token_S   row s of the sorted buffer is a copy of token token_S[s]
#   slot_NA   the a-th copy of token n lies in row slot_NA[n, a]
#   ends_E    the rows of expert e end before row ends_E[e], where those of e + 1 begin
# `expand` goes out along the first, `combine` comes back along the second, and each is the other's
# transpose. autograd doesn't know that: its backward of a gather is a scatter-add, slow, and on a
# GPU in an order that changes from run to run. Told so, both directions only ever gather.


class Expand(torch.autograd.Function):
    """x_ND[token_S]: one row a (token, expert) pair."""

    @staticmethod
    def forward(ctx, x_ND, token_S, slot_NA):
        ctx.save_for_backward(slot_NA)
        return x_ND.index_select(0, token_S)

    @staticmethod
    def backward(ctx, grad_SD):
        return gather_sum(grad_SD, *ctx.saved_tensors), None, None


class Combine(torch.autograd.Function):
    """The sum over a of y_SD[slot_NA[:, a]]: each token's results, added."""

    @staticmethod
    def forward(ctx, y_SD, token_S, slot_NA):
        ctx.save_for_backward(token_S)
        return gather_sum(y_SD, slot_NA)

    @staticmethod
    def backward(ctx, grad_ND):
        return grad_ND.index_select(0, *ctx.saved_tensors), None, None


def gather_sum(y_SD: Tensor, slot_NA: Tensor) -> Tensor:
    """The sum over a of y_SD[slot_NA[:, a]].

    A gather for each copy, and their sum: one kernel when compiled. A single gather of all copies,
    summed along A, runs at a third of that speed: a kernel's reduction is made for longer axes.
    """
    first, *others = (y_SD.index_select(0, slot_N) for slot_N in slot_NA.unbind(1))
    return sum(others, first)


def dispatch(experts: Experts, x_ND: Tensor, experts_NA: Tensor, weights_NA: Tensor) -> Tensor:
    """sum_a weights[n, a] * expert[experts[n, a]](x[n]), (N, D).

    >>> experts_NA = torch.tensor([[2, 0], [0, 1], [2, 1]])  # three tokens, two experts each
    >>> order_S = experts_NA.flatten().argsort(stable=True)  # pairs, those of expert 0 first
    >>> (order_S // 2).tolist()                              # token_S: whose copy each row is
    [0, 1, 1, 2, 0, 2]
    >>> inverse(order_S).view(3, 2).tolist()                 # slot_NA: where each copy went
    [[4, 0], [1, 2], [5, 3]]
    """
    weights_NA = weights_NA.to(x_ND.dtype)
    if len(x_ND) == 1:
        return dispatch_one(experts, x_ND, experts_NA[0], weights_NA[0])
    A, n_experts = experts_NA.shape[1], len(experts.down_proj)
    flat_S = experts_NA.flatten()
    small = torch.uint8 if n_experts <= 256 else torch.int32  # a radix sort takes a pass a byte
    order_S = flat_S.to(small).argsort(stable=True)
    ends_E = count(flat_S, n_experts).cumsum(0, dtype=torch.int32)
    slot_NA, is_pair_S1 = inverse(order_S).view_as(experts_NA), None
    if x_ND.dtype == torch.bfloat16 and not x_ND.is_cuda:
        order_S, slot_NA, ends_E, is_pair_S1 = pad_groups(flat_S[order_S], order_S, slot_NA, ends_E)
    token_S = order_S.div(A, rounding_mode="floor")
    x_SD = Expand.apply(x_ND, token_S, slot_NA)
    # The weights make the same trip, as N*A tokens of one copy each.
    weight_S1 = Expand.apply(weights_NA.view(-1, 1), order_S, slot_NA.view(-1, 1))
    if is_pair_S1 is not None:
        weight_S1 = weight_S1 * is_pair_S1
    return Combine.apply(experts(x_SD, weight_S1, ends_E), token_S, slot_NA)


def dispatch_one(experts: Experts, x_1D: Tensor, experts_A: Tensor, weights_A: Tensor) -> Tensor:
    """The same for the one token of a step of generation: nothing to sort."""
    if not (x_1D.is_cuda or fusing(x_1D)):  # a test may put a CPU in its place
        rows = zip(experts_A.tolist(), weights_A, strict=True)
        return sum(expert(x_1D, w, experts.gate_up_proj[e], experts.down_proj[e]) for e, w in rows)
    # A GPU must not be asked which experts these are: Python would wait for it. Indexing on the GPU
    # copies their weights; compiled, no copy is made: each kernel reads them where they lie, 1.5
    # times as fast as grouped_mm, which is made for many rows.
    gate_up_AF = (experts.gate_up_proj[experts_A] * x_1D).sum(-1, dtype=torch.float32)
    h_AF = (swiglu(gate_up_AF) * weights_A[:, None]).to(x_1D.dtype)
    # The compiler fuses nothing across index_copy, so h is computed once and stored. Fused into the
    # product below, it would be computed anew for each of the D rows of down_proj.
    h_AF = torch.empty_like(h_AF).index_copy(0, torch.arange(len(h_AF), device=h_AF.device), h_AF)
    y_AD = (experts.down_proj[experts_A] * h_AF[:, None]).sum(-1, dtype=torch.float32)
    return y_AD.sum(0, keepdim=True).to(x_1D.dtype)


def count(ids_S: Tensor, n: int) -> Tensor:
    """How often each of 0..n-1 occurs; unlike bincount and unique it never waits for a GPU."""
    return (ids_S[:, None] == torch.arange(n, device=ids_S.device)).sum(0)


def inverse(order_S: Tensor) -> Tensor:
    """The permutation that undoes order_S: argsort, without sorting."""
    steps_S = torch.arange(len(order_S), device=order_S.device)
    return torch.empty_like(order_S).scatter_(0, order_S, steps_S)


def pad_groups(sorted_S, order_S, slot_NA, ends_E, multiple: int = 32):
    """The same trip with each expert's rows filled up to a multiple.

    In bf16 a CPU builds a kernel for each new number of rows; so there are few numbers, and each
    kernel is built once. The rows added are copies of token 0 that nothing reads, and weight 0
    keeps from gradients: up to 31 an expert, little beside the hundreds that a batch brings.
    """
    gaps_E = -ends_E.diff(prepend=ends_E.new_zeros(1)) % multiple
    before_E = gaps_E.cumsum(0) - gaps_E  # rows added ahead of each expert
    row_S = torch.arange(len(order_S)) + before_E[sorted_S]
    ends_E = ends_E + gaps_E.cumsum(0)
    padded_S = order_S.new_zeros(ends_E[-1]).index_copy(0, row_S, order_S)
    is_pair_S1 = torch.zeros(len(padded_S), 1, dtype=torch.bfloat16).index_fill(0, row_S, 1)
    return padded_S, row_S[slot_NA], ends_E, is_pair_S1


# --- 5. Routers: which experts a token goes to, and how much each counts --------------------------
# Choosing (experts_NA) and weighting (weights_NA) are separate decisions: choosing has no gradient,
# so a router learns from its weights and from its losses. Where weights are normalised over the
# chosen, as in all but Switch, A = 1 makes them a constant: the task then teaches it nothing.
# All in fp32: in bf16, rounding would decide near-ties, and a token could go to other experts alone
# than in a batch. Noise in training only, from torch's global generator.


class Routing(NamedTuple):
    experts_NA: Tensor  # chosen experts, distinct within a row
    weights_NA: Tensor  # what each counts in the output; 0 where it is dropped
    load_E: Tensor  # share of the choices that each expert got, before capacity
    loss: Tensor | float = 0.0  # weighted auxiliary losses, in training
    dropped: Tensor | float = 0.0  # share of choices lost to capacity


class Router(nn.Module):
    """What every router has: one row of weights an expert, and x's product with them."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.dim))

    def logits(self, x_BTD: Tensor, weight_ED: Tensor | None = None) -> Tensor:
        """(N, E) in fp32, whatever autocast says."""
        weight_ED = self.weight if weight_ED is None else weight_ED
        with torch.autocast(x_BTD.device.type, enabled=False):
            return product(x_BTD.flatten(0, -2).float(), weight_ED.float())

    def load(self, experts_NA: Tensor) -> Tensor:
        """What each expert got, (E,): in training of the whole batch, that of all GPUs."""
        load_E = load_share(experts_NA, self.config.n_experts)
        return global_mean(load_E) if self.training else load_E

    def update_bias(self, load_E: Tensor) -> None:
        """Called after each optimizer step; nothing to do where the loss keeps the balance."""


def choose(scores_NE: Tensor, k: int) -> Tensor:
    """The k experts with the highest scores, (N, k), best first. Choosing has no gradient.

    Compiled, it is k rounds of argmax and mask, which are one kernel; topk would sort each row.
    """
    scores_NE = scores_NE.detach()
    if not fusing(scores_NE):
        return scores_NE.topk(k).indices
    ids_E, chosen = torch.arange(scores_NE.shape[-1], device=scores_NE.device), []
    for _ in range(k):
        chosen.append(scores_NE.argmax(-1, keepdim=True))
        scores_NE = torch.where(ids_E == chosen[-1], -torch.inf, scores_NE)
    return torch.cat(chosen, -1)


def load_share(experts_NA: Tensor, n_experts: int) -> Tensor:
    """The share of all choices that each expert got, (E,); sums to 1, and has no gradient."""
    return count(experts_NA.flatten(), n_experts) / experts_NA.numel()


def global_mean(x: Tensor) -> Tensor:
    """The mean over the processes of a run on several GPUs; x itself in one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    from torch.distributed import _functional_collectives as collectives

    total = collectives.all_reduce(x, "sum", torch.distributed.group.WORLD)
    return collectives.wait_tensor(total) / torch.distributed.get_world_size()


def balance_loss(probs_NE: Tensor, load_E: Tensor) -> Tensor:
    """E * sum_e f_e P_e [8, eq. 4-6]: f the share of choices, P the mean probability of expert e.

    1 when both are uniform, E/A when A experts share everything. f counts and has no gradient; P
    has one, and is pushed down most where f is large. Over the whole batch of one layer: balance
    within each sequence is not asked for, and leaves experts free to specialise.

    >>> balance_loss(torch.full((2, 4), 0.25), load_share(torch.tensor([[0, 1], [2, 3]]), 4)).item()
    1.0
    >>> one = torch.tensor([1.0, 0, 0, 0])  # everything goes to one expert
    >>> balance_loss(one.repeat(2, 1), load_E=one).item()
    4.0
    """
    return len(load_E) * (load_E * probs_NE.mean(0)).sum()


def z_loss(logits_NE: Tensor) -> Tensor:
    """The mean of logsumexp(logits)^2 [9, eq. 5]: small logits round little."""
    return logits_NE.logsumexp(-1).square().mean()


def cv_squared(x_E: Tensor) -> Tensor:
    """Variance over mean^2 [7, eq. 7]: 0 when all are equal, E/k - 1 when k of E share everything.

    >>> cv_squared(torch.tensor([6.0, 0.0, 0.0])).item()
    2.0
    """
    return x_E.var(correction=0) / x_E.mean().square()


class TopK(Router):
    """Mixtral's router: weights = softmax(TopK(x W)) [6, section 2.1], balance loss, z-loss.

    At k = 1 that weight is always exactly 1: only the two losses move this router.
    """

    def forward(self, x_BTD: Tensor) -> Routing:
        c, logits_NE = self.config, self.logits(x_BTD)
        experts_NA = choose(logits_NE, c.top_k)
        load_E = self.load(experts_NA)
        weights_NA, loss = logits_NE.gather(1, experts_NA).softmax(-1), 0.0
        if self.training:
            loss = c.balance_weight * balance_loss(logits_NE.softmax(-1), load_E)
            loss = loss + c.z_weight * z_loss(logits_NE)
        return Routing(experts_NA, weights_NA, load_E, loss)


class Noisy(Router):
    """Noisy top-k gating [7, eq. 3-5]: softmax(TopK(x W + normal * softplus(x W_noise))).

    The noise lets a token try other experts; W_noise is learned and says how much. Two losses, each
    the squared coefficient of variation (CV) over the experts: of importance, their summed weights
    (eq. 6-7), and of load, the number of their tokens (appendix A, eq. 8-11): few tokens of large
    weight are as important as many of small weight. A count has no gradient, so load is the summed
    probability of being chosen if the noise were drawn again:
        P(x, i) = Phi((x W - kth_excluding_i) / softplus(x W_noise))
    with x W without noise, and the k-th largest noisy logit of the *other* experts.

    >>> H = torch.tensor([[3.0, 1.0, 2.0]])  # noisy logits, k = 2: what each has to beat
    >>> Noisy.to_beat(H, k=2).tolist()
    [[1.0, 2.0, 1.0]]
    """

    def __init__(self, c: Config):
        super().__init__(c)
        self.noise_weight = nn.Parameter(torch.zeros(c.n_experts, c.dim))  # [7, appendix A]

    @staticmethod
    def to_beat(noisy_NE: Tensor, k: int) -> Tensor:
        """The k-th largest of the other experts: the (k+1)-th of all for those that are in."""
        kth_N1, next_N1 = noisy_NE.topk(k + 1).values[:, -2:].split(1, dim=1)
        return torch.where(noisy_NE >= kth_N1, next_N1, kth_N1)

    def forward(self, x_BTD: Tensor) -> Routing:
        c, clean_NE = self.config, self.logits(x_BTD)
        noisy_NE = clean_NE
        if self.training:
            std_NE = F.softplus(self.logits(x_BTD, self.noise_weight))
            noisy_NE = clean_NE + torch.randn_like(clean_NE) * std_NE
        experts_NA = choose(noisy_NE, c.top_k)
        weights_NA = noisy_NE.gather(1, experts_NA).softmax(-1)
        load_E = self.load(experts_NA)
        if not self.training:
            return Routing(experts_NA, weights_NA, load_E)
        importance_E = torch.zeros_like(clean_NE).scatter(1, experts_NA, weights_NA).sum(0)
        loss = cv_squared(importance_E)
        if c.top_k < c.n_experts:  # else every expert is always chosen, and their load is equal
            chosen_NE = (clean_NE - self.to_beat(noisy_NE, c.top_k)) / std_NE.clamp(min=1e-20)
            loss = loss + cv_squared(torch.special.ndtr(chosen_NE).sum(0))
        return Routing(experts_NA, weights_NA, load_E, c.balance_weight * loss)


class Switch(Router):
    """Switch routing [8, section 2]: the one best expert, weighted with its raw probability.

    The raw probability is what lets the task teach the router: renormalised over one expert it
    would be 1 and have no gradient. An expert has capacity_factor * N / E places (eq. 3); a token
    that finds none passes by on the residual. [8] needs that limit because its experts compute a
    fixed number of rows; our dispatch takes any, and has it to show what it does. Places go in time
    order, all rows at t before any at t + 1: by score, or row by row, a later token could take an
    earlier one's place, and training would see the future that generation has not. So in training
    a token depends on earlier times in all rows and on lower rows at its own, and on nothing later.

    >>> experts_BT = torch.tensor([[0, 0, 1], [0, 1, 1]])  # two rows, three times
    >>> Switch.place(experts_BT, 2).tolist()               # 1: first in the queue of its expert
    [[1, 3, 2], [2, 1, 3]]
    """

    @staticmethod
    def place(experts_BT: Tensor, n_experts: int) -> Tensor:
        """Where each token stands in the queue of its expert, (B, T), from 1."""
        hot_TBE = F.one_hot(experts_BT.T, n_experts)
        queue_TBE = hot_TBE.flatten(0, 1).cumsum(0).view_as(hot_TBE)
        return (queue_TBE * hot_TBE).sum(-1).T

    def forward(self, x_BTD: Tensor) -> Routing:
        c, (B, T, _) = self.config, x_BTD.shape
        factor = c.capacity_factor if self.training else c.eval_capacity_factor
        if self.training and c.jitter:
            noise_BTD = torch.empty_like(x_BTD, dtype=torch.float32)
            x_BTD = x_BTD * noise_BTD.uniform_(1 - c.jitter, 1 + c.jitter)
        probs_NE = self.logits(x_BTD).softmax(-1)
        weights_N1, experts_N1 = probs_NE.max(-1, keepdim=True)
        dropped = 0.0
        if factor is not None:
            capacity = math.ceil(factor * B * T / c.n_experts)
            full_N1 = self.place(experts_N1.view(B, T), c.n_experts).reshape(-1, 1) > capacity
            weights_N1, dropped = weights_N1.masked_fill(full_N1, 0), full_N1.float().mean()
        load_E = self.load(experts_N1)
        loss = c.balance_weight * balance_loss(probs_NE, load_E) if self.training else 0.0
        return Routing(experts_N1, weights_N1, load_E, loss, dropped)


class DeepSeek(Router):
    """DeepSeek-V3's router [10, section 2.1.2]: balance through a bias, not through the loss.

    Scores are sigmoids (eq. 15). The bias chooses: TopK(score + bias) (eq. 16); the score weighs:
    score / sum of the chosen scores, times routed_scale (eq. 13, 12). So evening out the load
    never distorts the output. After each optimizer step the bias of an overloaded expert goes down
    by bias_rate, that of an underloaded one up (`update_bias`). A token may choose from top_groups
    groups only, those with the largest sum of their two best. Masked experts get -inf, not 0: a
    biased score can be negative. Within a sequence a tiny loss guards against extremes (eq. 17-20).

    >>> router = DeepSeek(Config(9, dim=4, n_experts=3, top_k=2))
    >>> router.update_bias(torch.tensor([0.6, 0.3, 0.1]))  # shares of the load; equal is 0.333
    >>> [round(b, 6) for b in router.bias.tolist()]        # -1, +1, +1 steps, less their mean
    [-0.001333, 0.000667, 0.000667]
    """

    def __init__(self, c: Config):
        super().__init__(c)
        self.register_buffer("bias", torch.zeros(c.n_experts))

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """load: what each expert got of the whole global batch, all micro-steps and ranks."""
        step_E = self.config.bias_rate * torch.sign(load_E.mean() - load_E)
        self.bias += step_E - step_E.mean()  # only differences count; the mean would drift

    def choose(self, biased_NE: Tensor) -> Tensor:
        c = self.config
        if c.top_groups < c.n_groups:
            groups_NGE = biased_NE.unflatten(1, (c.n_groups, -1))  # here G groups of E experts
            best_NG2 = groups_NGE.topk(min(2, groups_NGE.shape[-1])).values
            allowed_NA = best_NG2.sum(-1).topk(c.top_groups).indices
            masked_NG = torch.ones_like(best_NG2[..., 0], dtype=torch.bool)
            masked_NG = masked_NG.scatter(1, allowed_NA, False)
            biased_NE = groups_NGE.masked_fill(masked_NG[..., None], -torch.inf).flatten(1)
        return choose(biased_NE, c.top_k)

    def forward(self, x_BTD: Tensor) -> Routing:
        c, scores_NE = self.config, self.logits(x_BTD).sigmoid()
        experts_NA = self.choose(scores_NE.detach() + self.bias)
        load_E = self.load(experts_NA)
        scores_NA = scores_NE.gather(1, experts_NA)
        weights_NA = c.routed_scale * scores_NA / (scores_NA.sum(-1, keepdim=True) + 1e-20)
        if not self.training:
            return Routing(experts_NA, weights_NA, load_E)
        # Eq. 18 counts the experts of the highest scores, without the bias, not those chosen: the
        # bias evens out the load, this loss the scores.
        probs_BTE = (scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20)).view(
            *x_BTD.shape[:2], -1
        )
        hot_NE = torch.zeros_like(scores_NE).scatter(1, self.choose(scores_NE.detach()), 1.0)
        share_BE = hot_NE.view_as(probs_BTE).mean(1) / c.top_k
        loss = c.n_experts * (share_BE * probs_BTE.mean(1)).sum(-1).mean()
        return Routing(experts_NA, weights_NA, load_E, c.sequence_weight * loss)


ROUTERS = {"topk": TopK, "noisy": Noisy, "switch": Switch, "deepseek": DeepSeek}


class MoE(nn.Module):
    """The sparse feed-forward layer: route, dispatch, add; shared experts see every token."""

    def __init__(self, c: Config):
        super().__init__()
        self.router = ROUTERS[c.router](c)
        self.experts = Experts(c.n_experts, c.dim, c.hidden_dim)
        shared_dim = c.n_shared_experts * c.hidden_dim
        self.shared = SwiGLU(c.dim, shared_dim) if shared_dim else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        routing = self.router(x_BTD)
        x_ND = x_BTD.flatten(0, 1).to(compute_dtype(x_BTD))
        y_ND = dispatch(self.experts, x_ND, routing.experts_NA, routing.weights_NA)
        y_BTD = y_ND.view_as(x_BTD).to(x_ND.dtype)  # autocast makes a sum fp32
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD), routing


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products run in: autocast's when it is on, else x's own.

    nn.Linear asks by itself; the experts' products are ours, so we ask for them.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# --- 6. The model ---------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.dropout = c.dropout
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.attn = Attention(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        if c.n_experts == 1:
            self.ffn = SwiGLU(c.dim, c.hidden_dim)
        elif layer < c.n_dense_layers:
            self.ffn = SwiGLU(c.dim, c.hidden_dim * (c.n_active + c.n_shared_experts))
        else:
            self.ffn = MoE(c)

    def forward(self, x_BTD, cos_TK, sin_TK, mask_TS=None, cache: CacheLayer | None = None):
        y_BTD = self.attn(self.attn_norm(x_BTD), cos_TK, sin_TK, mask_TS, cache)
        x_BTD = x_BTD + F.dropout(y_BTD, self.dropout, self.training)
        y_BTD, routing = self.ffn(self.ffn_norm(x_BTD)), None
        if isinstance(self.ffn, MoE):
            y_BTD, routing = y_BTD
        return x_BTD + F.dropout(y_BTD, self.dropout, self.training), routing


class Output(NamedTuple):
    """What LaMoE.forward computed."""

    logits: Tensor  # (B, T, V), in the dtype of matrix products
    loss: Tensor | None  # cross-entropy [nats a token]; None without targets
    aux: Tensor  # the routers' weighted losses, summed over layers
    load: Tensor  # (MoE layers, E): share of choices an expert got before capacity; rows sum to 1
    dropped: Tensor  # share of choices lost to capacity
    experts: Tensor | None  # (MoE layers, B, T, A), if asked
    expert_weights: Tensor | None  # the same shape: what each counts, if asked


class LaMoE(nn.Module):
    """The decoder: embedding, blocks, norm, head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.head = Linear(c.dim, c.vocab_size)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        cos, sin = rope_table(c.head_size, c.seq_len, c.rope_theta, c.rope_factor)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal(0, 0.02), but what a block adds to the residual stream starts at zero.

        So each block starts as the identity, and a zero head starts the loss at exactly ln(V). An
        embedding that isn't tied to the head starts large, at 1: training pulls words of like
        contexts, all names say, towards one vector, and a large start leaves them far enough apart
        to copy the right one. A tied one can't: the first logits would be large, and wrong.
        """
        for name, weight in self.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "head", "noise")):
                nn.init.zeros_(weight)
            elif weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        nn.init.normal_(self.embed.weight, std=0.02 if self.config.tie_embeddings else 1.0)

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        cache: Cache | None = None,
        return_experts: bool = False,
    ) -> Output:
        """Logits for the token after each position; with targets, also the loss (-100: not scored).

        With a cache, ids are the T positions after those it holds.
        """
        c = self.config
        T, start = ids_BT.shape[1], cache.length if cache is not None else 0
        if start + T > c.seq_len:
            raise ValueError(
                f"{start + T} tokens do not fit the context of seq_len={c.seq_len}; "
                f"shorten the text, or train with --seq_len {start + T}"
            )
        if cache is not None and c.eval_capacity_factor is not None:
            raise ValueError(  # a step would see other competitors for a place than the whole text
                "eval_capacity_factor makes results depend on the batch, so it can't be used with "
                "a cache; set it to None"
            )
        cos_TK, sin_TK, mask_TS, layers = self.cos[:T], self.sin[:T], None, [None] * c.n_layers
        if cache is not None:
            positions_T = cache.position + torch.arange(T, device=ids_BT.device)
            layers = [cache.layer(i, positions_T) for i in range(c.n_layers)]
            cos_TK, sin_TK = self.cos[positions_T], self.sin[positions_T]
            if cache.whole:
                seen_S = torch.arange(layers[0].end, device=ids_BT.device)
                mask_TS = seen_S <= positions_T[:, None]
            cache.length += T
            cache.position += T
        x_BTD, routings = F.dropout(self.embed(ids_BT), c.dropout, self.training), []
        x_BTD = x_BTD.to(compute_dtype(x_BTD))
        for block, layer in zip(self.blocks, layers, strict=True):
            x_BTD, routing = block(x_BTD, cos_TK, sin_TK, mask_TS, layer)
            if routing is not None:
                routings.append(routing)
        logits_BTV, loss = self.predict(x_BTD, targets_BT)
        zero = torch.zeros((), device=ids_BT.device)
        loads = [r.load_E for r in routings]
        asked = routings if return_experts else []
        experts = [r.experts_NA.view(*ids_BT.shape, -1) for r in asked]
        weights = [r.weights_NA.view(*ids_BT.shape, -1) for r in asked]
        return Output(
            logits=logits_BTV,
            loss=loss,
            aux=sum((r.loss for r in routings), zero),
            load=torch.stack(loads) if loads else zero.new_zeros(0, c.n_experts),
            dropped=sum((r.dropped for r in routings), zero) / max(1, len(routings)),
            experts=torch.stack(experts) if experts else None,
            expert_weights=torch.stack(weights) if weights else None,
        )

    def predict(self, x_BTD: Tensor, targets_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits, and their cross-entropy in fp32 where targets are given."""
        logits_BTV = self.head(self.norm(x_BTD))
        if targets_BT is None:
            return logits_BTV, None
        flat_NV = logits_BTV.flatten(0, 1)  # compiled, no copy of it in fp32 is ever made
        loss = F.cross_entropy(flat_NV.float(), targets_BT.flatten())
        # Detached: nobody wants a gradient by way of these logits, but the compiled backward would
        # add one, of zeros, as large as they are.
        return logits_BTV.detach(), loss

    def compile(self) -> None:
        """Compiles the block, once for all layers since they share its code, and the loss.

        `forward` and not the module, so that what FSDP hooks around a block stays outside.
        """
        for block in self.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        self.predict = torch.compile(self.predict, fullgraph=True, dynamic=False)

    def update_bias(self, load_LE: Tensor) -> None:
        """After each optimizer step, with its load: some routers balance by a bias (DeepSeek)."""
        layers = (block.ffn for block in self.blocks if isinstance(block.ffn, MoE))
        for layer, load_E in zip(layers, load_LE, strict=True):
            layer.router.update_bias(load_E)

    @torch.inference_mode()
    def generate(
        self,
        ids_BT: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: int | None = None,
        generator: torch.Generator | None = None,
        graph: bool | None = None,
        compile: bool = False,
    ):
        """Yields ids_B, one new token for each row, as they come.

        Ends after max_new_tokens, when the context is full, or when every row has produced the stop
        token (a row that has goes on repeating it; on a GPU this is looked at every 16 tokens). All
        rows have the same length T. On a GPU, `graph` captures a step as a CUDA graph (None: where
        that pays) and `compile` compiles it before: some 20 s, then three times as fast. The same
        generator gives the same text either way, up to rounding.
        """
        if self.training:
            raise ValueError("generate needs the model in evaluation mode; call model.eval() first")
        T, n_new = ids_BT.shape[1], min(max_new_tokens, self.config.seq_len - ids_BT.shape[1])
        filters = (temperature, top_k, top_p, min_p)
        # A multiple of 256: kernels are compiled for a length, so let there be few.
        length = min(self.config.seq_len, -(-(T + max(0, n_new)) // 256) * 256)
        step = Step(self, len(ids_BT), length, filters, repetition_penalty, stop)
        if graph or graph is None and ids_BT.is_cuda and n_new >= 64 and can_capture(self, ids_BT):
            step.capture(compile)
        for n in range(n_new):
            if temperature:
                step.noise_BV.exponential_(generator=generator)
            if n == 0:  # prefill with the whole prompt, then one token at a time
                step(ids_BT)
            else:
                step.next()
            yield step.ids_B1[:, 0].clone()
            look = not ids_BT.is_cuda or n % 16 == 15  # looking waits for the GPU
            if stop is not None and look and step.done_B.all():
                return


class Step:
    """One step of generation, from the last token to the next, and the state it works on.

    All state stays in the same memory, so that a step can be captured once as a CUDA graph and
    replayed: the GPU then runs its hundreds of small kernels without waiting for Python.
    """

    def __init__(self, model: LaMoE, B: int, length: int, filters, repetition_penalty, stop):
        device, V = model.embed.weight.device, model.config.vocab_size
        self.model, self.filters, self.stop = model, filters, stop
        self.repetition_penalty = repetition_penalty
        self.cache = Cache(model.config, B, length, device, compute_dtype(model.embed.weight))
        self.ids_B1 = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.seen_BV = torch.zeros(B, V, dtype=torch.bool, device=device)
        self.done_B = torch.zeros(B, dtype=torch.bool, device=device)
        self.noise_BV = torch.ones(B, V, device=device)
        self.next = lambda: self(self.ids_B1)

    def __call__(self, ids_BT: Tensor) -> None:
        """Reads ids, leaves the next token of each row in ids_B1."""
        if self.repetition_penalty != 1:
            self.seen_BV.scatter_(1, ids_BT, True)
        self.ids_B1.copy_(self.pick(self.model(ids_BT, cache=self.cache).logits[:, -1]))

    def pick(self, logits_BV: Tensor) -> Tensor:
        """The next token of each row, (B, 1)."""
        logits_BV = penalize(logits_BV.float(), self.seen_BV, self.repetition_penalty)
        ids_B = sample(logits_BV, self.noise_BV, *self.filters)
        if self.stop is not None:
            ids_B = torch.where(self.done_B, self.stop, ids_B)
            self.done_B |= ids_B == self.stop
        return ids_B[:, None]

    def capture(self, compile: bool) -> None:
        """Makes `next` the replay of a CUDA graph. Before the first token: it writes rubbish."""
        self.cache.whole = True
        run = torch.compile(self.__call__, fullgraph=True, dynamic=False) if compile else self
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # outside the graph: kernels are chosen, memory is taken
            for _ in range(3):
                run(self.ids_B1)
                self.reset()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(self.ids_B1)
        self.reset()
        self.next = graph.replay

    def reset(self) -> None:
        self.cache.length = 0
        for state in (self.cache.position, self.ids_B1, self.seen_BV, self.done_B):
            state.zero_()


def can_capture(model: LaMoE, ids_BT: Tensor) -> bool:
    """Whether a step never asks the GPU for a number; one token goes by `dispatch_one`."""
    return len(ids_BT) == 1 or can_compile(model)


def can_compile(model: LaMoE) -> bool:
    """Whether its experts are grouped products, not the loop, which asks how many rows each has."""
    weight = model.embed.weight
    rows = torch.empty(0, device=weight.device, dtype=compute_dtype(weight))
    return model.config.n_experts == 1 or has_grouped_mm(rows)


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits of tokens already seen divided by the penalty, or multiplied where negative.

    1 changes nothing (Keskar et al. 2019, CTRL, arXiv:1909.05858, section 4.1).
    """
    if penalty == 1.0:
        return logits_BV
    lower_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, lower_BV, logits_BV)


def likely(logits_BV, temperature=1.0, top_k=None, top_p=None, min_p=None) -> Tensor:
    """softmax(logits / temperature), (B, V), with 0 for what the filters cut off.

    top_k keeps the k most likely; min_p those with at least min_p times the probability of the most
    likely; top_p the fewest that together reach top_p (the one that crosses it included, so never
    none).
    """
    logits_BV = logits_BV / temperature
    if top_k is not None:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if min_p is not None:
        least_B1 = logits_BV.amax(-1, keepdim=True) + math.log(max(min_p, 1e-30))
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
        probs_BV = sorted_BV.softmax(-1)
        before_BV = probs_BV.cumsum(-1) - probs_BV  # mass of the tokens ahead of each
        sorted_BV = sorted_BV.masked_fill(before_BV >= max(top_p, 1e-9), -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter(1, order_BV, sorted_BV)
    return logits_BV.softmax(-1)


def sample(logits_BV: Tensor, noise_BV: Tensor, temperature: float = 1.0, *filters) -> Tensor:
    """One id a row, (B,), drawn as `likely` says; at temperature 0 the most likely.

    The draw is argmax(probs / noise), with noise from Exponential(1): a clock of rate p_i rings at
    time noise_i / p_i, and of all clocks i is the first with probability p_i. No number has to
    leave the GPU for it.

    >>> sample(torch.tensor([[1.0, 3.0, 2.0]]), torch.ones(1, 3), temperature=0).tolist()
    [1]
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    return (likely(logits_BV, temperature, *filters) / noise_BV).argmax(-1)


# --- 7. Counting: what a model holds, and what a token costs --------------------------------------


def count_parameters(model: LaMoE) -> dict[str, tuple[int, int]]:
    """(total, active) parameters of each part: a token passes through `active` of them.

    An embedding is a look-up, no product, so none of it is active; a tied one is active as head.
    """
    c, parts = model.config, {}
    for name, weight in model.named_parameters():
        n = active = weight.numel()
        part = "norms"
        if weight is model.embed.weight:
            part, active = "embedding", n if c.tie_embeddings else 0
        elif "experts" in name:
            part, active = "experts", n * c.n_active // c.n_experts
        elif weight.dim() > 1:
            part = next(p for p in ("router", "attn", "ffn", "head") if p in name)
        total_active = parts.get(part, (0, 0))
        parts[part] = (total_active[0] + n, total_active[1] + active)
    parts["all"] = tuple(sum(column) for column in zip(*parts.values(), strict=True))
    return parts


def flops_per_token(model: LaMoE) -> int:
    """Floating-point operations to train on one token: 2 a weight forward, 4 backward.

    And for causal attention 12 * layers * H * K * T/2: scores and values, half of them masked.
    """
    c, parts = model.config, count_parameters(model)
    attention = 12 * c.n_layers * c.n_heads * c.head_size * c.seq_len // 2
    return 6 * (parts["all"][1] - parts["norms"][1]) + attention


# --- 8. Save and load -----------------------------------------------------------------------------


def save(path: str | os.PathLike, checkpoint: dict) -> None:
    """Write a dict of tensors and plain types so that `path` is always whole: the old or the new.

    A temporary file is written, flushed to the disk and renamed, and so is the folder entry: a
    crash or a full disk at any moment leaves the previous checkpoint in place.
    """
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            whole = Whole(file)
            torch.save(checkpoint, whole)
            whole.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    flush_folder(os.path.dirname(os.path.abspath(path)))


class Whole:
    """A file whose first error is raised as it is: torch.save would hide it behind its own.

    After it nothing more is written, as if that had gone well; `flush` raises it.
    """

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data) -> int:
        try:
            if not self.error:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        if self.error:
            raise self.error
        self.file.flush()


def flush_folder(folder: str | os.PathLike) -> None:
    """Flushes a folder's entries to the disk: until then a power cut may undo a rename in it."""
    if os.name == "posix":
        entries = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entries)
        finally:
            os.close(entries)


def first_line(error: Exception) -> str:
    """What a person is told of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read(path: str | os.PathLike) -> dict:
    """The dict that `save` wrote. weights_only: a checkpoint is data and can't run code."""
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_parts(checkpoint, os.path.getsize(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make one with: python train.py") from None
    except OSError as error:  # it may be whole: nobody can tell
        raise OSError(f"{path} can't be read: {error.strerror or error}") from None
    except Exception as error:  # zip, pickle and unpickling errors have no common class
        reason = first_line(error)[:120]
        raise ValueError(
            f"{path} is not a readable checkpoint ({reason}); use another, or train again"
        ) from None
    if not isinstance(checkpoint, dict) or not {"config", "model"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a LaMoE checkpoint; make one with: python train.py")
    return checkpoint


def check_archive(path: str | os.PathLike) -> None:
    """ValueError unless each record of a torch file is as it was written.

    The file is a zip with a CRC-32 of every record, which torch.load itself does not look at: one
    flipped bit would be a wrong weight. Compressed records, as torch never writes them, could
    unpack to any size.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("it is compressed")
        if sum(record.file_size for record in records) > os.path.getsize(path):
            raise ValueError("its records are larger than the file")
        if damaged := archive.testzip():
            raise ValueError(f"damaged: {damaged} differs from its checksum")


def check_parts(checkpoint, size: int) -> None:
    """ValueError unless a checkpoint is of tensors and plain types that a file of `size` can hold.

    A tensor may claim 10^12 elements by repeating one, and a list hold itself: what copies the one
    or walks through the other must not meet them. (Tied weights are stored once and held twice.)
    """
    waiting, n, claimed = [checkpoint], 1, 0
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor):
            claimed += part.nbytes
        elif isinstance(part, (dict, list, tuple)):
            n += len(part)
            waiting += part.values() if isinstance(part, dict) else part
        elif not isinstance(part, (str, bytes, int, float, NoneType)):
            raise ValueError(f"it holds a {type(part).__name__}")
        if claimed > 2 * size or n > size:
            raise ValueError("it claims to hold more than the file is large")


def pick_device(name: str) -> str:
    """`auto`: the best there is; any other name: itself, if it is there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [device for device, is_there in there.items() if is_there] + ["cpu"]
    if name != "auto" and name not in available:
        raise ValueError(f"device {name!r} is not available here; try --device {available[0]}")
    return available[0] if name == "auto" else name


def build(checkpoint: dict, path: str | os.PathLike):
    """(model, tokenizer or None) from what `read` returned; path is for the messages."""
    import bpe

    try:
        config = Config(**checkpoint["config"])
        check_shapes(config, checkpoint["model"])
        model = LaMoE(config)
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit this version of LaMoE: {reason}") from None
    state = checkpoint.get("tokenizer")
    try:
        tokenizer = None if state is None else bpe.Tokenizer.from_state(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its tokenizer is unusable: {reason}; train again") from None
    if tokenizer and tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, "
            f"its model {model.config.vocab_size}; they are not from one training run"
        )
    check_finite(model, path)
    return model, tokenizer


def check_shapes(c: Config, weights: dict) -> None:
    """Refuses weights that are not the config's, before memory is reserved for what it promises."""
    if c.n_layers > len(weights):
        raise ValueError(f"n_layers={c.n_layers} layers are not in its {len(weights)} tensors")
    with torch.device("meta"):  # shapes without memory
        LaMoE(c).load_state_dict(weights, assign=True)
    if c.seq_len * c.head_size > 1 << 26:  # the one size that no weight vouches for: RoPE's tables
        raise ValueError(f"seq_len={c.seq_len} is more than a checkpoint may ask for")


def check_finite(model: LaMoE, path: str | os.PathLike) -> None:
    """Refuses weights with infinities or NaNs. A sum has them too, and takes no memory."""
    for name, weight in model.state_dict().items():
        if not weight.sum().isfinite():
            raise ValueError(
                f"{path}: {name} holds numbers that are not finite, so it can only write nonsense; "
                f"use an earlier checkpoint, or train again with a lower --lr"
            )


def load(path: str | os.PathLike, device: str = "cpu", dtype: torch.dtype | None = None):
    """(model in evaluation mode, tokenizer or None) from a checkpoint or a Hugging Face folder.

    dtype: of the weights, torch.float32 or torch.bfloat16; None: as stored. A router stored in fp32
    stays so, for it computes in fp32 anyway.
    """
    if os.path.isdir(path):
        model, tokenizer = load_hf(path, device, dtype)
        check_finite(model, path)
        return model, tokenizer
    model, tokenizer = build(read(path), path)
    for name, weight in model.named_parameters():
        if dtype is not None and "router" not in name:
            weight.data = weight.data.to(dtype)
    return model.to(device).eval(), tokenizer


# --- 9. Interchange: Hugging Face folders, both ways ----------------------------------------------
# A folder holds config.json, a tokenizer, and the weights as safetensors. Four of its families
# compute exactly what this file computes; only names and the cutting of the experts differ. What
# none of them can say is refused, in both directions: a model that is read wrongly still talks.

KEYS = {  # our field -> theirs
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
MIXTRAL = {**KEYS, "n_experts": "num_local_experts", "top_k": "num_experts_per_tok"}
QWEN3_MOE = {**MIXTRAL, "n_experts": "num_experts", "hidden_dim": "moe_intermediate_size"}


class Family(NamedTuple):
    """A class of transformers, what it calls things, and what a config.json without a key means."""

    architecture: str
    keys: dict[str, str]
    absent: dict
    ffn: str = "mlp"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


NO_WINDOW = {"use_sliding_window": False}
FAMILIES = {  # model_type -> family; mistral is a llama with other defaults, and only read
    "llama": Family("LlamaForCausalLM", KEYS, {"num_key_value_heads": None}),
    "mistral": Family("LlamaForCausalLM", KEYS, {"sliding_window": 4096}),
    "qwen3": Family("Qwen3ForCausalLM", KEYS, {**NO_WINDOW, "head_dim": 128}),
    "mixtral": Family("MixtralForCausalLM", MIXTRAL, {}, "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", QWEN3_MOE, {**NO_WINDOW, "norm_topk_prob": False}),
}
LLAMA3_ROPE = {  # rope_table's constants in their words; the factor varies
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LARGEST = 1 << 20  # of the sizes in a config.json: more is no model, and would only fill the memory


def family_of(c: Config) -> str:
    """The model_type that computes what this config does; ValueError with the reason if none."""
    model_type = "mixtral" if c.n_experts > 1 else "llama"
    if c.qk_norm:
        model_type = "qwen3_moe" if c.n_experts > 1 else "qwen3"
    reason = None
    if model_type == "llama" and c.dim % c.n_heads:  # transformers 5 insists
        reason = f"a Llama's dim={c.dim} is a multiple of n_heads={c.n_heads}; train with --qk_norm"
    elif c.n_experts > 1 and c.router != "topk":
        reason = f"no family routes like router={c.router!r}; train with --router topk"
    elif c.n_experts > 1 and c.n_shared_experts:
        reason = "Mixtral has no shared experts; train with --n_shared_experts 0"
    elif model_type == "mixtral" and c.n_dense_layers:
        reason = "Mixtral has no dense layers; train with --n_dense_layers 0, or --qk_norm"
    if reason:
        raise ValueError(f"no Hugging Face folder can hold this model: {reason}")
    return model_type


def to_hf_config(c: Config) -> dict:
    """The part of config.json that says what is computed, for transformers 4 and 5."""
    model_type, values = family_of(c), {**dataclasses.asdict(c), "head_dim": c.head_size}
    rope = {"rope_type": "default"}
    if c.rope_factor != 1:
        rope = {**LLAMA3_ROPE, "factor": c.rope_factor}
    theirs = {
        "model_type": model_type,
        **{key: values[field] for field, key in FAMILIES[model_type].keys.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": None,
        "rope_theta": c.rope_theta,  # transformers 4, and the next
        "rope_scaling": rope if c.rope_factor != 1 else None,
        "rope_parameters": {**rope, "rope_theta": c.rope_theta},  # transformers 5
    }
    if model_type == "qwen3_moe":
        dense = list(range(min(c.n_dense_layers, c.n_layers)))
        theirs |= {"mlp_only_layers": dense, "intermediate_size": c.hidden_dim * c.top_k}
        theirs |= {"norm_topk_prob": True, "decoder_sparse_step": 1}
        theirs["num_local_experts"] = c.n_experts  # transformers 5; 4 says num_experts
    return theirs


def from_hf_config(theirs: dict) -> Config:
    """The Config of a config.json of transformers 4 or 5; ValueError names what it can't say."""
    model_type = theirs.get("model_type")
    if model_type not in [*FAMILIES]:
        raise ValueError(f"model_type {model_type!r:.40} is none of {[*FAMILIES]}")
    family = FAMILIES[model_type]
    theirs = {"head_dim": None, "tie_word_embeddings": False, **family.absent, **theirs}
    theirs["model_type"] = "llama" if model_type == "mistral" else model_type
    if theirs.get("num_key_value_heads", 0) is None:  # Llama 1
        theirs["num_key_value_heads"] = theirs["num_attention_heads"]
    if model_type == "qwen3_moe" and "num_experts" not in theirs:  # transformers 5
        theirs["num_experts"] = theirs["num_local_experts"]
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    theta = theirs.get("rope_theta", 1e6 if model_type == "mixtral" else 1e4)
    values = {"n_experts": 1, "top_k": 1}
    values |= {field: theirs[key] for field, key in family.keys.items()}
    values["n_dense_layers"] = len(theirs.get("mlp_only_layers") or [])
    values["qk_norm"] = model_type.startswith("qwen3")
    values["rope_theta"] = rope.get("rope_theta", theta)
    values["rope_factor"] = rope.get("factor", 1.0) if rope.get("rope_type") == "llama3" else 1.0
    for field in (field for field in dataclasses.fields(Config) if field.name in values):
        value, key = values[field.name], family.keys.get(field.name, field.name)
        kinds = {int: [int], float: [float, int], bool: [bool]}.get(field.type, [int, type(None)])
        if type(value) not in kinds or (field.type is not float and (value or 0) > LARGEST):
            raise ValueError(f"{key}={value!r:.60} is no usable {kinds[0].__name__}")
    c = Config(**values)
    refuse_others(theirs, c)
    return c


def refuse_others(theirs: dict, c: Config) -> None:
    """ValueError names the first thing that c, written as a config.json, says otherwise."""
    window = theirs.get("sliding_window") if theirs.get("use_sliding_window", True) else None
    if window is not None and window < c.seq_len:
        raise ValueError(
            f"sliding_window={window} is shorter than the context of {c.seq_len}, and only full "
            f"attention is supported; set max_position_embeddings to {window} to use less"
        )
    theirs = {**theirs, "sliding_window": None}
    if not c.n_dense_layers:  # qwen3_moe: the width of layers that aren't there
        theirs["intermediate_size"] = None
    ours = {**to_hf_config(c), "mlp_bias": False, "quantization_config": None}
    ours |= {"partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * c.n_layers}
    for key, value in ours.items():
        if theirs.get(key) not in (None, value):
            raise ValueError(f"{key}={theirs[key]!r:.160} is not supported, only {value!r:.160}")


def hf_tensors(model: LaMoE) -> dict[str, Tensor]:
    """Their name -> our tensor, or the view of it that they keep apart: to write, or to read into.

    The first half of gate_up_proj's rows is their gate, the second their up; expert e is row e.
    """
    family = FAMILIES[family_of(model.config)]
    tensors = {"model.embed_tokens": model.embed.weight, "model.norm": model.norm.weight}
    if not model.config.tie_embeddings:
        tensors["lm_head"] = model.head.weight
    for i, block in enumerate(model.blocks):
        at, ffn = f"model.layers.{i}", block.ffn
        tensors[f"{at}.input_layernorm"] = block.attn_norm.weight
        tensors[f"{at}.post_attention_layernorm"] = block.ffn_norm.weight
        for name, weight in block.attn.named_parameters():  # q_proj.weight, ...
            tensors[f"{at}.self_attn.{name.removesuffix('.weight')}"] = weight
        if isinstance(ffn, SwiGLU):
            parts = {f"{at}.{family.ffn}": (ffn.gate_up_proj.weight, ffn.down_proj.weight)}
        else:
            tensors[f"{at}.{family.ffn}.gate"] = ffn.router.weight
            experts = zip(ffn.experts.gate_up_proj, ffn.experts.down_proj, strict=True)
            parts = {f"{at}.{family.ffn}.experts.{e}": both for e, both in enumerate(experts)}
        for name, (gate_up, down) in parts.items():
            three = zip(family.gate_up_down, (*gate_up.chunk(2), down), strict=True)
            tensors |= {f"{name}.{part}": tensor for part, tensor in three}
    return {f"{name}.weight": tensor.detach() for name, tensor in tensors.items()}


def import_safetensors():
    try:
        import safetensors.torch

        safetensors.TensorSpec  # noqa: B018  what 0.8 brought, together with the backend "pread"
    except (ImportError, AttributeError):
        raise ValueError('Hugging Face folders need: pip install "safetensors>=0.8"') from None
    return safetensors


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content


def open_tensors(folder: Path) -> dict:
    """{name of a tensor: the open file that holds it}, from one file or the shards of an index."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).exists() and index.exists():
        names = sorted({Path(name).name for name in read_json(index)["weight_map"].values()})
    elif not (folder / names[0]).exists() and [*folder.glob("pytorch_model*.bin")]:
        raise ValueError(
            'its weights are in pytorch_model.bin; convert them: python -c "from transformers '
            f"import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    safe_open = import_safetensors().safe_open
    # pread: by default files are mapped, and would be in memory beside the weights
    files = [safe_open(folder / name, "pt", backend="pread") for name in names]
    return {name: file for file in files for name in file.keys()}


def check_tensors(expected: dict[str, Tensor], files: dict, tied: bool) -> None:
    """ValueError names tensors that are missing, not known, or of another shape than config's."""
    known = {name for name in files if name.endswith("rotary_emb.inv_freq")}  # of old files
    known |= {"lm_head.weight"} if tied else set()  # a copy of the embedding
    missing, more = expected.keys() - files.keys(), files.keys() - expected.keys() - known
    for word, names in (("lacks", missing), ("has unexpected", more)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"it {word} {len(names)} tensors: {some}{', ...' * (len(names) > 3)}")
    for name, tensor in expected.items():
        stored = files[name].get_slice(name)
        if stored.get_shape() != [*tensor.shape]:
            raise ValueError(f"{name} is {stored.get_shape()}, by its config {[*tensor.shape]}")
        if stored.get_dtype() not in ("F32", "BF16", "F16"):
            raise ValueError(f"{name} is in {stored.get_dtype()}; only F32, BF16, F16 are read")


class NoInit(torch.overrides.TorchFunctionMode):
    """Inside, weights get no first values: those about to be read would only lose time on them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return args[0] if function is Tensor.zero_ else function(*args, **(kwargs or {}))


def reserve(c: Config, files: dict, device: str, dtype: torch.dtype | None) -> LaMoE:
    """A model for the tensors in these files, which are not read yet; dtype as for `load`."""
    if c.n_layers * c.n_experts > len(files):
        raise ValueError(f"{c.n_layers} layers of {c.n_experts} experts are not in its files")
    stored = {name: file.get_slice(name).get_dtype() for name, file in files.items()}
    is_bf16 = stored["model.embed_tokens.weight"] == "BF16"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or (torch.bfloat16 if is_bf16 else torch.float32))
    try:
        with torch.device(device), NoInit():
            model = LaMoE(c).eval()
    finally:
        torch.set_default_dtype(before)
    for i, block in enumerate(model.blocks):  # a router computes in fp32: if stored so, it stays so
        if stored.get(f"model.layers.{i}.{FAMILIES[family_of(c)].ffn}.gate.weight") == "F32":
            block.ffn.router.float()
    check_tensors(hf_tensors(model), files, c.tie_embeddings)
    return model


def load_hf(folder: str | os.PathLike, device: str, dtype: torch.dtype | None):
    """`load` for a Hugging Face folder. One tensor at a time is in memory besides the model."""
    import bpe

    folder = Path(folder)
    if not (folder / "config.json").exists():
        reason = "not a readable checkpoint, nor a Hugging Face folder: it has no config.json"
        remedy = f"name a .pt file, such as {folder}/best.pt"
        if (folder / "params.json").exists():
            reason, script = "in Meta's own layout", "models.llama.convert_llama_weights_to_hf"
            remedy = f"convert it (transformers 4): python -m transformers.{script}"
            remedy += f" --input_dir {folder} --output_dir NEW_FOLDER"
        raise ValueError(f"{folder} is {reason}; {remedy}")
    try:
        theirs, files = read_json(folder / "config.json"), open_tensors(folder)
        c = from_hf_config(theirs)
        model = reserve(c, files, device, dtype)
        for name, weight in hf_tensors(model).items():
            weight.copy_(files[name].get_tensor(name))
    except KeyError as error:
        raise ValueError(f"{folder} can't be read: it lacks {error}") from error
    except Exception as error:  # those of safetensors and torch have no common class
        reason = " ".join(f"{error}".split())[:300]
        raise ValueError(f"{folder} can't be read: {reason}") from error
    ends = theirs.get("eos_token_id")
    ends = ends[0] if isinstance(ends, list) and ends else ends
    return model, bpe.load_hf(folder, c.vocab_size, ends)


def save_hf(model: LaMoE, tokenizer, folder: str | os.PathLike, shard_bytes: int = 5 * 10**9):
    """Writes a folder that transformers opens: config, weights, and the tokenizer if not None.

    The folder is new or empty, and appears whole: it is written under another name first.
    """
    c, folder = model.config, Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; name a new folder")
    if tokenizer and tokenizer.vocab_size != c.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} ids and the model {c.vocab_size}"
        raise ValueError(f"{sizes}; export them as they were trained")
    safetensors, dtype = import_safetensors(), model.embed.weight.dtype
    config = {"architectures": [FAMILIES[family_of(c)].architecture], **to_hf_config(c)}
    for key in ("torch_dtype", "dtype"):  # transformers 4 and 5
        config[key] = str(dtype).removeprefix("torch.")
    if tokenizer:
        config["eos_token_id"] = tokenizer.eot
        config["bos_token_id"] = tokenizer.start[0] if tokenizer.start else None
    ends = {key: id_ for key, id_ in config.items() if key in ("bos_token_id", "eos_token_id")}
    texts = {"config.json": config, "generation_config.json": ends}
    shards = shard(hf_tensors(model), shard_bytes)
    if len(shards) > 1:
        size = sum(tensor.nbytes for part in shards.values() for tensor in part.values())
        weight_map = {name: file for file, part in shards.items() for name in part}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        texts["model.safetensors.index.json"] = index
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in texts.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, part in shards.items():
            safetensors.torch.save_file(part, temporary / name, {"format": "pt"})
        if tokenizer:
            tokenizer.save_hf(temporary)
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        flush_folder(temporary)
        if folder.exists():
            folder.rmdir()
        os.rename(temporary, folder)
        flush_folder(folder.absolute().parent)
    except safetensors.SafetensorError as error:  # its words for a full disk
        raise OSError(f"{folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def shard(tensors: dict[str, Tensor], limit: int) -> dict[str, dict[str, Tensor]]:
    """{file name: its tensors}, in order, each file at most `limit` bytes (or one tensor)."""
    parts, size = [{}], 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > limit:
            parts, size = [*parts, {}], 0
        parts[-1][name], size = tensor, size + tensor.nbytes
    if len(parts) == 1:
        return {"model.safetensors": tensors}
    n = len(parts)
    return {f"model-{i:05}-of-{n:05}.safetensors": part for i, part in enumerate(parts, 1)}


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line, whatever the arguments hold; the other programs use it too."""

    def error(self, message: str, after: str = ""):
        message = " ".join(message.split())
        self.exit(2, f"error: {message}; see python {self.prog} --help{after}\n")


def main() -> None:
    parser = OneLineParser("lamoe.py", description="Write a model as a Hugging Face folder.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="such as runs/stories/best.pt")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder")
    args = parser.parse_args()
    try:
        model, tokenizer = load(args.checkpoint)
        save_hf(model, tokenizer, args.folder)
    except (ValueError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    architecture = FAMILIES[family_of(model.config)].architecture
    print(f"{args.folder}: a {architecture}; transformers opens it, and so does sample.py --model")


if __name__ == "__main__":
    main()
