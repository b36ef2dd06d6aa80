"""Writing on an NVIDIA card: the step of lamoe.py in few kernels of our own, in Triton.

A step with one row, or some, does little more than read every weight it needs once, and that at the
speed of memory only if nothing waits in between. Compiled, lamoe.py's is 17 kernels a layer; here a
layer is six for a single row (`row`): each reads a matrix, and does on the way what is small. With
more rows (`rows`) the products are torch's, and all experts work on all rows: nearly every expert
has a row, so all are read anyway, and nothing has to be sorted.

A kernel may begin before the one ahead of it has ended, once that one has waited for its own; what
that one writes it reads after `gdc_wait`, and before it weights, and what is older ("programmatic
dependent launch", from Hopper on).
"""

import math

import torch
from torch import Tensor

import lamoe

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU or a Mac
    triton = None

# Rows of a matrix for one program, how many of their columns at a time, and its warps.
PRODUCT = {"ROWS": 8, "COLUMNS": 512, "num_warps": 4}  # q, k and v; the head
OUTPUT = {"ROWS": 8, "COLUMNS": 1024, "num_warps": 4}  # o
GATE_UP = {"ROWS": 8, "COLUMNS": 512, "num_warps": 4}
DOWN = {"ROWS": 4, "COLUMNS": 1024, "num_warps": 4}
ATTEND = {"BLOCK": 64, "num_warps": 4}  # positions at a time
ROUTE = {"num_warps": 8}
DRAW = {"BLOCK": 4096, "num_warps": 16}  # tokens at a time
SPLITS = 4  # programs that share a query head's positions, with one row


def covers(step: lamoe.Step) -> bool:
    """Whether the kernels below can do this step, and would do it faster."""
    c, B = step.model.config, len(step.ids_B1)
    weights = [w for name, w in step.model.named_parameters() if "router" not in name.split(".")]
    is_plain = all(w.dtype == step.dtype for w in weights)  # a router may have stayed in fp32
    few = B == 1 or (B <= 256 and B * c.n_active * 2 >= c.n_experts)
    return is_plain and few and c.dim <= 8192 and works(step.position.device)


def works(device: torch.device) -> bool:
    """Whether Triton compiles here: it needs a C compiler, and a card that it knows."""
    if triton is None:
        return False
    one, ids_B = torch.ones(1, 16, device=device), torch.zeros(1, dtype=torch.long, device=device)
    try:
        draw_kernel[(1,)](one, one, ids_B, 16, 1.0, 0.0, **DRAW)
        return True
    except Exception:  # whatever a missing compiler makes of it
        return False


class Layer:
    """A block's weights: views, but for those of q, k and v as one matrix."""

    def __init__(self, block: lamoe.Block, c: lamoe.Config):
        attn, ffn = block.attn, block.ffn
        self.norms = block.attn_norm.weight, block.ffn_norm.weight
        self.qk_norms = (attn.q_norm.weight, attn.k_norm.weight) if c.qk_norm else self.norms
        self.qkv = torch.cat((attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight))
        self.o, is_sparse = attn.o_proj.weight, isinstance(ffn, lamoe.MoE)
        self.router, always = (ffn.router, ffn.shared) if is_sparse else (None, ffn)
        self.is_topk = type(self.router) in (lamoe.TopK, lamoe.Noisy)  # in evaluation the same
        self.experts = tuple(ffn.experts.parameters()) if is_sparse else None
        self.always = tuple(p[None] for p in always.parameters()) if always else None


class FewKernels:
    """`run` of a lamoe.Step, whose state it uses."""

    def __init__(self, step: lamoe.Step):
        self.step, c, device = step, step.model.config, step.position.device
        self.layers = [Layer(block, c) for block in step.model.blocks]
        N, is_row, like = len(step.ids_B1), len(step.ids_B1) == 1, {"device": device}
        self.splits = SPLITS if is_row else 1
        # One row is a small part of what is read: its numbers stay in fp32.
        inner = {**like, "dtype": torch.float32 if is_row else step.dtype}
        width, wide = c.n_heads * c.head_size, (c.n_heads + 2 * c.n_kv_heads) * c.head_size
        hidden = c.hidden_dim * max(c.n_experts, c.n_active + c.n_shared_experts)
        self.x_ND = torch.zeros(N, c.dim, **like)
        self.h_ND = torch.zeros(N, c.dim, device=device, dtype=step.dtype)
        self.qkv = torch.zeros(N, wide, **inner)
        self.y = torch.zeros(self.splits, N, width, **inner)
        self.lse = torch.zeros(self.splits, N, c.n_heads, **like)
        self.u = torch.zeros(hidden, **inner)
        self.added = torch.zeros(c.n_experts + 1, N, c.dim, device=device, dtype=step.dtype)
        self.experts_NA = torch.zeros(N, c.n_active, dtype=torch.long, **like)
        self.weights_NE = torch.zeros(N, c.n_experts, **like)
        self.first, self.ones = torch.zeros(1, dtype=torch.long, **like), torch.ones(N, 1, **like)
        self.logits = torch.zeros(1, c.vocab_size, **like)
        self.ids_B = torch.zeros(N, dtype=torch.long, **like)
        temperature, *cuts, _ = *step.filters, *[None] * (4 - len(step.filters))
        if temperature >= 1e-6 and cuts == [None, None] and step.penalty == 1:
            step.sample = self.draw
        early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.early = {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}

    def __call__(self) -> None:
        step = self.step
        self.x_ND.copy_(step.model.embed(step.ids_B1)[:, 0])
        logits_BV = self.row() if len(self.x_ND) == 1 else self.rows()
        step.pick(logits_BV, step.ids_B1)
        step.position += 1

    def row(self) -> Tensor:
        m, (_, D) = self.step.model, self.x_ND.shape
        for i, layer in enumerate(self.layers):
            self.product(layer.norms[0], layer.qkv, self.qkv)
            self.attend(i, layer)
            sizes = sized(OUTPUT, layer.o.shape[1])
            output_kernel[(blocks(D, sizes["ROWS"]),)](
                self.y, self.lse, layer.o, self.x_ND, D, C=layer.o.shape[1],
                H=m.config.n_heads, SPLITS=self.splits, **sizes, **self.early,
            )  # fmt: skip
            self.add_and_route(layer.norms[1], layer)
            if layer.experts:
                self.feed_forward(*layer.experts, self.experts_NA, self.weights_NE)
            if layer.always:
                self.feed_forward(*layer.always, self.first, self.ones)
        self.product(m.norm.weight, m.head.weight, self.logits)
        return self.logits

    def rows(self) -> Tensor:
        m, (N, D), n_added = self.step.model, self.x_ND.shape, 0
        for i, layer in enumerate(self.layers):
            self.add_and_route(layer.norms[0], None, n_added)
            torch.mm(self.h_ND, layer.qkv.T, out=self.qkv)
            self.attend(i, layer)
            torch.mm(self.y[0], layer.o.T, out=self.added[0])
            self.add_and_route(layer.norms[1], layer, 1)
            n_added = 0
            for part, weights_NE in ((layer.experts, self.weights_NE), (layer.always, self.ones)):
                if part is None:
                    continue
                gate_up, down = part
                (E, _, F), end = down.shape, n_added + len(down)
                gate_up_NE2F = torch.mm(self.h_ND, gate_up.view(-1, D).T)
                u_NEF = self.h_ND.new_empty(N, E, F)
                swiglu_kernel[(N * E, blocks(F, 1024))](
                    gate_up_NE2F, weights_NE, u_NEF, F, BLOCK=1024, num_warps=4
                )
                torch.bmm(u_NEF.transpose(0, 1), down.mT, out=self.added[n_added:end])
                n_added = end
        self.add_and_route(m.norm.weight, None, n_added)
        return m.head(self.h_ND)

    def product(self, norm: Tensor, W: Tensor, y: Tensor) -> None:
        """y = W RMSNorm(x)."""
        (N, D), sizes = W.shape, sized(PRODUCT, W.shape[1])
        product_kernel[(blocks(N, sizes["ROWS"]),)](
            self.x_ND, norm, W, y, N, self.step.model.config.norm_eps, D=D, **sizes, **self.early
        )

    def attend(self, i: int, layer: Layer) -> None:
        """y and lse of the attention of each split; writes the new keys and values."""
        m, c, (keys, values) = self.step.model, self.step.model.config, self.step.cache.layers[i]
        attend_kernel[(len(self.x_ND) * c.n_heads, self.splits)](
            self.qkv, *layer.qk_norms, m.cos, m.sin, keys, values, self.step.position, self.y,
            self.lse, keys.shape[2], c.norm_eps, c.head_size**-0.5, H=c.n_heads, G=c.n_kv_heads,
            K=c.head_size, KP=power_of_2(c.head_size), NORM=c.qk_norm,
            SPLITS=self.splits, **ATTEND, **self.early,
        )  # fmt: skip

    def add_and_route(self, norm: Tensor, layer: Layer | None, n_added: int = 0) -> None:
        """h = RMSNorm(x + what was added), and where it goes if the layer is sparse."""
        c, (N, D) = self.step.model.config, self.x_ND.shape
        routes = layer is not None and layer.is_topk
        E, DP = c.n_experts, power_of_2(D)
        EP = power_of_2(E)
        add_and_route_kernel[(N,)](
            self.x_ND, self.added, norm, self.h_ND, layer.router.weight if routes else norm,
            self.experts_NA, self.weights_NE, N, c.norm_eps, D=D, DP=DP, E=E, EP=EP,
            EB=min(EP, max(1, 16384 // DP)), A=c.n_active if routes else 0, ADDED=n_added,
            **ROUTE, **self.early,
        )  # fmt: skip
        if layer is not None and layer.router is not None and not routes:
            experts_NA, weights_NA, *_ = layer.router(self.h_ND[:, None], self.step.ids_B1)
            self.experts_NA = experts_NA.contiguous()
            self.weights_NE.zero_().scatter_(1, experts_NA, weights_NA.float())

    def feed_forward(self, gate_up, down, experts_1A, weights_1E) -> None:
        """x += the sum over the chosen experts, of one row."""
        (_, D, F), A = down.shape, experts_1A.shape[-1]
        sizes = sized(GATE_UP, D)
        gate_up_kernel[(blocks(F, sizes["ROWS"]), A)](
            self.h_ND, gate_up, experts_1A, weights_1E, self.u, F, D=D, **sizes, **self.early
        )
        sizes = sized(DOWN, F)
        down_kernel[(blocks(D, sizes["ROWS"]),)](
            self.u, down, experts_1A, self.x_ND, D, F=F, A=A, **sizes, **self.early
        )

    def draw(self, logits_BV, noise_BV, temperature, top_k=None, top_p=None, min_p=None) -> Tensor:
        """lamoe.sample without top_k and top_p."""
        (B, V), least = logits_BV.shape, math.log(min(1, max(min_p or 0, 1e-30)))
        draw_kernel[(B,)](
            logits_BV.contiguous(), noise_BV, self.ids_B, V, temperature, least, **DRAW
        )
        return self.ids_B


def blocks(n: int, size: int) -> int:
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The next one: Triton has no other blocks."""
    return 1 << (n - 1).bit_length()


def sized(sizes: dict, n_columns: int) -> dict:
    return {**sizes, "COLUMNS": min(sizes["COLUMNS"], power_of_2(n_columns))}


if triton is not None:

    @triton.jit
    def wait(EARLY: tl.constexpr):
        """Until the kernel ahead has ended; then the next one may begin."""
        if EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def load_tile(W, row, n_rows, column, n_columns):
        inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
        at = row[:, None].to(tl.int64) * n_columns + column[None, :]
        return tl.load(W + at, mask=inside, other=0, cache_modifier=".cg")  # read once

    @triton.jit
    def product_kernel(
        x, norm, W, y, N, eps,
        D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """The norm's scale is a factor of the whole sum: x is read once for both."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        total, squares = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((COLUMNS,), tl.float32)
        column = tl.arange(0, COLUMNS)
        w = load_tile(W, row, N, column, D)
        g = tl.load(norm + column, mask=column < D, other=0).to(tl.float32)
        wait(EARLY)
        for start in tl.static_range(0, D, COLUMNS):
            if start > 0:
                column = start + tl.arange(0, COLUMNS)
                w = load_tile(W, row, N, column, D)
                g = tl.load(norm + column, mask=column < D, other=0).to(tl.float32)
            value = tl.load(x + column, mask=column < D, other=0)
            squares += value * value
            total += w * (value * g)[None, :]
        result = tl.sum(total, 1) * tl.rsqrt(tl.sum(squares, 0) / D + eps)
        tl.store(y + row, result, mask=row < N)

    @triton.jit
    def turned(x, norm, cos, sin, i, other, K: tl.constexpr, eps, NORM: tl.constexpr):
        """A query or key of one head, normalised and turned to its position (lamoe.apply_rope)."""
        a = tl.load(x + i, mask=i < K, other=0).to(tl.float32)
        b = tl.load(x + other, mask=i < K, other=0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(a * a, 0) / K + eps)
            a *= scale * tl.load(norm + i, mask=i < K, other=0).to(tl.float32)
            b *= scale * tl.load(norm + other, mask=i < K, other=0).to(tl.float32)
        return a * cos + b * sin

    @triton.jit
    def attend_kernel(
        qkv, q_norm, k_norm, cos, sin, keys, values, position, y, lse, S, eps, scale,
        H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, NORM: tl.constexpr,
        SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """One program: one query head of one row, every SPLITS-th block of its positions, summed as
        in FlashAttention. The new key isn't read from the cache, into which others write it now."""
        head, split = tl.program_id(0), tl.program_id(1)
        b, h = head // H, head % H
        g, i = h // (H // G), tl.arange(0, KP)
        other = tl.where(i < K // 2, i + K // 2, i - K // 2)
        at = tl.load(position, cache_modifier=".cg").to(tl.int32)
        c = tl.load(cos + at * K + i, mask=i < K, other=0).to(tl.float32)
        s = tl.load(sin + at * K + i, mask=i < K, other=0).to(tl.float32)
        s = tl.where(i < K // 2, -s, s)
        kept = (b * G + g).to(tl.int64) * S * K
        step = split * BLOCK + tl.arange(0, BLOCK)
        next_k = load_tile(keys + kept, step, at, i, K)
        next_v = load_tile(values + kept, step, at, i, K)
        wait(EARLY)
        of_row = qkv + b * (H + 2 * G) * K
        q = turned(of_row + h * K, q_norm, c, s, i, other, K, eps, NORM) * scale
        k = turned(of_row + (H + g) * K, k_norm, c, s, i, other, K, eps, NORM)
        v = tl.load(of_row + (H + G + g) * K + i, mask=i < K, other=0).to(tl.float32)
        if (split == 0) & (h % (H // G) == 0):
            tl.store(keys + kept + at * K + i, k.to(keys.dtype.element_ty), mask=i < K)
            tl.store(values + kept + at * K + i, v.to(values.dtype.element_ty), mask=i < K)
        has_new = split == 0
        top = tl.where(has_new, tl.sum(q * k, 0), -1e30)
        total, mean = tl.where(has_new, 1.0, 0.0), tl.where(has_new, v, 0.0)
        for start in range(split * BLOCK, at, SPLITS * BLOCK):
            step, k_SK, v_SK = start + tl.arange(0, BLOCK), next_k, next_v
            next_k = load_tile(keys + kept, step + SPLITS * BLOCK, at, i, K)
            next_v = load_tile(values + kept, step + SPLITS * BLOCK, at, i, K)
            score = tl.where(step < at, tl.sum(q[None, :] * k_SK, 1), -float("inf"))
            new_top = tl.maximum(top, tl.max(score, 0))
            share, old = tl.exp(score - new_top), tl.exp(top - new_top)
            total = total * old + tl.sum(share, 0)
            mean = mean * old + tl.sum(share[:, None] * v_SK, 0)
            top = new_top
        total = tl.where(total == 0, 1.0, total)  # no position: `top` says that it doesn't count
        of_head = split * tl.num_programs(0) + head
        tl.store(y + of_head * K + i, (mean / total).to(y.dtype.element_ty), mask=i < K)
        tl.store(lse + of_head, top + tl.log(total))

    @triton.jit
    def output_kernel(
        y, lse, W, x, N, C: tl.constexpr, H: tl.constexpr, SPLITS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """x += W y, where y is the mean of the splits, weighted with softmax(lse)."""
        row, split = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SPLITS)[:, None]
        total, column = tl.zeros((ROWS, COLUMNS), tl.float32), tl.arange(0, COLUMNS)
        w = load_tile(W, row, N, column, C)
        wait(EARLY)
        for start in tl.static_range(0, C, COLUMNS):
            if start > 0:
                column = start + tl.arange(0, COLUMNS)
                w = load_tile(W, row, N, column, C)
            inside = (column < C)[None, :]
            logs = tl.load(lse + split * H + column[None, :] // (C // H), mask=inside, other=0)
            share = tl.exp(logs - tl.max(logs, 0)[None, :])
            value = tl.load(y + split * C + column[None, :], mask=inside, other=0)
            total += w * (tl.sum(share * value, 0) / tl.sum(share, 0))[None, :]
        result = tl.load(x + row, mask=row < N, other=0) + tl.sum(total, 1)
        tl.store(x + row, result, mask=row < N)

    @triton.jit
    def add_and_route_kernel(
        x, added, norm, h, W, experts, weights, N, eps,
        D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, EB: tl.constexpr,
        A: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """One program: a row. As lamoe.py does, it rounds h before it looks for experts."""
        n, i, e = tl.program_id(0), tl.arange(0, DP), tl.arange(0, EP)
        g = tl.load(norm + i, mask=i < D, other=0).to(tl.float32)
        part = tl.arange(0, EB)
        if A > 0:
            w = load_tile(W, part, E, i, D)
        wait(EARLY)
        value = tl.load(x + n * D + i, mask=i < D, other=0)
        for k in tl.static_range(ADDED):
            value += tl.load(added + (k * N + n) * D + i, mask=i < D, other=0).to(tl.float32)
        if ADDED > 0:
            tl.store(x + n * D + i, value, mask=i < D)
        value *= tl.rsqrt(tl.sum(value * value, 0) / D + eps) * g
        value = value.to(h.dtype.element_ty)
        tl.store(h + n * D + i, value, mask=i < D)
        if A > 0:
            score = tl.full((EP,), -float("inf"), tl.float32)
            for first in tl.static_range(0, E, EB):
                if first > 0:
                    w = load_tile(W, first + part, E, i, D)
                logit = tl.sum(w * value.to(tl.float32)[None, :], 1)
                is_it = (e[:, None] == first + part[None, :]) & (e < E)[:, None]
                here = (e >= first) & (e < first + EB) & (e < E)
                score = tl.where(here, tl.sum(tl.where(is_it, logit[None, :], 0.0), 1), score)
            top, chosen = tl.max(score, 0), tl.zeros((EP,), tl.float32)
            for a in tl.static_range(A):
                best = tl.argmax(score, 0)
                tl.store(experts + n * A + a, best.to(tl.int64))
                chosen = tl.where(e == best, tl.exp(score - top), chosen)
                score = tl.where(e == best, -float("inf"), score)
            tl.store(weights + n * E + e, chosen / tl.sum(chosen, 0), mask=e < E)

    @triton.jit
    def gate_up_kernel(
        h, W, experts, weights, u, F,
        D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """u = weight * silu(gate) * up, of one chosen expert."""
        a, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        gate, up = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
        wait(EARLY)  # down_kernel begins after it: when the experts are known
        expert = tl.load(experts + a)
        weight, W = tl.load(weights + expert), W + expert * (2 * F * D)
        for start in tl.static_range(0, D, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            w_gate = load_tile(W, row, F, column, D)
            w_up = load_tile(W + F.to(tl.int64) * D, row, F, column, D)
            value = tl.load(h + column, mask=column < D, other=0).to(tl.float32)
            gate += w_gate * value[None, :]
            up += w_up * value[None, :]
        total = tl.sum(gate, 1)
        total = weight * total * tl.sigmoid(total) * tl.sum(up, 1)
        tl.store(u + a * F + row, total, mask=row < F)

    @triton.jit
    def down_kernel(
        u, W, experts, x, N, F: tl.constexpr, A: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """x += the sum of the chosen experts, which are known since two kernels ago."""
        row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        of_expert = W + tl.load(experts, cache_modifier=".cg") * (N * F)
        w = load_tile(of_expert, row, N, column, F)
        wait(EARLY)
        for a in tl.static_range(A):
            if a > 0:
                of_expert = W + tl.load(experts + a) * (N * F)
            for start in tl.static_range(0, F, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                if a + start > 0:
                    w = load_tile(of_expert, row, N, column, F)
                value = tl.load(u + a * F + column, mask=column < F, other=0)
                total += w * value[None, :]
        result = tl.load(x + row, mask=row < N, other=0) + tl.sum(total, 1)
        tl.store(x + row, result, mask=row < N)

    @triton.jit
    def swiglu_kernel(gate_up, weights, u, F, BLOCK: tl.constexpr):
        """u = weight * silu(gate) * up, of one row and expert."""
        pair = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(gate_up + pair * 2 * F + column, mask=column < F, other=0).to(tl.float32)
        up = tl.load(gate_up + pair * 2 * F + F + column, mask=column < F, other=0).to(tl.float32)
        value = tl.load(weights + pair) * gate * tl.sigmoid(gate) * up
        tl.store(u + pair * F + column, value.to(u.dtype.element_ty), mask=column < F)

    @triton.jit
    def draw_kernel(logits, noise, ids, V, temperature, log_min_p, BLOCK: tl.constexpr):
        """One program: a row. p / noise is largest where log p - log noise is."""
        row = tl.program_id(0).to(tl.int64)
        top = tl.full((BLOCK,), -float("inf"), tl.float32)
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            value = tl.load(logits + row * V + i, mask=i < V, other=-float("inf"))
            top = tl.maximum(top, value.to(tl.float32) / temperature)
        least = tl.max(top, 0) + log_min_p
        best, first = tl.full((BLOCK,), -float("inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            value = tl.load(logits + row * V + i, mask=i < V, other=-float("inf"))
            value = value.to(tl.float32) / temperature
            late = tl.log(tl.maximum(tl.load(noise + row * V + i, mask=i < V, other=1.0), 1e-30))
            is_best = (value >= least) & (value - late > best)
            best, first = tl.where(is_best, value - late, best), tl.where(is_best, i, first)
        found = tl.min(tl.where(best == tl.max(best, 0), first, V), 0)
        tl.store(ids + row, found.to(tl.int64))
