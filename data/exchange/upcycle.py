"""A dense model made sparse: its feed-forward layers become experts (Komatsuzaki et al. 2022).

    python train.py --init DENSE_FOLDER --n_experts 8 --data book.txt

Every expert begins as a copy of the layer [arXiv:2212.05055], and the weights over those chosen sum
to 1: whatever a new router says, the sparse model computes what the dense one did, and training
starts at its loss. With a smaller --hidden_dim experts are slices: see `expert_weights`.
"""

import torch
from torch import Tensor

import lamoe
from data.run import ranks
from data.run.log import print_line


def weights_from(init: lamoe.LaMoE, model: lamoe.LaMoE) -> dict[str, Tensor]:
    """The state dict with which `model` begins: that of init, or init made sparse.

    ValueError if the sparse model would not compute what init does.
    """
    c, F = model.config, init.config.hidden_dim
    if c.n_experts == init.config.n_experts:
        return init.state_dict()
    if not model.sparse_layers:
        raise ValueError(f"--n_dense_layers {c.n_dense_layers} leaves no experts; leave it out")
    weights = {name: w for name, w in init.state_dict().items() if ".ffn." not in name}
    for i, (block, dense) in enumerate(zip(model.blocks, init.blocks, strict=True)):
        if i in model.sparse_layers:
            new = expert_weights(dense.ffn, block.ffn)
            check_equal(dense.ffn, block.ffn, new)
        elif block.ffn.down_proj.weight.shape[1] == F:
            new = dense.ffn.state_dict()
        else:
            wide = f"{c.n_dense_layers} dense layers of top_k x hidden_dim hidden units"
            raise ValueError(f"{wide} are not the {F} there are; leave out --n_dense_layers")
        weights |= {f"blocks.{i}.ffn.{name}": weight for name, weight in new.items()}
    part = "a copy of" if F == c.hidden_dim else f"{c.hidden_dim} of"
    print_line(f"init       {c.n_experts} experts, each {part} the {F} hidden units of a layer")
    return weights


@torch.no_grad()
def expert_weights(dense: lamoe.SwiGLU, moe: lamoe.MoE) -> dict[str, Tensor]:
    """The state dict of `moe`, computing what `dense` does, with the router that it has.

    A SwiGLU is a sum over its hidden units, so it is also the sum of G slices of F/G of them (He et
    al. 2024, arXiv:2410.07524). G experts in a row are the slices of one copy. They begin with the
    same router row: they score the same, so they are chosen together, if top_k is a multiple of G,
    and each counts 1/G of what the copy does. So `down` of a slice is G times that of the layer.
    """
    E, D, F = moe.experts.down_proj.shape
    gate_up, down = dense.gate_up_proj.weight, dense.down_proj.weight
    G = down.shape[1] // F
    own = {k: w for k, w in moe.state_dict().items() if not k.startswith("experts.")}
    for name, weight in own.items():
        if name.startswith("router.") and weight.dim() > 1 and len(weight) == E:
            own[name] = weight[::G].repeat_interleave(G, 0)
    # DeepSeek-V3's weights sum to another number than 1.
    total = moe.router.eval()(*an_input(moe.router.config)).weights_NA.sum(-1).mean()
    gate_up_GFD = torch.cat(gate_up.view(2, G, F, D).unbind(), 1)  # of a slice: gate, then up
    down_GDF = down.view(D, G, F).transpose(0, 1) * (G / total)
    stacks = {"gate_up_proj": gate_up_GFD, "down_proj": down_GDF}
    copies = {k: w.expand(E // G, *w.shape).flatten(0, 1) for k, w in stacks.items()}
    return {**own, **{f"experts.{name}": weight for name, weight in copies.items()}}


def an_input(c: lamoe.Config) -> tuple[Tensor, Tensor]:
    """64 normed tokens, and ids for them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 64, c.dim, generator=generator), torch.arange(64)[None] % c.vocab_size


@torch.no_grad()
def check_equal(dense: lamoe.SwiGLU, moe: lamoe.MoE, weights: dict[str, Tensor]) -> None:
    """ValueError unless `moe` with these weights computes what `dense` does.

    It doesn't where weights do not sum to the same for each token (switch, expert choice), or where
    noise or groups take some of a copy's slices without the others.
    """
    moe.load_state_dict(weights)
    x_BTD, ids_BT = an_input(moe.router.config)
    expected, difference = dense(x_BTD), 0.0
    with torch.random.fork_rng(devices=[]):
        for training in (False, True) if ranks.WORLD == 1 else (False,):  # else it would average
            y_BTD, _ = moe.train(training)(x_BTD, ids_BT)
            difference = max(difference, (y_BTD - expected).abs().max().item())
    moe.train()
    if not difference <= 1e-4 * expected.abs().max().item():
        router = moe.router.config.router
        raise ValueError(
            f"experts with router={router!r} do not begin as the dense model; try --router topk"
        )
