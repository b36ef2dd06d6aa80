"""LaMoE: a Llama-2-style decoder whose feed-forward layers are sparse mixtures of experts.

A dense transformer sends every token through every weight. A sparse mixture of experts (MoE) keeps
many feed-forward networks in each layer, and a small router picks a few of them for each token: the
model grows, the work per token does not. With `n_experts=1` this file is a dense Llama.

References: [1] Llama 2, arXiv:2307.09288 [2] RMSNorm, 1910.07467 [3] Rotary positions, 2104.09864
[4] Grouped-query attention, 2305.13245 [5] SwiGLU, 2002.05202 [6] Mixtral, 2401.04088 [7] Noisy
top-k gating, Shazeer et al., 1701.06538 [8] Switch Transformer, 2101.03961 [9] ST-MoE, 2202.08906
[10] DeepSeek-V3, 2412.19437 [11] Query-key norm, 2010.04245 [12] Llama 3, 2407.21783

The name of a tensor ends in its shape, one letter per dimension:
  B batch   T time (new positions)   S positions seen   N = B*T tokens   D dim   V vocabulary
  H query heads   G key/value heads   R = H/G   K head dim   E experts   F hidden dim of an expert
  A experts per token (top_k)   P = N*A (token, expert) pairs   L layers with experts
  M groups of experts (deepseek)   1, 2, 3 that many
"""

import contextlib
import dataclasses
import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

# --- 1. Config: the architecture, and nothing else ------------------------------------------------

ROUTERS: dict[str, type] = {}  # name -> class; section 5 fills it


@dataclasses.dataclass(frozen=True)
class Config:
    """One line per field. A check that fails raises ValueError with the cause and a remedy."""

    vocab_size: int  # distinct token ids, special token included
    dim: int = 128  # width of the residual stream
    n_layers: int = 4  # blocks
    n_heads: int = 2  # query heads
    n_kv_heads: int = 2  # key/value heads; n_heads / n_kv_heads query heads share one
    head_dim: int | None = None  # width of a head; None: dim / n_heads
    hidden_dim: int = 256  # hidden width of ONE expert
    n_experts: int = 4  # experts per layer; 1 is a dense Llama, without a router
    top_k: int = 2  # experts that each token is sent to
    router: str = "topk"  # how tokens choose their experts
    n_shared_experts: int = 0  # further experts that every token passes through (DeepSeek-V3: 1)
    n_dense_layers: int = 0  # first layers, dense, of the same active width (DeepSeek-V3: 3)
    seq_len: int = 256  # context [tokens]
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rope_factor: float = 1.0  # stretch of the long wavelengths (Llama 3.1: 8, Llama 3.2: 32)
    norm_eps: float = 1e-5  # inside RMSNorm's root
    qk_norm: bool = False  # RMSNorm on each query and key head, before RoPE
    tie_embeddings: bool = False  # the output head is the embedding, transposed
    dropout: float = 0.0  # share of embeddings and layer outputs set to zero, in training
    balance_weight: float = 0.01  # topk, noisy, switch: weight of the balance loss (Switch: 0.01)
    z_weight: float = 0.001  # topk: weight of the router z-loss (ST-MoE: 0.001)
    capacity_factor: float = 1.25  # switch: capacity over an equal share, in training (1 to 1.25)
    eval_capacity_factor: float | None = None  # switch: the same in evaluation; None: no limit
    jitter: float = 0.01  # switch: noise on the router's input, in training (Switch: 0.01)
    n_groups: int = 1  # deepseek: groups the experts are in (DeepSeek-V3: 8)
    top_groups: int = 1  # deepseek: groups a token may choose from (DeepSeek-V3: 4)
    bias_rate: float = 0.001  # deepseek: step of the balancing bias (DeepSeek-V3: 0.001)
    routed_scale: float = 1.0  # deepseek: factor on the routed experts (DeepSeek-V3: 2.5)
    sequence_weight: float = 0.0001  # deepseek: weight of the balance loss within a sequence

    @property
    def head_size(self) -> int:  # head_dim, or what None stands for
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def n_active(self) -> int:  # experts that a token is sent to: the router knows
        return ROUTERS[self.router].n_active(self)

    def __post_init__(self):
        for field in dataclasses.fields(Config):  # not those of a subclass
            self.check_field(field.name, field.type, getattr(self, field.name))
        heads, experts, pair = self.n_heads, self.n_experts, 2 * self.n_heads
        near = max(pair, self.dim // pair * pair)  # RoPE turns pairs: a head has an even width
        even = max(2, self.head_size + self.head_size % 2)
        shared = [g for g in range(1, min(heads, 999) + 1) if heads % g == 0]

        def check(is_right, message: str) -> None:
            if not is_right:
                raise ValueError(message)

        check(self.rope_theta > 0, f"rope_theta={self.rope_theta} must be above 0; try 10000")
        check(self.rope_factor >= 1, f"rope_factor={self.rope_factor} must be at least 1 (off)")
        check(self.dropout < 1, f"dropout={self.dropout} must be below 1; try 0.1")
        check(self.router in ROUTERS, f"router={self.router!r} is unknown; try one of {[*ROUTERS]}")
        wrong = f"dim={self.dim} does not divide into n_heads={heads} heads of an even width"
        is_even = self.head_dim or self.dim % pair == 0
        check(is_even, f"{wrong}; try dim={near} or dim={near + pair}")
        check(self.head_size == even, f"head_dim={self.head_dim} must be even; try head_dim={even}")
        wrong = f"n_heads={heads} is not divisible by n_kv_heads={self.n_kv_heads}"
        check(heads % self.n_kv_heads == 0, f"{wrong}; try n_kv_heads from {shared}")
        if experts > 1:
            wrong = f"n_groups={self.n_groups}, top_groups={self.top_groups} do not divide"
            is_whole = experts % self.n_groups == 0 and self.top_groups <= self.n_groups
            check(is_whole, f"{wrong} n_experts={experts}; try n_groups=1 top_groups=1")
            choosable = experts // self.n_groups * self.top_groups
            wrong = f"top_k={self.top_k} is more than {choosable}, of n_experts={experts}"
            check(self.n_active <= choosable, f"{wrong}; try top_k={choosable}")

    @staticmethod
    def check_field(name: str, kind: type, value) -> None:
        is_real = kind in (float, float | None)
        fits = isinstance(value, kind) or (is_real and type(value) is int)
        if not fits or (type(value) is bool and kind is not bool):
            raise ValueError(f"{name}={value!r:.80} must be {getattr(kind, '__name__', kind)}")
        least = int(kind is int and name not in ("n_shared_experts", "n_dense_layers"))  # 0 or 1
        limit = 2**63 if type(value) is int else 1e30  # torch converts no larger ones
        if kind in (int, float, float | None) and not least <= (value or 0) < limit:
            raise ValueError(f"{name}={value!r:.40} must be at least {least} and below {limit:.0e}")


# --- 2. Attention: RMSNorm, RoPE, the cache, grouped-query attention ------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight [2, eq. 4], in fp32: bf16 would blur a sum of squares.
    It keeps each layer's input at one size. LayerNorm also removes the mean and adds a bias; [2]
    trains as well without, so the division is what helps. eps in the root: rows near 0 stay small.
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
    Pair i turns by position * theta^(-2i/K): the first pairs are fast and tell neighbours apart,
    the last are slow and tell paragraphs apart. Llama 3.1 slows by `factor` those of less than one
    turn in 8,192 positions, and those of up to 4 turns gradually less (its code; see [12]).
    """
    speed = theta ** (-torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    if factor != 1:
        turns = 8192 * speed / (2 * math.pi)
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
        speed = speed * (kept + (1 - kept) / factor)
    angles = torch.outer(torch.arange(length, device="cpu").float(), speed).repeat(1, 2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x, (..., K), with each pair (i, i + K/2) turned by the angle of its position.
    Why this makes positions relative: read pairs as complex numbers. Turning by an angle a*t is a
    product with e^(iat), and a score is Re[q e^(iat) conj(k e^(ias))] = Re[q conj(k) e^(ia(t-s))]:
    for a query at t and a key at s only t - s counts. Pairs are the halves of a head, as in Hugging
    Face's Llama; Meta's own files pair neighbours, and read so, a model writes nonsense.
    """
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class Cache:
    """Keys and values of positions seen, (B, G, S, K) per layer: a new token costs one position."""

    def __init__(self, c: Config, batch: int, length: int, device=None, dtype=torch.float32):
        if c.eval_capacity_factor is not None:  # a step would see other competitors for capacity
            raise ValueError("eval_capacity_factor can't be used with a cache; set it to None")
        shape = (batch, c.n_kv_heads, length, c.head_size)
        zeros = partial(torch.zeros, shape, device=device, dtype=dtype)
        # Not one big tensor: a compiled step that writes into a part of it would first copy it all.
        self.layers = [(zeros(), zeros()) for _ in range(c.n_layers)]
        self.length = 0

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's new keys and values; returns all of its up to them."""
        end = self.length + k_BGTK.shape[2]
        for kept, new in zip(self.layers[layer], (k_BGTK, v_BGTK), strict=True):
            kept[:, :, self.length : end] = new.detach()
        return tuple(kept[:, :, :end] for kept in self.layers[layer])


def plain_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_TS=None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, (B, H, T, K): the queries are the last T of S positions. A sum
    of K products grows like sqrt(K): undivided, softmax would pick one key and have no gradient.
    mask_TS is added to the scores; None hides from each query the keys after its position. Query
    head h reads key head h // R [4]: R heads become rows of one product, and no key is repeated.
    """
    (B, H, T, K), (G, S) = q_BHTK.shape, k_BGSK.shape[1:3]
    if mask_TS is None:
        mask_TS = q_BHTK.new_full((T, S), -torch.inf).triu(S - T + 1)
    q, k, v = q_BHTK.reshape(B * G, -1, K), k_BGSK.flatten(0, 1), v_BGSK.flatten(0, 1)
    scores = torch.baddbmm(mask_TS.repeat(H // G, 1), q, k.transpose(1, 2), alpha=K**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, K)


def fused_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
    """The same by torch's fused kernel, which never writes the T x S scores to memory."""
    T, S, mask_TS = q_BHTK.shape[2], k_BGSK.shape[2], None
    if 1 < T < S:  # one query sees all keys; where T = S, is_causal hides the later ones
        mask_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTK.device).tril(S - T)
    attention = nn.functional.scaled_dot_product_attention
    return attention(q_BHTK, k_BGSK, v_BGSK, mask_TS, is_causal=T == S, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention [4]: a cache of G/H the size; with qk_norm bounded scores [11]."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_size = c.head_size
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_size, bias=False)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_size, bias=False)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_size, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.head_size, c.dim, bias=False)
        self.q_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x_BTD, cos_TK, sin_TK, attention=plain_attention, append=None) -> Tensor:
        """attention: the code to use (section 6); append: what brings earlier keys from a cache."""
        heads = (*x_BTD.shape[:2], -1, self.head_size)
        q_BHTK = self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2)
        k_BGTK = self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2)
        v_BGTK = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        q_BHTK, k_BGTK = (apply_rope(x, cos_TK, sin_TK) for x in (q_BHTK, k_BGTK))
        if append is not None:
            k_BGTK, v_BGTK = append(k_BGTK, v_BGTK)
        y_BHTK = attention(q_BHTK, k_BGTK, v_BGTK)
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))


# --- 3. Experts, and the plain sparse layer -------------------------------------------------------


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [5, eq. 5], from (..., 2F): gate, the first half, scales each unit of up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class SwiGLU(nn.Module):
    """The dense feed-forward layer: down(silu(gate(x)) * up(x)) [5, eq. 6]."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Experts(nn.Module):
    """E SwiGLUs in two stacks: one grouped product (a matrix per block of rows) runs them all."""

    def __init__(self, n_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))


def run_expert(x_PD: Tensor, weight_P1: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """weight * down(silu(gate(x)) * up(x)) of one expert, for the rows that are sent to it. down is
    linear, so the weight may come before it: compiled, it is then a part of SwiGLU's kernel.
    """
    h_PF = swiglu(nn.functional.linear(x_PD, gate_up)) * weight_P1
    return nn.functional.linear(h_PF, down)


def plain_moe(experts: Experts, x_ND: Tensor, experts_NA: Tensor, weights_NA: Tensor) -> Tensor:
    """sum_a weights[n, a] * expert[experts[n, a]](x[n]), (N, D): a sparse layer as a loop.
    Each expert takes the tokens that chose it, and adds its results to those tokens' outputs. One
    without tokens adds nothing and has a gradient of zero: section 5 must send it tokens again. The
    four lines of the loop here are all of it; the code below does the same at a CPU's full speed:
    >>> x, y, experts = torch.randn(5, 8), torch.zeros(5, 8), Experts(4, dim=8, hidden_dim=16)
    >>> gate_up, down = (nn.init.normal_(p).data for p in experts.parameters())
    >>> choices, weights = torch.rand(5, 4).topk(2).indices, torch.rand(5, 2)
    >>> for e in range(4):
    ...     token, a = torch.where(choices == e)
    ...     weight = weights[token, a, None]
    ...     y[token] += run_expert(x[token], weight, gate_up[e], down[e])
    >>> torch.allclose(y, plain_moe(experts, x, choices, weights), atol=1e-4)
    True
    """
    gate_up_E = experts.gate_up_proj.to(x_ND.dtype).unbind()  # not [e]: its backward would add up
    down_E = experts.down_proj.to(x_ND.dtype).unbind()  # E gradients of the full size
    expert_E11 = torch.arange(len(down_E), device=x_ND.device)[:, None, None]
    # Found in (E, N, A), so in the order of experts; a pair of weight 0 (dropped) is left out.
    expert_P, token_P, choice_P = torch.where((experts_NA == expert_E11) & (weights_NA != 0))
    weight_P1 = weights_NA.to(x_ND.dtype)[token_P, choice_P, None]
    counts, y_E = expert_P.bincount(minlength=len(down_E)).tolist(), []
    rows_E = zip(x_ND.index_select(0, token_P).split(counts), weight_P1.split(counts), strict=True)
    for e, (x, weight) in enumerate(rows_E):
        # In bf16 a CPU builds a kernel for each new number of rows: let there be few.
        filler = (0, 0, 0, -len(x) % 32 if x.dtype == torch.bfloat16 else 0)
        x, weight = (nn.functional.pad(rows, filler) for rows in (x, weight))
        y_E.append(run_expert(x, weight, gate_up_E[e], down_E[e])[: counts[e]])
    return torch.zeros_like(x_ND).index_add(0, token_P, torch.cat(y_E))


# --- 4. Dispatch: the same sparse layer for a GPU -------------------------------------------------
# The loop asks how many rows each expert has, and Python would wait for the GPU's answer. With the
# P = N*A pairs (token, expert) sorted by expert, one grouped product does it all: row p is a copy
# of token token_P1[p], the a-th copy of token n is row slot_NA[n, a], and the rows of expert e end
# before row ends_E[e]. (Pairs of weight 0 stay in: to leave them out, one would wait for a count.)


class Gather(torch.autograd.Function):
    """The sum over a of x[index[:, a]]; `back` is the index of the opposite way.
    Copies of tokens go out along token_P1, results come back along slot_NA: each is the transpose
    of the other. autograd would scatter-add gradients: slowly, in an order that varies on a GPU.
    """

    @staticmethod
    def gather(x: Tensor, index: Tensor) -> Tensor:
        # Compiled, this is one kernel, 3 times as fast as one gather of all that is summed along A.
        first, *others = (x.index_select(0, column) for column in index.unbind(1))
        return sum(others, first)

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return Gather.gather(x, index)

    @staticmethod
    def backward(ctx, grad):
        return Gather.gather(grad, *ctx.saved_tensors), None, None


def run_grouped(x_PD: Tensor, weight_P1: Tensor, gate_up: Tensor, down: Tensor, ends_E) -> Tensor:
    """run_expert for all experts at once; data/kernels.py has it with a faster backward."""
    h_PF = swiglu(nn.functional.grouped_mm(x_PD, gate_up.mT, offs=ends_E)) * weight_P1
    return nn.functional.grouped_mm(h_PF, down.mT, offs=ends_E)


def sorted_moe(experts: Experts, x_ND: Tensor, experts_NA: Tensor, weights_NA: Tensor) -> Tensor:
    """plain_moe by sorting.
    >>> experts_NA = torch.tensor([[2, 0], [0, 1], [2, 1]])  # three tokens, two experts each
    >>> order_P = experts_NA.flatten().argsort(stable=True)  # pairs by expert, then by token
    >>> (order_P // 2).tolist()                              # token_P1: whose copy each row is
    [0, 1, 1, 2, 0, 2]
    """
    flat_P = experts_NA.flatten()
    expert_E = torch.arange(len(experts.down_proj), device=flat_P.device)
    small = torch.uint8 if len(expert_E) <= 256 else torch.int32  # radix sort: one pass per byte
    order_P = flat_P.to(small).argsort(stable=True)
    steps_P = torch.arange(len(flat_P), device=flat_P.device)
    slot_P = torch.empty_like(order_P).scatter_(0, order_P, steps_P)  # inverse
    token_P1, slot_NA = order_P[:, None] // experts_NA.shape[1], slot_P.view_as(experts_NA)
    ends_E = (flat_P[:, None] == expert_E).sum(0).cumsum(0, dtype=torch.int32)
    x_PD = Gather.apply(x_ND, token_P1, slot_NA)
    # The weights go out in the same order: each is a row of its own here, copied once.
    weight_P1 = weights_NA.to(x_ND.dtype).reshape(-1, 1)
    weight_P1 = Gather.apply(weight_P1, order_P[:, None], slot_P[:, None])
    gate_up, down = experts.gate_up_proj.to(x_ND.dtype), experts.down_proj.to(x_ND.dtype)
    return Gather.apply(run_grouped(x_PD, weight_P1, gate_up, down, ends_E), slot_NA, token_P1)


# --- 5. Routers: which experts a token goes to, and how much each counts --------------------------
# Choosing (experts_NA) has no gradient: a router learns through weights_NA and through its losses.
# An expert with more tokens learns faster, and so is chosen more: left alone, a router collapses
# onto a few. Each one below has its own counterweight: a loss, or a bias.
# All in fp32: bf16 would decide between experts by rounding. Noise is for training alone.


class Routing(NamedTuple):  # row n = b*T + t is token t of sequence b
    experts_NA: Tensor  # chosen experts, distinct within a row
    weights_NA: Tensor  # what each counts in the output; 0 where the choice is dropped
    probs_NE: Tensor | None = None  # of each expert, for those who ask to see it
    load_E: Tensor | None = None  # share of the choices per expert; None: MoE counts them
    balance: Tensor | float = 0.0  # weighted balance loss, in training
    z: Tensor | float = 0.0  # weighted z-loss, in training
    dropped: Tensor | float = 0.0  # share of choices lost to capacity


def choose(scores_NE: Tensor, k: int) -> Tensor:
    """The k best experts, (N, k), in order. Compiled, k rounds are one kernel; topk would sort."""
    expert_E, chosen = torch.arange(scores_NE.shape[-1], device=scores_NE.device), []
    for _ in range(k):
        chosen.append(scores_NE.detach().argmax(-1, keepdim=True))
        scores_NE = torch.where(expert_E == chosen[-1], -torch.inf, scores_NE)
    return torch.cat(chosen, -1)


def global_mean(x: Tensor) -> Tensor:
    """The mean over the processes of a run on several GPUs; x itself in one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    from torch.distributed import _functional_collectives as ops

    total = ops.all_reduce(x, "sum", torch.distributed.group.WORLD)
    return ops.wait_tensor(total) / torch.distributed.get_world_size()


class Router(nn.Module):
    """What routers share. A new one: a subclass in ROUTERS; forward: vectors, ids -> Routing."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.dim))  # a row per expert

    @staticmethod
    def n_active(c: Config) -> int:  # experts that a token is sent to, at most
        return c.top_k

    def init_weights(self) -> None:
        """Of the router's own parameters: small random matrices, vectors of zeros."""
        for p in self.parameters(recurse=False):
            nn.init.normal_(p, std=0.02) if p.dim() > 1 else nn.init.zeros_(p)

    def logits(self, x_BTD: Tensor, weight_ED: Tensor | None = None) -> Tensor:
        """x W^T, (N, E) in fp32, whatever autocast says."""
        weight_ED = self.weight if weight_ED is None else weight_ED
        with torch.autocast(x_BTD.device.type, enabled=False):
            return nn.functional.linear(x_BTD.flatten(0, -2).float(), weight_ED.float())

    def load(self, experts_NA: Tensor) -> Tensor:
        """The share of choices that each expert got, (E,); in training, on all GPUs together."""
        expert_E = torch.arange(self.config.n_experts, device=experts_NA.device)
        load_E = (experts_NA.flatten()[:, None] == expert_E).sum(0) / experts_NA.numel()
        return global_mean(load_E) if self.training else load_E

    def update_bias(self, load_E: Tensor) -> None:
        """Called after each optimizer step; nothing to do where a loss keeps the balance."""


def balance_loss(probs_NE: Tensor, load_E: Tensor) -> Tensor:
    """E * sum_e f_e P_e [8, eq. 4-6]: f the share of choices, P the mean probability of expert e.
    f has no gradient; P has one, and is pushed down most where f is large. Uniform routing gives 1
    (not the minimum: it is lower where f and P disagree), all choices on A experts give E/A. Both
    are of a whole batch: within a sequence nothing asks for balance, and experts may specialise.
    >>> one, even = torch.tensor([1.0, 0, 0, 0]), torch.full((4,), 0.25)
    >>> [balance_loss(p_E.repeat(2, 1), load_E=p_E).item() for p_E in (even, one)]
    [1.0, 4.0]
    """
    return len(load_E) * (load_E * probs_NE.mean(0)).sum()


class TopK(Router):
    """Mixtral's router: weights = softmax(TopK(x W)) [6, section 2.1], balance loss, z-loss.
    They are the full softmax over its sum at the chosen. At k = 1 that is always 1: only the two
    losses move this router. The z-loss, the mean of logsumexp(logits)^2 [9, eq. 5], keeps logits
    small, and so what rounding does to exp: without it some runs of [9] diverged, with it none.
    """

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None = None) -> Routing:
        c, logits_NE = self.config, self.logits(x_BTD)
        experts_NA = choose(logits_NE, c.top_k)
        weights_NA, probs_NE = logits_NE.gather(1, experts_NA).softmax(-1), logits_NE.softmax(-1)
        if not self.training:
            return Routing(experts_NA, weights_NA, probs_NE)
        load_E = self.load(experts_NA)
        balance = c.balance_weight * balance_loss(probs_NE, load_E)
        z = c.z_weight * logits_NE.logsumexp(-1).square().mean()
        return Routing(experts_NA, weights_NA, probs_NE, load_E, balance, z)


class Noisy(Router):
    """Noisy top-k gating [7, eq. 3-5]: softmax(TopK(x W + normal * softplus(x W_noise))).
    The noise lets a token try other experts; W_noise is learned and says how much. Two losses, each
    (std / mean)^2 over the experts: of importance, their summed weights (eq. 6-7), and of load. A
    count has no gradient, so load sums the probability of being chosen if that expert's noise were
    drawn again, Phi((x W - what to beat) / softplus(x W_noise)), Phi the normal CDF (appendix A).
    """

    def __init__(self, c: Config):
        super().__init__(c)
        self.noise_weight = nn.Parameter(torch.empty(c.n_experts, c.dim))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.noise_weight)  # [7, appendix A]: noise of softplus(0) = 0.69

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None = None) -> Routing:
        c, clean_NE = self.config, self.logits(x_BTD)
        noisy_NE = clean_NE
        if self.training:
            std_NE = nn.functional.softplus(self.logits(x_BTD, self.noise_weight))
            noisy_NE = clean_NE + torch.randn_like(clean_NE) * std_NE
        experts_NA, probs_NE = choose(noisy_NE, c.top_k), noisy_NE.softmax(-1)
        weights_NA = noisy_NE.gather(1, experts_NA).softmax(-1)
        if not self.training:
            return Routing(experts_NA, weights_NA, probs_NE)
        weight_NE = torch.zeros_like(clean_NE).scatter(1, experts_NA, weights_NA)
        totals = [weight_NE.sum(0)]  # importance; then load
        if c.top_k < c.n_experts:  # else every expert is always chosen, and their load is equal
            kth_N1, next_N1 = noisy_NE.topk(c.top_k + 1).values[:, -2:].split(1, dim=1)
            to_beat_NE = torch.where(noisy_NE >= kth_N1, next_N1, kth_N1)  # the k-th of the others
            margin_NE = (clean_NE - to_beat_NE) / std_NE.clamp(min=1e-20)
            totals.append(torch.special.ndtr(margin_NE).sum(0))
        loss = sum(total_E.var(correction=0) / total_E.mean().square() for total_E in totals)
        load_E = self.load(experts_NA)
        return Routing(experts_NA, weights_NA, probs_NE, load_E, c.balance_weight * loss)


class Switch(Router):
    """Switch routing [8, section 2]: the one best expert, weighted with its raw probability.
    The raw probability lets the task teach the router: renormalised over one expert it would be 1.
    An expert takes capacity_factor * N / E tokens (eq. 3), for hardware that wants a fixed number;
    a token beyond that has only its residual here. The queue goes by time: position t of all
    sequences, then t + 1. The future can't push tokens out. Jitter lets tokens try other experts.
    """

    @staticmethod
    def n_active(c: Config) -> int:
        return 1

    @staticmethod
    def queue(experts_BT: Tensor, n_experts: int) -> Tensor:
        """Where each token stands in the queue of its expert, (B, T), from 1."""
        hot_TBE = nn.functional.one_hot(experts_BT.T, n_experts)
        queue_TBE = hot_TBE.flatten(0, 1).cumsum(0).view_as(hot_TBE)
        return (queue_TBE * hot_TBE).sum(-1).T

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None = None) -> Routing:
        c, (B, T, _) = self.config, x_BTD.shape
        factor = c.capacity_factor if self.training else c.eval_capacity_factor
        if self.training and c.jitter:
            noise_BTD = torch.empty_like(x_BTD, dtype=torch.float32)
            x_BTD = x_BTD * noise_BTD.uniform_(1 - c.jitter, 1 + c.jitter)
        probs_NE, dropped = self.logits(x_BTD).softmax(-1), 0.0
        weights_N1, experts_N1 = probs_NE.max(-1, keepdim=True)
        if factor is not None:
            capacity = math.ceil(factor * B * T / c.n_experts)
            full_N1 = self.queue(experts_N1.view(B, T), c.n_experts).reshape(-1, 1) > capacity
            weights_N1, dropped = weights_N1.masked_fill(full_N1, 0), full_N1.float().mean()
        load_E = self.load(experts_N1)  # before capacity
        balance = c.balance_weight * balance_loss(probs_NE, load_E) if self.training else 0.0
        return Routing(experts_N1, weights_N1, probs_NE, load_E, balance, dropped=dropped)


class DeepSeek(Router):
    """DeepSeek-V3's router [10, section 2.1.2]: balance through a bias, not through the loss.
    Scores are sigmoids (eq. 15). The bias chooses: TopK(score + bias) (eq. 16); the score weighs:
    score / sum of the chosen (eq. 13), * routed_scale (their code): balance distorts no output. A
    token may choose from the top_groups groups whose two best scores sum highest: few machines get
    it, if each holds a group. A tiny loss within each sequence guards against extremes (eq. 17-20).
    """

    def __init__(self, c: Config):
        super().__init__(c)
        self.register_buffer("bias", torch.zeros(c.n_experts))

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """Overloaded experts go down, others up; load_E is of the whole step, on all GPUs."""
        step_E = self.config.bias_rate * torch.sign(load_E.mean() - load_E)  # bf16 would lose it
        self.bias = self.bias.float().add_(step_E - step_E.mean())  # the mean would only drift

    def choose_in_groups(self, scores_NE: Tensor) -> Tensor:
        c = self.config
        if c.top_groups < c.n_groups:
            grouped = scores_NE.detach().unflatten(1, (c.n_groups, -1))  # (N, M, E / M)
            best_NM = grouped.topk(min(2, grouped.shape[-1])).values.sum(-1)
            mask_NM = torch.full_like(best_NM, -torch.inf)  # not 0: a biased score can be below
            mask_NM = mask_NM.scatter(1, best_NM.topk(c.top_groups).indices, 0.0)
            scores_NE = (grouped + mask_NM[..., None]).flatten(1)
        return choose(scores_NE, c.top_k)

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None = None) -> Routing:
        c, scores_NE = self.config, self.logits(x_BTD).sigmoid()
        experts_NA = self.choose_in_groups(scores_NE + self.bias)
        scores_NA = scores_NE.gather(1, experts_NA)
        weights_NA = c.routed_scale * scores_NA / (scores_NA.sum(-1, keepdim=True) + 1e-20)
        probs_NE = scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20)
        if not self.training:
            return Routing(experts_NA, weights_NA, probs_NE)
        # Eq. 18 counts the highest scores, not those chosen: the bias evens out the load already.
        best_NA = self.choose_in_groups(scores_NE)
        hot_NE = torch.zeros_like(scores_NE).scatter(1, best_NA, 1.0)
        share_BE, probs_BE = (x.unflatten(0, (len(x_BTD), -1)).mean(1) for x in (hot_NE, probs_NE))
        balance = c.n_experts / c.top_k * (share_BE * probs_BE).sum(-1).mean()
        load_E = self.load(experts_NA)
        return Routing(experts_NA, weights_NA, probs_NE, load_E, c.sequence_weight * balance)


ROUTERS |= {"topk": TopK, "noisy": Noisy, "switch": Switch, "deepseek": DeepSeek}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's when it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """First weights: normal(0, 0.02), as GPT-2's, but zeros for what a block adds to the residual
    stream. These make it the identity, and do learn: what they multiply isn't zero."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, (Attention, SwiGLU, Experts)):
            *inner, last = (p for p in module.parameters() if p.dim() > 1)
            for weight in inner:
                nn.init.normal_(weight, std=0.02)
            nn.init.zeros_(last)  # o_proj or down_proj
        elif isinstance(module, Router):
            module.init_weights()


class MoE(nn.Module):
    """The sparse layer: route, dispatch, add; shared experts see all tokens. filled: see `fill`."""

    def __init__(self, c: Config, filled: bool = True):
        super().__init__()
        self.router = ROUTERS[c.router](c)
        self.experts = Experts(c.n_experts, c.dim, c.hidden_dim)
        shared_dim = c.n_shared_experts * c.hidden_dim
        self.shared = SwiGLU(c.dim, shared_dim) if shared_dim else None
        if filled:
            fill(self)

    def forward(self, x_BTD, ids_BT=None, moe=plain_moe) -> tuple[Tensor, Routing]:
        routing, dtype = self.router(x_BTD, ids_BT), compute_dtype(x_BTD)
        if routing.load_E is None:
            routing = routing._replace(load_E=self.router.load(routing.experts_NA))
        x_ND = x_BTD.flatten(0, -2).to(dtype)  # nn.Linear asks autocast by itself
        y_ND = moe(self.experts, x_ND, routing.experts_NA, routing.weights_NA)
        y_BTD = y_ND.view_as(x_BTD).to(dtype)  # autocast makes a sum fp32
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD), routing


# --- 6. The model ---------------------------------------------------------------------------------


def pick_kernels(x: Tensor, c: Config) -> tuple:
    """(attention, moe): the fastest code for x's device and dtype."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return plain_attention, plain_moe  # torch's fused attention is 1.5 to 4 times slower
    # Grouped products: bf16, an NVIDIA card from Ampere on, rows of a multiple of 16 bytes.
    fits = x.is_cuda and x.dtype == torch.bfloat16 and c.dim % 8 == c.hidden_dim % 8 == 0
    has_grouped_mm = fits and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return fused_attention, sorted_moe if has_grouped_mm else plain_moe


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.dropout = c.dropout
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.attn = Attention(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        is_sparse = c.n_experts > 1 and layer >= c.n_dense_layers
        n_wide = c.n_active + c.n_shared_experts if c.n_experts > 1 else 1
        self.ffn = MoE(c, filled=False) if is_sparse else SwiGLU(c.dim, n_wide * c.hidden_dim)

    def forward(self, x_BTD, ids_BT, cos_TK, sin_TK, kernels, append=None):
        attention, moe = kernels
        y_BTD = self.attn(self.attn_norm(x_BTD), cos_TK, sin_TK, attention, append)
        x_BTD = x_BTD + nn.functional.dropout(y_BTD, self.dropout, self.training)
        h_BTD, is_sparse = self.ffn_norm(x_BTD), isinstance(self.ffn, MoE)
        y_BTD, routing = self.ffn(h_BTD, ids_BT, moe) if is_sparse else (self.ffn(h_BTD), None)
        return x_BTD + nn.functional.dropout(y_BTD, self.dropout, self.training), routing


class Output(NamedTuple):  # of LaMoE.forward; the last three are None unless asked for
    logits: Tensor | None  # (B, T, V), in the dtype of matrix products
    loss: Tensor | None  # cross-entropy [nats per token]; None without targets
    balance: Tensor  # the routers' weighted balance losses, summed over layers
    z: Tensor  # their weighted z-losses, likewise
    load: Tensor  # (L, E): share of choices an expert got, before capacity; rows sum to 1
    dropped: Tensor  # share of choices lost to capacity
    experts: Tensor | None = None  # (L, B, T, A)
    expert_weights: Tensor | None = None  # (L, B, T, A): what each counts
    router_probs: Tensor | None = None  # (L, B, T, E): of each expert

    aux = property(lambda self: self.balance + self.z)  # what training adds to the loss


class LaMoE(nn.Module):
    """The decoder: embedding, blocks, norm, head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        cos, sin = rope_table(c.head_size, c.seq_len, c.rope_theta, c.rope_factor)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        fill(self)
        if not c.tie_embeddings:
            # Training moves words of like contexts (names) alike; small ones would end too alike.
            nn.init.normal_(self.embed.weight, std=1.0)
            nn.init.zeros_(self.head.weight)  # a first loss of ln(V)

    @property
    def sparse_layers(self) -> list[int]:
        """The numbers of the layers that have experts, those of the rows of Output.load."""
        return [i for i, block in enumerate(self.blocks) if isinstance(block.ffn, MoE)]

    def forward(
        self, ids_BT, targets_BT=None, cache=None, return_experts=False, return_logits=True
    ) -> Output:
        """Logits for the token after each position; with targets, also the loss (-100: not scored).
        With a cache, ids are the T positions after those it holds. return_logits=False, where they
        are not wanted, spares the compiled backward a gradient of their size.
        """
        c, start = self.config, 0 if cache is None else cache.length
        end = start + ids_BT.shape[1]
        if end > c.seq_len:
            wrong = f"{end} tokens do not fit the context of seq_len={c.seq_len}"
            raise ValueError(f"{wrong}; shorten the text, or train with --seq_len {end}")
        x_BTD = nn.functional.dropout(self.embed(ids_BT), c.dropout, self.training)
        x_BTD = x_BTD.to(compute_dtype(x_BTD))
        cos_TK, sin_TK = self.cos[start:end], self.sin[start:end]
        kernels, routings = pick_kernels(x_BTD, c), []
        for i, block in enumerate(self.blocks):
            append = None if cache is None else partial(cache.append, i)
            x_BTD, routing = block(x_BTD, ids_BT, cos_TK, sin_TK, kernels, append)
            routings += [routing] if routing else []
        if cache is not None:
            cache.length = end
        logits_BTV, loss = self.predict(x_BTD, targets_BT, return_logits)
        zero, fields = self.cos.new_zeros(()), ("balance", "z", "dropped")
        balance, z, dropped = (sum((getattr(r, f) for r in routings), zero) for f in fields)
        load_LE = torch.cat([zero.new_zeros(0, c.n_experts), *(r.load_E[None] for r in routings)])
        rows = zip(*(r[:3] for r in routings), strict=True) if return_experts else ()  # of L layers
        rows = ([x.T for x in row] for row in rows if row[0] is not None)  # (A, N): pad, A may vary
        seen = (nn.utils.rnn.pad_sequence(row, True).mT.unflatten(1, ids_BT.shape) for row in rows)
        return Output(logits_BTV, loss, balance, z, load_LE, dropped / max(1, len(routings)), *seen)

    def predict(self, x_BTD, targets_BT, return_logits) -> tuple[Tensor | None, Tensor | None]:
        """Logits, and their cross-entropy in fp32 where targets are given. (It can be compiled.)"""
        logits_BTV, loss = self.head(self.norm(x_BTD)), None
        if targets_BT is not None:
            flat_NV = logits_BTV.flatten(0, 1).float()
            loss = nn.functional.cross_entropy(flat_NV, targets_BT.flatten())
        return (logits_BTV if return_logits else None), loss

    def update_bias(self, load_LE: Tensor) -> None:  # after each optimizer step, with its load
        for i, load_E in zip(self.sparse_layers, load_LE, strict=True):
            self.blocks[i].ffn.router.update_bias(load_E)


# --- 7. Generation --------------------------------------------------------------------------------


def filter_logits(logits_BV, temperature=1.0, top_k=None, top_p=None, min_p=None) -> Tensor:
    """softmax(logits / temperature), (B, V), but 0 for what filters remove in turn: top_k keeps the
    k likeliest, min_p those at least min_p times the highest, top_p the fewest that sum to top_p.
    """
    logits_BV = logits_BV / temperature
    if top_k:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if min_p is not None:
        least_B1 = logits_BV.amax(-1, keepdim=True) + math.log(min(1, max(min_p, 1e-30)))
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if top_p is not None and top_p < 1:  # at 1, rounding of the running sum would remove some
        sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
        probs_BV = sorted_BV.softmax(-1)
        before_BV = probs_BV.cumsum(-1) - probs_BV  # probability of the tokens ahead of each
        sorted_BV = sorted_BV.masked_fill(before_BV >= max(top_p, 1e-9), -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter(1, order_BV, sorted_BV)
    return logits_BV.softmax(-1)


def sample(logits_BV: Tensor, noise_BV: Tensor, temperature: float = 1.0, *filters) -> Tensor:
    """One id per row, (B,), drawn from `filter_logits`; at temperature 0 the most likely.
    The draw is argmax(probs / noise), noise from Exponential(1): clock i rings at noise_i / p_i,
    that is at a rate of p_i, and is the first of all with probability p_i. No number leaves the
    GPU. (A noise of 0 would let 0 / 0 win, a temperature near 0 would overflow.)
    """
    if temperature < 1e-6:
        return logits_BV.argmax(-1)
    probs_BV = filter_logits(logits_BV, temperature, *filters)
    return (probs_BV / noise_BV.clamp(min=1e-30)).argmax(-1)


# One token at a time: hundreds of tiny operations, and a GPU waits longer for Python than it works.
# So `Step` keeps its state in the same memory, in fixed shapes, and asks nothing back from the GPU:
# it can be captured as a CUDA graph and replayed, or compiled.


def moe_one(experts: Experts, x_1D: Tensor, experts_1A: Tensor, weights_1A: Tensor) -> Tensor:
    """plain_moe for one token: nothing to sort."""
    (experts_A,), (weights_A,) = experts_1A, weights_1A.to(x_1D.dtype)
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not (x_1D.is_cuda or torch.compiler.is_compiling()):
        rows = zip(experts_A.tolist(), weights_A.tolist(), weights_A, strict=True)
        y_A = [run_expert(x_1D, weight, gate_up[e], down[e]) for e, w, weight in rows if w]
        return sum(y_A[1:], y_A[0]) if y_A else torch.zeros_like(x_1D)
    # Compiled, nothing is copied; index_copy keeps h from being computed anew for each row of down.
    h_AF = swiglu((gate_up[experts_A] * x_1D).sum(-1, dtype=torch.float32)) * weights_A[:, None]
    h_AF = h_AF.to(x_1D.dtype)
    h_AF = torch.empty_like(h_AF).index_copy(0, torch.arange(len(h_AF), device=h_AF.device), h_AF)
    y_AD = (down[experts_A] * h_AF[:, None]).sum(-1, dtype=torch.float32)
    return y_AD.sum(0, keepdim=True).to(x_1D.dtype)


class WrittenOut(torch.overrides.TorchFunctionMode):
    """Inside, products with a few rows are sums, which the compiler fuses with their neighbours."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (nn.functional.linear, torch.bmm, torch.baddbmm):
            return function(*args, **(kwargs or {}))
        a, b = args[1:3] if function is torch.baddbmm else args[:2]
        b = b.transpose(0, 1) if function is nn.functional.linear else b
        y = (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2, dtype=torch.float32)
        y = args[0] + kwargs["alpha"] * y if function is torch.baddbmm else y
        return y.to(a.dtype)


class Step:
    """One step of generation, from the last token of each row to the next, and its state."""

    def __init__(self, model: LaMoE, B: int, length: int, filters: tuple, penalty: float, stop):
        device, V = model.embed.weight.device, model.config.vocab_size
        self.model, self.filters, self.penalty, self.stop = model, filters, penalty, stop
        self.length, self.sample, self.dtype = length, sample, compute_dtype(model.embed.weight)
        self.cache = Cache(model.config, B, length, device, self.dtype)
        self.attention, self.moe = pick_kernels(self.cache.layers[0][0], model.config)
        self.moe = moe_one if B == 1 else self.moe
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of ids_B1
        self.ids_B1 = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.seen_BV = torch.zeros(B, V, dtype=torch.bool, device=device)
        self.done_B = torch.zeros(B, dtype=torch.bool, device=device)
        self.noise_BV = torch.ones(B, V, device=device)
        self.next, self.static, self.fuses = self.run, self.position.is_cuda, False

    def read(self, ids_BT: Tensor) -> None:
        """Reads the prompt; leaves the next token of each row in ids_B1."""
        self.pick(self.model(ids_BT, cache=self.cache).logits[:, -1], ids_BT)
        self.position.fill_(self.cache.length)

    def run(self) -> None:
        """Reads ids_B1; leaves the next token of each row there."""
        m, at, attention = self.model, self.position, self.attention
        if self.static:  # looks at all S positions and masks, so that no shape ever changes
            end = self.length
            future_1S = torch.arange(end, device=at.device) > at
            mask_1S = torch.where(future_1S, -torch.inf, 0.0).to(self.dtype)[None]
            attention = partial(plain_attention, mask_TS=mask_1S)
        else:
            end = self.cache.length = self.cache.length + 1

        def append(kept, *new):
            return [k.index_copy_(2, at, x)[:, :, :end] for k, x in zip(kept, new, strict=True)]

        x_B1D, kernels = m.embed(self.ids_B1).to(self.dtype), (attention, self.moe)
        with WrittenOut() if self.fuses else contextlib.nullcontext():
            for block, kept in zip(m.blocks, self.cache.layers, strict=True):
                rope, to_cache = (m.cos[at], m.sin[at]), partial(append, kept)
                x_B1D, _ = block(x_B1D, self.ids_B1, *rope, kernels, to_cache)
            logits_BV = m.head(m.norm(x_B1D))[:, 0]
        self.pick(logits_BV, self.ids_B1)
        self.position += 1

    def pick(self, logits_BV: Tensor, ids_BT: Tensor) -> None:
        """Puts the next token of each row into ids_B1; ids_BT were read since the last one."""
        logits_BV = logits_BV.float()
        if self.penalty != 1:  # makes tokens already seen less likely (arXiv:1909.05858)
            self.seen_BV.scatter_(1, ids_BT, True)
            factor_BV = torch.where(logits_BV > 0, 1 / self.penalty, self.penalty)
            logits_BV = torch.where(self.seen_BV, logits_BV * factor_BV, logits_BV)
        ids_B = self.sample(logits_BV, self.noise_BV, *self.filters)
        if self.stop is not None:
            ids_B = torch.where(self.done_B, self.stop, ids_B)
            self.done_B |= ids_B == self.stop
        self.ids_B1.copy_(ids_B[:, None])

    def compile(self) -> None:
        """Makes `next` compiled code: on a CPU 2.2 (38M parameters) to 5 times (2M) as fast."""
        self.static, self.fuses = True, len(self.ids_B1) == 1
        self.next = torch.compile(self.run, fullgraph=True, dynamic=False)

    def capture(self) -> None:
        """Makes `next` replay a CUDA graph. Before the prompt, which overwrites its rubbish."""
        run, side, graph = self.next, torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # outside the graph: kernels are chosen, memory is taken
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            run()
        for state in (self.position, self.ids_B1, self.seen_BV, self.done_B):
            state.zero_()
        self.next = graph.replay


@torch.inference_mode()
def generate(
    model, ids_BT, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None,
    repetition_penalty=1.0, stop=None, generator=None, graph=None, compile=False,
):  # fmt: skip
    """Yields ids_B, one new token per row, until max_new_tokens, the end of the context, or until
    every row has had the stop token (which it then repeats; a GPU looks every 16 tokens). `graph`
    captures a step as a CUDA graph (None: where that pays), `compile` compiles it, on a CPU too.
    """
    if model.training:
        raise ValueError("generate needs the model in evaluation mode; call model.eval() first")
    (B, T), c, is_cuda = ids_BT.shape, model.config, ids_BT.is_cuda
    n_new = min(max_new_tokens, c.seq_len - T if T <= c.seq_len else 1)  # 1: to read is refused
    length = min(c.seq_len, -(-(T + max(0, n_new)) // 256) * 256)  # few: kernels are made for each
    step = Step(model, B, length, (temperature, top_k, top_p, min_p), repetition_penalty, stop)
    # What asks the GPU for numbers: a loop over experts, products before Hopper, maybe own routers.
    old = is_cuda and torch.cuda.get_device_capability(ids_BT.device) < (9, 0)
    own = is_cuda and ROUTERS[c.router].__module__ != __name__
    asks = model.sparse_layers and (own or step.moe is plain_moe or step.moe is sorted_moe and old)
    graph = is_cuda and n_new >= 64 and not asks if graph is None else graph
    if compile and (graph or not (is_cuda or asks)):
        step.compile()
    if graph:
        step.capture()
    for n in range(n_new):
        if temperature:
            step.noise_BV.exponential_(generator=generator)
        step.next() if n else step.read(ids_BT)
        yield step.ids_B1[:, 0].clone()
        if stop is not None and (not is_cuda or n % 16 == 15) and step.done_B.all():
            return  # looking waits for the GPU: so only now and then


LaMoE.generate = generate  # a method, though it could only be written below the model

# --- 8. Counting: what a model holds, and what a token costs --------------------------------------


def count_parameters(model: LaMoE) -> dict[str, tuple[int, int]]:
    """(total, active) parameters per part; an embedding is a look-up, active only if it is tied."""
    c, rows = model.config, {}
    for name, weight in model.named_parameters():
        part, share = "norms", 1.0
        if weight is model.embed.weight:
            part, share = "embedding", float(c.tie_embeddings)
        elif ".ffn.experts." in name:
            part, share = "experts", c.n_active / c.n_experts
        elif weight.dim() > 1 or ".router." in name:
            part = next((p for p in ("router", "attn", "ffn", "head") if p in name), "other")
        rows.setdefault(part, []).append((weight.numel(), round(weight.numel() * share)))
    parts = {part: tuple(map(sum, zip(*of_part, strict=True))) for part, of_part in rows.items()}
    return {**parts, "all": tuple(map(sum, zip(*parts.values(), strict=True)))}


def flops_per_token(model: LaMoE) -> int:
    """To train on a token: 6 (2 forward, 4 back) per active weight, and per key or value number."""
    c, parts = model.config, count_parameters(model)
    attention = 12 * c.n_layers * c.n_heads * c.head_size * c.seq_len // 2  # T/2 are seen
    return 6 * (parts["all"][1] - parts["norms"][1]) + attention
