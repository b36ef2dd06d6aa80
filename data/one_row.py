"""One text at a time on a CPU, in fp32: the step of lamoe.py written out for a single row.

The model's own code is for any batch and slow with one row, for two reasons. Every operator takes a
microsecond or two, however small its vectors, and a token of the default model is 246 of them; here
it is 107. And torch's library (MKL) multiplies a matrix by one row at a third of the speed at which
memory is read, with one thread; `times_row` does it at that speed, with two.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import lamoe
from data.run.machine import has_compiler
from data.run.routers import with_built_in

OURS = lamoe.Block, lamoe.Attention, lamoe.MoE, lamoe.SwiGLU, lamoe.RMSNorm
FORWARDS = {part.forward for part in (*OURS, nn.Module, nn.Linear, nn.Identity)}
TRIED: dict[tuple, bool] = {}  # see repeats_forward
LARGE = 2**18  # numbers in a matrix: below, two threads take longer to meet than to multiply


def halves(weight: Tensor) -> Tensor:
    """A matrix as a batch of its upper and lower half, (2, N, D); (1, N, D) if it has no half."""
    return weight.detach().view(math.gcd(len(weight), 2), -1, weight.shape[-1])


def times_row(W_2ND: Tensor, x: Tensor, plus: Tensor | None = None, scale=1.0, threads=1) -> Tensor:
    """W x, (2, N, 1); or plus + scale * W x, in the shape of `plus`.

    A batch of two products has code of its own in MKL, the fast one if x has the strides of a
    transposed row. With those of x.view(-1, 1) it takes ten times as long.
    """
    D, is_large = x.numel(), threads > 1 and W_2ND.numel() > LARGE
    x_2D1 = x.as_strided((len(W_2ND), D, 1), (0, 1, D))
    if is_large:
        torch.set_num_threads(threads)
    if plus is None:
        y = torch.bmm(W_2ND, x_2D1)
    else:
        y = torch.baddbmm(plus.view(len(W_2ND), -1, 1), W_2ND, x_2D1, alpha=scale).view_as(plus)
    if is_large:
        torch.set_num_threads(1)
    return y


def norm_rows(x_R1K: Tensor, weight: Tensor, eps_1: Tensor) -> Tensor:
    """RMSNorm of each row: its sum of squares is a product, too."""
    scale_R11 = torch.baddbmm(eps_1, x_R1K, x_R1K.mT, alpha=1 / x_R1K.shape[-1]).rsqrt_()
    return x_R1K * weight * scale_R11


def is_hooked(part: nn.Module) -> bool:
    """Whether this part has a hook, or a forward of its own."""
    return bool(part._forward_hooks or part._forward_pre_hooks) or "forward" in vars(part)


def is_as_made(model: lamoe.LaMoE) -> bool:
    """Whether weights tell what each part does: none was replaced or parametrized (as adapters do),
    has a bias, a hook or a forward of its own. What is written out would pass all that by.
    """
    for path, part in (*model.blocks.named_modules(), ("norm", model.norm), ("head", model.head)):
        is_other = type(part).forward not in FORWARDS or getattr(part, "bias", None) is not None
        if is_other and "router" not in path.split("."):  # another router is asked itself
            return False
        if is_hooked(part):
            return False
    return True


def way_to_write(model: lamoe.LaMoE) -> str:
    """The fastest step that computes what model.forward does: "row", this file's, where weights
    tell it all; "run", lamoe.py's; or "forward" itself, where that was changed, and they were not.
    """
    of_class = type(model).forward, type(model).predict
    is_other = of_class != (lamoe.LaMoE.forward, lamoe.LaMoE.predict)
    is_other |= is_hooked(model) or "predict" in vars(model)
    if is_other or not repeats_forward(model.config, "run"):
        return "forward"
    return "row" if is_as_made(model) and repeats_forward(model.config, "run_row") else "run"


def repeats_forward(c: lamoe.Config, way: str) -> bool:
    """`tried`, once for each config and state of lamoe.py's code. One of three models must agree:
    rounding may have changed which expert was chosen.
    """
    parts = (part for name, part in vars(lamoe).items() if callable(part) and name != "Step")
    key = repr(c), way, *((part, getattr(part, "forward", None)) for part in parts)
    if key not in TRIED:
        TRIED[key] = any(tried(c, way, seed) for seed in range(3))
    return TRIED[key]


@torch.no_grad()
def tried(c: lamoe.Config, way: str, seed: int) -> bool:
    """Whether a step with RowStep's method `way` has the logits of forward, in a small model of
    this config with random weights. Who changes lamoe.py, an activation, say, changes forward.
    """
    sizes = {"dim": 4 * c.n_heads, "head_dim": c.head_dim and 4, "hidden_dim": 4, "vocab_size": 16}
    sizes |= {"n_layers": min(c.n_layers, c.n_dense_layers + 4), "eval_capacity_factor": None}
    generator, same_random_numbers = torch.Generator().manual_seed(seed), torch.random.fork_rng([])
    with same_random_numbers, torch.device("cpu"), torch.autocast("cpu", enabled=False):
        model = lamoe.LaMoE(dataclasses.replace(with_built_in(c), **sizes)).float().eval()
        for weight in model.parameters():
            scale = 1 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
        ids_1T = torch.randint(16, (1, min(c.seq_len, 64)), generator=generator)
        last_1V, logits = model(ids_1T).logits[:, -1], []
        step = RowStep(model, 1, c.seq_len, (0.0,), 1.0, None)
        if ids_1T.shape[1] > 1:
            super(RowStep, step).read(ids_1T[:, :-1])
        step.ids_B1, step.pick = ids_1T[:, -1:], lambda logits_BV, ids_BT: logits.append(logits_BV)
        try:
            step.take_apart()
            getattr(step, way)()
        except (AttributeError, TypeError, ValueError, RuntimeError):  # parts of other shapes
            return False
    return torch.allclose(logits[0], last_1V, rtol=1e-3, atol=1e-3 * last_1V.abs().max().item())


class Layer:
    """A block's weights: views, but for those of q, k and v as one matrix."""

    def __init__(self, block: lamoe.Block, c: lamoe.Config):
        attn, ffn = block.attn, block.ffn
        self.norms = block.attn_norm.weight.detach(), block.ffn_norm.weight.detach()
        self.qkv = halves(torch.cat((attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)))
        self.o = halves(attn.o_proj.weight)
        if c.qk_norm:  # a weight for each head
            weights = [attn.q_norm.weight] * c.n_heads + [attn.k_norm.weight] * c.n_kv_heads
            self.qk_norm_R1K = torch.stack(weights)[:, None].detach()
        is_sparse = isinstance(ffn, lamoe.MoE)
        self.router, always = (ffn.router, ffn.shared) if is_sparse else (None, ffn)
        stacks = zip(*ffn.experts.parameters(), strict=True) if is_sparse else ()
        self.experts = [[halves(weight) for weight in pair] for pair in stacks]
        self.always = [([halves(p) for p in always.parameters()], 1.0)] if always else []
        is_topk = type(self.router) in (lamoe.TopK, lamoe.Noisy)  # in evaluation the same
        self.topk = halves(self.router.weight) if is_topk else None

    def chosen(self, h_11D: Tensor, ids_11: Tensor) -> list[tuple]:
        """((gate_up, down), weight) of each expert that counts for this token."""
        if self.router is None:
            return self.always
        if self.topk is None:
            experts_1A, weights_1A, *_ = self.router(h_11D, ids_11)
        else:
            logits_1E = times_row(self.topk, h_11D).view(1, -1)
            logits_1A, experts_1A = logits_1E.topk(self.router.config.top_k)
            weights_1A = logits_1A.softmax(-1)
        pairs = zip(experts_1A[0].tolist(), weights_1A[0].tolist(), strict=True)
        return [(self.experts[e], weight) for e, weight in pairs if weight] + self.always


def on_one_thread(step: Callable) -> Callable:
    """A step of small operators. torch would give many of them to all threads, which gains nothing;
    and beside a process that has one of two cores, the default model would take ten times as long.
    """

    def alone() -> None:
        n = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            step()
        finally:
            torch.set_num_threads(n)

    return alone


class RowStep(lamoe.Step):
    """lamoe.Step, whose `next` is this file's where that is faster."""

    def compile(self) -> None:
        """On an NVIDIA card few kernels of our own, where they fit; else the compiler's, if any."""
        from data import gpu_step  # here: importing Triton takes a second

        way = way_to_write(self.model)
        if self.position.is_cuda and way == "row" and gpu_step.covers(self):
            self.next = gpu_step.FewKernels(self)
        elif way != "forward" and has_compiler(self.position.device.type):
            super().compile()

    def capture(self) -> None:
        if way_to_write(self.model) != "forward":  # else there is nothing to capture
            super().capture()

    def read(self, ids_BT: Tensor) -> None:
        super().read(ids_BT)
        m = self.model
        way = way_to_write(m) if self.next == self.run else "compiled"
        if way == "forward":
            self.next = self.run_forward
        if len(ids_BT) > 1 or ids_BT.device.type != "cpu":
            return
        if way == "row" and self.dtype == torch.float32:
            self.take_apart()
            self.next = self.run_row
        self.threads = torch.get_num_threads()
        if self.next == self.run_row or m.config.dim < 256:  # run_row takes more, where it pays
            self.next = on_one_thread(self.next)

    def take_apart(self) -> None:
        """What run_row needs of the model."""
        m, c = self.model, self.model.config
        self.layers, self.threads = [Layer(block, c) for block in m.blocks], 1
        self.norm, self.head = m.norm.weight.detach(), halves(m.head.weight)
        self.zero_1, self.eps_1 = torch.zeros(1), torch.tensor([c.norm_eps])
        self.eye_KK = torch.eye(c.head_size)
        left, right = self.eye_KK.chunk(2, dim=-1)
        # Turns each pair by 90 degrees; not by apply_rope, so that `tried` sees a change of that.
        self.quarter_KK = torch.cat((-right, left), dim=-1)

    def run_forward(self) -> None:
        """`run`, for a model that others changed: by its own forward."""
        self.pick(self.model(self.ids_B1, cache=self.cache).logits[:, -1], self.ids_B1)
        self.position += 1

    def run_row(self) -> None:
        """`run`, for one row."""
        m, c, at, S = self.model, self.model.config, self.position, self.cache.length + 1
        heads, G, K = (c.n_heads, c.n_kv_heads), c.n_kv_heads, c.head_size
        product = partial(times_row, threads=self.threads)
        turn_KK = self.eye_KK * m.cos[S - 1] + self.quarter_KK * m.sin[S - 1]  # x turned: x @ turn
        x_11D, self.cache.length = m.embed(self.ids_B1).detach(), S
        for layer, (k_1GSK, v_1GSK) in zip(self.layers, self.cache.layers, strict=True):
            h_11D = norm_rows(x_11D, layer.norms[0], self.eps_1)
            qk_R1K, v_G1K = product(layer.qkv, h_11D).view(-1, 1, K).split((sum(heads), G))
            if c.qk_norm:
                qk_R1K = norm_rows(qk_R1K, layer.qk_norm_R1K, self.eps_1)
            q_HK, k_GK = (qk_R1K[:, 0] @ turn_KK).split(heads)
            k_GSK = k_1GSK[0].index_copy_(1, at, k_GK[:, None]).narrow(1, 0, S)
            v_GSK = v_1GSK[0].index_copy_(1, at, v_G1K).narrow(1, 0, S)
            q_GRK = q_HK.view(G, -1, K)
            scores_GRS = torch.baddbmm(self.zero_1, q_GRK, k_GSK.mT, alpha=K**-0.5)
            x_11D = product(layer.o, torch.bmm(scores_GRS.softmax(-1), v_GSK), plus=x_11D)
            h_11D = norm_rows(x_11D, layer.norms[1], self.eps_1)
            for (gate_up, down), weight in layer.chosen(h_11D, self.ids_B1):
                gate_F1, up_F1 = product(gate_up, h_11D).unbind()
                x_11D = product(down, silu(gate_F1) * up_F1, plus=x_11D, scale=weight)
        h_11D = norm_rows(x_11D, self.norm, self.eps_1)
        self.pick(product(self.head, h_11D).view(1, -1), self.ids_B1)
        self.position += 1


def use() -> None:
    """Lets lamoe.py write single texts with this file from now on."""
    lamoe.Step = RowStep
