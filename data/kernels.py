"""Experts and routers on an NVIDIA card, trained faster: lamoe.run_grouped, lamoe.Router.logits.

torch.compile makes two kernels of SwiGLU's backward, one for the gradients of gate and up, one for
that of a row's weight, a sum along the row; each reads gate and up. The kernel below, in Triton,
which comes with torch for these cards, does both, and reads and writes each number once.

A router's product in fp32 doesn't use the card's matrix units, and first writes its input in fp32.
The one below is in bf16; its error is 4e-6 where logits are up to 5, that of fp32 is 1e-6.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

import lamoe

try:
    import triton
    import triton.language as tl

    can_run = torch.cuda.is_available()
except ImportError:  # torch for a CPU or a Mac
    can_run = False


class GroupedExperts(torch.autograd.Function):
    """lamoe.run_grouped; h is kept for the backward instead of being computed anew."""

    @staticmethod
    def forward(ctx, x_PD, weight_P1, gate_up, down, ends_E):
        gate_up_P2F = grouped_mm(x_PD, gate_up.mT, offs=ends_E)
        h_PF = lamoe.swiglu(gate_up_P2F) * weight_P1
        ctx.save_for_backward(x_PD, weight_P1, gate_up, down, ends_E, gate_up_P2F, h_PF)
        return grouped_mm(h_PF, down.mT, offs=ends_E)

    @staticmethod
    def backward(ctx, dy_PD):
        x_PD, weight_P1, gate_up, down, ends_E, gate_up_P2F, h_PF = ctx.saved_tensors
        dh_PF = grouped_mm(dy_PD, down, offs=ends_E)
        grad = swiglu_grad_on_gpu if dh_PF.is_cuda else swiglu_grad
        d_gate_up_P2F, d_weight_P1 = grad(dh_PF, gate_up_P2F, weight_P1)
        dx_PD = grouped_mm(d_gate_up_P2F, gate_up, offs=ends_E)
        d_gate_up = grouped_mm(d_gate_up_P2F.mT, x_PD, offs=ends_E)
        d_down = grouped_mm(dy_PD.mT, h_PF, offs=ends_E)
        return dx_PD, d_weight_P1, d_gate_up, d_down, None


def run_grouped(x_PD: Tensor, *others: Tensor) -> Tensor:
    """What lamoe.run_grouped returns."""
    return (GroupedExperts.apply if x_PD.is_cuda else plain_run_grouped)(x_PD, *others)


def swiglu_grad(dh_PF: Tensor, gate_up_P2F: Tensor, weight_P1: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate_up and of weight, where h = weight * swiglu(gate_up)."""
    gate, up = gate_up_P2F.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_weight_P1 = (dh_PF * silu * up).sum(-1, keepdim=True)
    d_swiglu = dh_PF * weight_P1
    d_gate, d_up = d_swiglu * up * (sigmoid + silu * (1 - sigmoid)), d_swiglu * silu
    return torch.cat((d_gate, d_up), dim=-1), d_weight_P1


class RouterLogits(torch.autograd.Function):
    """x W^T in fp32, for x in bf16: W is the sum of three matrices in bf16. One product with all of
    them does it, which adds up in fp32, where the product of two numbers in bf16 is exact."""

    @staticmethod
    def forward(ctx, x_ND, weight_ED):
        ctx.save_for_backward(x_ND, weight_ED)
        parts_3ED = torch.cat(in_three(weight_ED))
        logits_N3E = torch.mm(x_ND, parts_3ED.mT, out_dtype=torch.float32)
        return logits_N3E.unflatten(1, (3, -1)).sum(1)

    @staticmethod
    def backward(ctx, grad_NE):  # in bf16, as for all weights: no choice depends on it
        x_ND, weight_ED = ctx.saved_tensors
        grad_NE = grad_NE.to(x_ND.dtype)
        return grad_NE @ weight_ED.to(x_ND.dtype), (grad_NE.mT @ x_ND).float()


def in_three(x: Tensor) -> list[Tensor]:
    """Three tensors in bf16 whose sum is x, each with 8 of its 24 bits. Cut by masks: compiled code
    leaves out a rounding to bf16 and back."""
    parts = []
    for _ in range(3):
        parts.append((x.view(torch.int32) & -(1 << 16)).view(torch.float32))
        x = x - parts[-1]
    return [part.bfloat16() for part in parts]


def logits(router: lamoe.Router, x_BTD: Tensor, weight_ED: Tensor | None = None) -> Tensor:
    """What lamoe.Router.logits returns."""
    weight_ED = router.weight if weight_ED is None else weight_ED
    if not (x_BTD.is_cuda and x_BTD.dtype == torch.bfloat16 and weight_ED.dtype == torch.float32):
        return plain_logits(router, x_BTD, weight_ED)
    with torch.autocast("cuda", enabled=False):
        return RouterLogits.apply(x_BTD.flatten(0, -2), weight_ED)


plain_run_grouped, plain_logits = lamoe.run_grouped, lamoe.Router.logits


def is_as_written() -> bool:
    """Whether what is here has the values and gradients of lamoe.py, which a user may have changed:
    a backward of SwiGLU's would give another activation wrong gradients, and no sign of it."""
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 4), (6, 1), (2, 16, 4), (2, 4, 8)  # two experts of 8, three rows each
    with torch.enable_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        parts = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        ends_E, results = torch.tensor([3, 6], dtype=torch.int32), []
        try:
            for run in (plain_run_grouped, GroupedExperts.apply):
                y = run(*parts, ends_E)
                results.append([y, *torch.autograd.grad(y.square().sum(), parts)])
            x_ND, weight_ED = parts[0], parts[2][0]
            router = lamoe.TopK(lamoe.Config(16, dim=4, n_heads=2, n_experts=16))
            results[0].append(plain_logits(router, x_ND[None], weight_ED))
            results[1].append(x_ND @ weight_ED.T)
        except (AttributeError, TypeError, ValueError, RuntimeError):  # of other shapes
            return False
    pairs = zip(*results, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-4) for a, b in pairs)


def use() -> bool:
    """Lets lamoe.py train with this file from now on, where Triton is; whether it does."""
    if can_run and lamoe.run_grouped is not run_grouped and is_as_written():
        lamoe.run_grouped, lamoe.Router.logits = run_grouped, logits
    return lamoe.run_grouped is run_grouped


if can_run:

    def swiglu_grad_on_gpu(dh_PF: Tensor, gate_up_P2F: Tensor, weight_P1: Tensor):
        """swiglu_grad at 2.9 of the 3.0 TB/s that an H100 copies."""
        P, F = dh_PF.shape
        d_gate_up_P2F, d_weight_P1 = torch.empty_like(gate_up_P2F), torch.empty_like(weight_P1)
        swiglu_grad_kernel[(triton.cdiv(P, 8),)](
            dh_PF, gate_up_P2F, weight_P1, d_gate_up_P2F, d_weight_P1, P, F, ROWS=8, COLUMNS=128
        )
        return d_gate_up_P2F, d_weight_P1

    @triton.jit
    def swiglu_grad_kernel(
        dh, gate_up, weight, d_gate_up, d_weight,
        P, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """One program: ROWS rows, COLUMNS hidden units at a time."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row_1 = row[:, None].to(tl.int64)  # a number's address can be above 2^31
        row_weight = tl.load(weight + row, mask=row < P, other=0).to(tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for start in tl.static_range(0, F, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            here = (row < P)[:, None] & (column < F)
            at = row_1 * (2 * F) + column
            d = tl.load(dh + row_1 * F + column, mask=here, other=0).to(tl.float32)
            gate = tl.load(gate_up + at, mask=here, other=0).to(tl.float32)
            up = tl.load(gate_up + at + F, mask=here, other=0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            total += tl.sum(d * silu * up, 1)
            d *= row_weight[:, None]
            d_gate = d * up * (sigmoid + silu * (1 - sigmoid))
            tl.store(d_gate_up + at, d_gate.to(d_gate_up.dtype.element_ty), mask=here)
            tl.store(d_gate_up + at + F, (d * silu).to(d_gate_up.dtype.element_ty), mask=here)
        tl.store(d_weight + row, total.to(d_weight.dtype.element_ty), mask=row < P)
