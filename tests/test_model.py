"""The decoder around the experts: attention, cache, causality, generation, counting, files."""

import dataclasses
import math
import os
import pickle
import re
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROUTERS,
    assert_close,
    attention_shapes,
    explicit_attention,
    explicit_swiglu,
    loop_over_experts,
    random_ids,
    random_model,
    randomise,
    seeds,
    small_config,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import bpe
import lamoe
from data import exchange
from data.run import checkpoint as checkpoints


def spy_on(function, calls):
    """`function`, which now also notes the arguments of each call."""
    return lambda *args: (calls.append(args), function(*args))[1]


# ---------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake, field, remedy",
    [
        (dict(vocab_size=0), "vocab_size=0", "at least 1"),
        (dict(n_layers=0), "n_layers=0", "at least 1"),
        (dict(n_heads=0), "n_heads=0", "at least 1"),
        (dict(n_experts=0), "n_experts=0", "at least 1"),
        (dict(top_k=0), "top_k=0", "at least 1"),
        (dict(seq_len=-1), "seq_len=-1", "at least 1"),
        (dict(head_dim=-2), "head_dim=-2", "try head_dim=2"),
        (dict(dim=100, n_heads=8, n_kv_heads=8), "dim=100", "try dim=96 or dim="),
        (dict(dim=5, n_heads=8, n_kv_heads=8), "dim=5", "try dim="),
        (dict(n_heads=4, n_kv_heads=3), "n_kv_heads=3", "try n_kv_heads from [1, 2, 4]"),
        (dict(dim=12, n_heads=4, n_kv_heads=4), "dim=12", "try dim=8 or dim=16"),
        (dict(head_dim=7), "head_dim=7", "try head_dim=8"),
        (dict(n_experts=4, top_k=5), "top_k=5", "try top_k=4"),
        (dict(router="tpok"), "router='tpok'", "topk"),
    ],
)
def test_config_mistakes_name_the_field_and_a_remedy(mistake, field, remedy):
    with pytest.raises(ValueError, match=f"{re.escape(field)}.*{re.escape(remedy)}"):
        lamoe.Config(**{"vocab_size": 9, **mistake})


@pytest.mark.parametrize(
    "mistake",
    [
        dict(dim=100, n_heads=8, n_kv_heads=8),
        dict(dim=5, n_heads=8, n_kv_heads=8),
        dict(dim=12, n_heads=4, n_kv_heads=4),
        dict(head_dim=7),
        dict(head_dim=-2),
        dict(n_experts=4, top_k=5),
    ],
)
def test_config_remedies_work(mistake):
    """What an error message tells the user to try must not be the next error."""
    with pytest.raises(ValueError) as error:
        lamoe.Config(**{"vocab_size": 9, **mistake})
    remedies = re.findall(r"(\w+)=(\d+)", str(error.value).split("; try ")[1])
    assert remedies
    for field, value in remedies:
        lamoe.Config(**{"vocab_size": 9, **mistake, field: int(value)})


def test_config_allows_any_top_k_for_a_dense_model():
    """So that the dense baseline is one flag, --n_experts 1, away."""
    assert lamoe.Config(vocab_size=9, n_experts=1, top_k=2).n_experts == 1


def test_a_subclass_of_config_has_fields_of_its_own():
    """Of whatever type, written as a string too, as under `from __future__ import annotations`."""

    @dataclasses.dataclass(frozen=True)
    class Mine(lamoe.Config):
        n_registers: "int" = 0
        kinds: list[str] = dataclasses.field(default_factory=list)

    assert Mine(9, kinds=["a"]).n_registers == 0
    with pytest.raises(ValueError, match="n_layers=0"):
        Mine(9, n_layers=0)


# ---------------------------------------------------------------------------------------------
# RMSNorm and RoPE
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e3])
def test_rmsnorm_equals_its_formula(size):
    """At 1e-3 eps is as large as the mean square: outside the root it would give another value."""
    norm = lamoe.RMSNorm(6, eps=1e-6)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.0])
    x = size * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    rows = [[v / math.sqrt(sum(u * u for u in row) / 6 + 1e-6) for v in row] for row in x.tolist()]
    assert_close(norm(x), torch.tensor(rows) * norm.weight, 1e-6)


def test_rmsnorm_works_in_fp32_inside():
    """x^2 in bf16 loses most digits. Only the result may be rounded."""
    norm = randomise(lamoe.RMSNorm(64, eps=1e-5))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


@given(
    K=st.sampled_from([2, 4, 10]),
    theta=st.sampled_from([100.0, 10_000.0, 500_000.0]),
    start=st.integers(0, 40),
)
def test_rope_turns_pairs_of_halves_as_complex_numbers(K, theta, start):
    """Pair (i, i + K/2) is one complex number times exp(i * position * theta^(-2i/K))."""
    x_BHTK = torch.randn(2, 3, 5, K, generator=torch.Generator().manual_seed(K))
    cos, sin = (table[start : start + 5] for table in lamoe.rope_table(K, 64, theta))
    pairs = torch.complex(*x_BHTK.double().chunk(2, dim=-1))
    for t in range(5):
        for i in range(K // 2):
            angle = torch.tensor((start + t) * theta ** (-2 * i / K), dtype=torch.float64)
            pairs[:, :, t, i] *= torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    assert_close(lamoe.apply_rope(x_BHTK, cos, sin), expected, 1e-5)


@given(t=st.integers(0, 30), s=st.integers(0, 30), shift=st.integers(0, 33), seed=seeds)
def test_rotated_products_depend_on_the_distance_alone(t, s, shift, seed):
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed))
    cos, sin = lamoe.rope_table(8, 64, 10_000.0)

    def product(t, s):
        return (lamoe.apply_rope(q, cos[t], sin[t]) * lamoe.apply_rope(k, cos[s], sin[s])).sum()

    assert math.isclose(product(t, s), product(t + shift, s + shift), abs_tol=1e-4)


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def random_qkv(B, T, H, G, K, past, seed, dtype=torch.float32):
    """Large enough that the softmax is far from uniform, so a wrong scale shows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, K), (B, G, past + T, K), (B, G, past + T, K)]
    return [2 * torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)]
)
@given(shape=attention_shapes(), seed=seeds)
@example(shape=(2, 5, 4, 2, 6, 0), seed=0)  # training or prefill
@example(shape=(2, 1, 4, 2, 6, 5), seed=0)  # one step with a cache
@example(shape=(2, 3, 4, 2, 6, 5), seed=0)  # several steps at once
def test_gqa_equals_attention_with_repeated_heads(dtype, tolerance, shape, seed):
    q, k, v = random_qkv(*shape, seed, dtype)
    for attention in (lamoe.plain_attention, lamoe.fused_attention):
        ours = attention(q, k, v)
        assert ours.dtype == dtype
        assert_close(ours, explicit_attention(q.double(), k.double(), v.double()), tolerance)


@given(shape=attention_shapes(), seed=seeds)
def test_plain_attention_in_bf16_equals_sdpa(shape, seed):
    """On a CPU bf16 takes three lines of our own instead of torch's kernel; gradients too."""
    T, H, past = shape[1], shape[2], shape[5]
    ours = [x.requires_grad_() for x in random_qkv(*shape, seed, torch.bfloat16)]
    exact = [x.detach().float().requires_grad_() for x in ours]
    k, v = (x.repeat_interleave(H // shape[3], dim=1) for x in exact[1:])
    mask_TS = torch.ones(T, past + T, dtype=torch.bool).tril(past)
    y, y_exact = (
        lamoe.plain_attention(*ours),
        F.scaled_dot_product_attention(exact[0], k, v, mask_TS),
    )
    assert_close(y, y_exact, 3e-2)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((y * upstream).sum(), ours)
    for ours, expected in zip(
        grads, torch.autograd.grad((y_exact * upstream).sum(), exact), strict=True
    ):
        assert_close(ours, expected, 6e-2)


# ---------------------------------------------------------------------------------------------
# The whole model against itself written plainly
# ---------------------------------------------------------------------------------------------


def explicit_logits(model, ids_BT):
    """LaMoE.forward without a cache, from the weights alone, in float64."""
    c, w = model.config, {name: p.detach().double() for name, p in model.state_dict().items()}

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]

    def heads(x, block, kind):
        x = (x @ w[f"{block}.attn.{kind}_proj.weight"].T).view(*ids_BT.shape, -1, c.head_size)
        if c.qk_norm and kind != "v":
            x = norm(x, f"{block}.attn.{kind}_norm.weight")
        return x.transpose(1, 2)

    def turn(x):  # pairs as complex numbers
        wavelengths = c.rope_theta ** (-torch.arange(0, c.head_size, 2).double() / c.head_size)
        angles = torch.arange(ids_BT.shape[1])[:, None] * wavelengths
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    def feed_forward(x, block):
        if c.n_experts == 1:
            names = (f"{block}.ffn.{kind}_proj.weight" for kind in ("gate_up", "down"))
            return explicit_swiglu(x, *(w[name] for name in names))
        top = (x @ w[f"{block}.ffn.router.weight"].T).topk(c.top_k)
        kinds = (w[f"{block}.ffn.experts.{kind}_proj"] for kind in ("gate_up", "down"))
        return loop_over_experts(x, top.indices, top.values.softmax(-1), *kinds)

    x_BTD = w["embed.weight"][ids_BT]
    for block in (f"blocks.{i}" for i in range(c.n_layers)):
        x = norm(x_BTD, f"{block}.attn_norm.weight")
        q, k, v = (heads(x, block, kind) for kind in "qkv")
        y = explicit_attention(turn(q), turn(k), v).transpose(1, 2).flatten(2)
        x_BTD = x_BTD + y @ w[f"{block}.attn.o_proj.weight"].T
        x = norm(x_BTD, f"{block}.ffn_norm.weight").flatten(0, 1)
        x_BTD = x_BTD + feed_forward(x, block).view_as(x_BTD)
    return norm(x_BTD, "norm.weight") @ w["head.weight"].T


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(n_heads=2, n_kv_heads=1, head_dim=6, n_experts=7, top_k=3),
        dict(qk_norm=True, n_kv_heads=4, rope_theta=100.0),
        dict(tie_embeddings=True, norm_eps=0.1, n_experts=3, top_k=1),
        dict(n_experts=1, n_layers=3),
    ],
)
def test_model_equals_itself_written_plainly(changes):
    model = random_model(small_config(**changes))
    ids_BT = random_ids(model.config, 2, 16)
    assert_close(model(ids_BT).logits, explicit_logits(model, ids_BT), 2e-5)


# ---------------------------------------------------------------------------------------------
# Cache and causality
# ---------------------------------------------------------------------------------------------


def cached_logits(model, ids_BT, chunks, spare=0, dtype=torch.float32):
    """Logits of all positions, fed through a cache in pieces of the given lengths."""
    cache = lamoe.Cache(model.config, len(ids_BT), ids_BT.shape[1] + spare, dtype=dtype)
    pieces = [model(ids, cache=cache).logits for ids in ids_BT.split(chunks, dim=1)]
    assert cache.length == ids_BT.shape[1]
    return torch.cat(pieces, dim=1)


def model_of_shape(shape, seed, **changes):
    """(model, ids) whose length is what the cache held plus what is new."""
    B, T, H, G, K, past = shape
    c = small_config(n_heads=H, n_kv_heads=G, head_dim=K, **changes)
    return random_model(c, seed), random_ids(c, B, past + T, seed=seed)


@pytest.mark.parametrize("router", ROUTERS)
@given(shape=attention_shapes(), seed=seeds)
def test_cached_equals_uncached_token_by_token(router, shape, seed):
    model, ids_BT = model_of_shape(shape, seed, router=router)
    cached = cached_logits(model, ids_BT, [1] * ids_BT.shape[1])
    assert_close(cached, model(ids_BT).logits, 1e-5)


@pytest.mark.parametrize("router", ROUTERS)
@given(shape=attention_shapes(), seed=seeds, spare=st.integers(0, 3))
def test_prefill_then_steps_equals_uncached(router, shape, seed, spare):
    """Also with room left in the cache, whose zeros must not be attended to."""
    model, ids_BT = model_of_shape(shape, seed, router=router)
    prefill = shape[1]
    cached = cached_logits(model, ids_BT, [prefill] + [1] * (ids_BT.shape[1] - prefill), spare)
    assert_close(cached, model(ids_BT).logits, 1e-5)


@given(shape=attention_shapes(), seed=seeds)
def test_two_prefills_equal_one(shape, seed):
    """A text continued by several tokens at once: more keys than queries, and more than one."""
    model, ids_BT = model_of_shape(shape, seed, qk_norm=True)
    chunks = [n for n in (shape[5], shape[1]) if n]
    assert_close(cached_logits(model, ids_BT, chunks), model(ids_BT).logits, 1e-5)


def test_cached_equals_uncached_in_bf16():
    model = random_model(small_config(n_experts=1))
    ids_BT = random_ids(model.config, 2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        cached = cached_logits(model, ids_BT, [5] + [1] * 7, dtype=torch.bfloat16)
        assert_close(cached.float(), model(ids_BT).logits.float(), 5e-2)
    assert cached.dtype == torch.bfloat16
    assert_close(cached.float(), model(ids_BT).logits, 5e-2)


@pytest.mark.parametrize("past", [0, 10])
def test_context_overflow_names_the_remedy(past):
    """Cached positions count: past seq_len the rotary table would end, silently."""
    model = random_model(small_config(seq_len=16))
    cache = lamoe.Cache(model.config, 1, 32)
    if past:
        model(random_ids(model.config, 1, past), cache=cache)
    with pytest.raises(ValueError, match=r"17 tokens.*seq_len=16.*--seq_len 17"):
        model(random_ids(model.config, 1, 17 - past), cache=cache)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [False, True])
@given(shape=attention_shapes(), cut=st.integers(1, 15), seed=seeds)
def test_future_tokens_never_change_past_logits(router, training, shape, cut, seed):
    """In training too: a router that lets later tokens crowd out earlier ones would be caught."""
    model, ids_BT = model_of_shape(shape, seed, router=router)
    model.train(training)
    cut = min(cut, ids_BT.shape[1])
    other_BT = ids_BT.clone()
    other_BT[:, cut:] = (other_BT[:, cut:] + 1) % model.config.vocab_size
    outs = []
    for ids in (ids_BT, other_BT):
        torch.manual_seed(0)  # a noisy router draws the same noise both times
        outs.append(model(ids).logits)
    assert_close(outs[0][:, :cut], outs[1][:, :cut], 1e-5)
    if cut < ids_BT.shape[1]:
        assert (outs[0] - outs[1])[:, cut:].abs().max() > 1e-3


def test_each_position_depends_on_itself_and_all_before():
    """A mask off by one either way, or a lost key, shows as a wrong zero in the gradient."""
    model = random_model(small_config(n_layers=1))
    embedded = []
    model.embed.register_forward_hook(lambda *args: embedded.append(args[2].requires_grad_()))
    logits_BTV = model(random_ids(model.config, 1, 9)).logits
    for t in range(9):
        upstream_V = torch.randn(
            model.config.vocab_size, generator=torch.Generator().manual_seed(t)
        )
        loss = logits_BTV[0, t] @ upstream_V
        (gradient,) = torch.autograd.grad(loss, embedded[0], retain_graph=True)
        assert (gradient[0].abs().amax(-1) > 0).tolist() == [s <= t for s in range(9)]


@pytest.mark.parametrize("router", ROUTERS)
def test_rows_of_a_batch_do_not_mix(router):
    model = random_model(small_config(router=router))
    ids_BT = random_ids(model.config, 3, 8)
    for row in range(3):
        assert_close(model(ids_BT[row : row + 1]).logits[0], model(ids_BT).logits[row], 1e-5)


# ---------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_experts", [1, 4])
def test_first_loss_is_ln_vocab(n_experts):
    model = lamoe.LaMoE(small_config(n_experts=n_experts))
    ids_BT = random_ids(model.config, 2, 8)
    assert math.isclose(model(ids_BT, ids_BT).loss.item(), math.log(23), rel_tol=1e-6)


def test_first_loss_is_near_ln_vocab_when_tied():
    model = lamoe.LaMoE(lamoe.Config(vocab_size=1000, tie_embeddings=True))
    assert model.head.weight is model.embed.weight
    ids_BT = random_ids(model.config, 4, 65)
    loss = model(ids_BT[:, :-1], ids_BT[:, 1:]).loss.item()
    assert math.isclose(loss, math.log(1000), rel_tol=0.02)


def test_blocks_start_as_the_identity():
    """What writes to the residual stream starts at zero; what reads from it does not."""
    model = lamoe.LaMoE(small_config())
    x_BTD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        y_BTD, _ = block(
            x_BTD, None, model.cos[:5], model.sin[:5], lamoe.pick_kernels(x_BTD, model.config)
        )
        assert torch.equal(y_BTD, x_BTD)
    started = {name.split(".", 2)[-1] for name, w in model.named_parameters() if w.any()}
    assert {"attn.q_proj.weight", "ffn.router.weight", "ffn.experts.gate_up_proj"} <= started


@pytest.mark.parametrize("changes", [dict(), dict(n_experts=1), dict(tie_embeddings=True)])
def test_every_parameter_gets_a_gradient(changes):
    model = random_model(small_config(qk_norm=True, **changes)).train()
    ids_BT = random_ids(model.config, 4, 16)
    out = model(ids_BT, ids_BT)
    (out.loss + out.aux).backward()
    assert [
        name for name, w in model.named_parameters() if w.grad is None or not w.grad.any()
    ] == []


def test_targets_of_minus_100_are_not_scored():
    model = random_model(small_config())
    ids_BT, targets_BT = (random_ids(model.config, 2, 6, seed=seed) for seed in (0, 1))
    targets_BT[0, :4] = -100
    log_probs = model(ids_BT).logits.log_softmax(-1)
    scored = [(b, t) for b in range(2) for t in range(6) if targets_BT[b, t] != -100]
    expected = -sum(log_probs[b, t, targets_BT[b, t]].item() for b, t in scored) / 8
    assert math.isclose(model(ids_BT, targets_BT).loss.item(), expected, rel_tol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_eval_is_deterministic(router):
    """To the last bit, whatever the state of the random numbers, and without using any."""
    model = random_model(small_config(router=router))
    ids_BT = random_ids(model.config, 3, 16)
    outs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        outs.append(model(ids_BT, ids_BT))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outs[0].logits, outs[1].logits)
    assert outs[0].aux == outs[1].aux == outs[0].dropped == 0


def test_dropout_leaves_out_what_layers_add_in_training_only():
    """Of a block that adds ones, the kept ones are scaled so that the mean stays."""
    model = random_model(small_config(dropout=0.5, n_experts=1))
    ids_BT = random_ids(model.config, 4, 16)
    plain = random_model(small_config(n_experts=1))
    assert torch.equal(model(ids_BT).logits, plain(ids_BT).logits)
    model.train()
    assert not torch.equal(model(ids_BT).logits, model(ids_BT).logits)
    block = model.blocks[0]
    block.attn.forward = lambda x, *rest: torch.ones_like(x)
    block.ffn.forward = torch.zeros_like
    added_BTD, _ = block(torch.zeros(8, 64, model.config.dim), None, None, None, (None, None))
    assert set(added_BTD.unique().tolist()) == {0.0, 2.0} and 0.9 < added_BTD.mean() < 1.1
    embedded = []
    block.forward = lambda x_BTD, *rest: (embedded.append(x_BTD), (x_BTD, None))[1]
    model(ids_BT)
    whole_BTD, kept_BTD = model.embed(ids_BT), embedded[0]
    assert torch.all((kept_BTD == 0) | (kept_BTD == 2 * whole_BTD))
    assert 0.4 < (kept_BTD == 0).float().mean() < 0.6


def test_one_can_learn_from_a_teacher_and_add_losses_of_ones_own():
    """Logits have their gradient where there are targets, too, and so have the routers' outputs."""
    student, teacher = (random_model(small_config(n_experts=4), seed).train() for seed in (0, 1))
    ids_BT, targets_BT = random_ids(student.config, 2, 7), random_ids(student.config, 2, 7, seed=1)
    out = student(ids_BT, targets_BT, return_experts=True)
    probs_BTV = teacher(ids_BT).logits.detach().softmax(-1)
    (out.loss - (probs_BTV * out.logits.log_softmax(-1)).sum(-1).mean()).backward()
    grads = [weight.grad.clone() for weight in student.parameters()]
    student.zero_grad()
    logits_BTV = student(ids_BT).logits  # the same, by hand
    one_hot_BTV = torch.nn.functional.one_hot(targets_BT, student.config.vocab_size)
    (-((one_hot_BTV + probs_BTV) * logits_BTV.log_softmax(-1)).sum(-1).mean()).backward()
    for weight, grad in zip(student.parameters(), grads, strict=True):
        assert_close(weight.grad, grad, 1e-5)

    assert out.router_probs.shape == (2, 2, 7, 4)
    assert_close(out.router_probs.sum(-1), torch.ones(2, 2, 7), 1e-6)
    assert torch.equal(out.router_probs.argmax(-1), out.experts[..., 0])
    student.zero_grad()
    out = student(ids_BT, return_experts=True)
    (out.router_probs.square().sum() + out.expert_weights.square().sum()).backward()
    assert all(block.ffn.router.weight.grad.any() for block in student.blocks)
    assert student(ids_BT).router_probs is None
    assert student(ids_BT, targets_BT, return_logits=False).logits is None


def test_output_has_the_promised_shapes():
    model = random_model(small_config(n_layers=3, n_experts=5, top_k=2))
    out = model(random_ids(model.config, 2, 7))
    assert out.loss is None and out.experts is None and out.aux.shape == out.dropped.shape == ()
    assert out.logits.shape == (2, 7, 23) and out.logits.dtype == torch.float32
    assert out.load.shape == (3, 5) and torch.allclose(out.load.sum(-1), torch.ones(3))
    out = model(random_ids(model.config, 2, 7), return_experts=True)
    assert out.experts.shape == (3, 2, 7, 2)


def test_experts_lie_where_their_tokens_are():
    """(B, T) and (T, B) mixed up would still have a plausible shape when B = T."""
    model = random_model(small_config(n_experts=8))
    ids_BT = random_ids(model.config, 3, 3)
    whole = model(ids_BT, return_experts=True).experts
    alone = model(ids_BT[1:2], return_experts=True).experts
    assert torch.equal(whole[:, 1:2], alone)


def test_bf16_autocast_stays_near_fp32():
    """Matrix products, residual stream and logits in bf16; loss and norms in fp32."""
    model = random_model(small_config(n_experts=1))
    ids_BT = random_ids(model.config, 2, 8)
    exact = model(ids_BT, ids_BT)
    streams = []
    model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids_BT, ids_BT)
    assert rounded.logits.dtype == streams[0] == torch.bfloat16
    assert rounded.loss.dtype == torch.float32
    assert_close(rounded.logits.float(), exact.logits, 5e-2)
    assert not torch.equal(rounded.logits, exact.logits)


def test_own_products_and_the_cache_follow_autocast(monkeypatch):
    """A cache in fp32 under bf16 would be twice as large, and experts in fp32 far slower."""
    model, made = random_model(small_config()), []
    monkeypatch.setattr(lamoe.Cache, "append", spy_on(lamoe.Cache.append, made))
    monkeypatch.setattr(lamoe, "plain_moe", spy_on(lamoe.plain_moe, made))
    next(model.generate(torch.tensor([[1, 2]]), 1))  # data/one_row.py tries changed code once
    for enabled, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        made.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            next(model.generate(torch.tensor([[1, 2]]), 1))
        caches = [args[0] for args in made if isinstance(args[0], lamoe.Cache)]
        rows = [args[1] for args in made if isinstance(args[0], lamoe.Experts)]
        assert len(caches) == len(rows) == model.config.n_layers
        assert (
            {k.dtype for cache in caches for k, _ in cache.layers}
            == {x_ND.dtype for x_ND in rows}
            == {dtype}
        )


# ---------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------


def counting_model(vocab_size=8, sharpness=20.0, **changes):
    """A model that continues i with i + 1 (mod V): blocks do nothing, the head is a shift."""
    c = small_config(vocab_size=vocab_size, dim=vocab_size, n_heads=1, n_kv_heads=1, **changes)
    model = lamoe.LaMoE(c).eval()
    model.embed.weight.data = torch.eye(vocab_size)
    model.head.weight.data = sharpness * torch.eye(vocab_size).roll(1, dims=0)
    return model


def generated(model, ids_BT, *args, **kwargs):
    """(B, new tokens) as lists."""
    steps = [ids_B.tolist() for ids_B in model.generate(torch.as_tensor(ids_BT), *args, **kwargs)]
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("changes", [dict(), dict(n_experts=1, n_kv_heads=1)])
def test_greedy_generation_equals_argmax_without_cache(router, changes):
    model = random_model(small_config(router=router, **changes))
    ids_BT = random_ids(model.config, 3, 4)
    ours = torch.tensor(generated(model, ids_BT, 9, temperature=0))
    for _ in range(9):
        ids_BT = torch.cat((ids_BT, model(ids_BT).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(ours, ids_BT[:, 4:])


def test_generate_yields_one_token_a_row_as_they_come():
    steps = counting_model().generate(torch.tensor([[0, 1], [4, 5]]), 3, temperature=0)
    assert next(steps).tolist() == [2, 6]
    assert [ids_B.tolist() for ids_B in steps] == [[3, 7], [4, 0]]


@pytest.mark.parametrize("prompt, expected", [(1, 15), (10, 6), (16, 0)])
def test_generate_past_context_stops(prompt, expected):
    model = counting_model(seq_len=16)
    ids_BT = torch.zeros(2, prompt, dtype=torch.long)
    assert len(list(model.generate(ids_BT, 100, temperature=0))) == expected


def test_generate_refuses_a_prompt_beyond_the_context():
    with pytest.raises(ValueError, match="17 tokens do not fit the context of seq_len=16"):
        next(counting_model(seq_len=16).generate(torch.zeros(1, 17, dtype=torch.long), 5))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_generate_ends_after_max_new_tokens(n):
    assert len(list(counting_model().generate(torch.tensor([[0]]), n))) == n


def test_generate_stops_when_every_row_has_produced_the_stop_token():
    """A row that is done repeats it; a stop token in the prompt stops nothing."""
    rows = generated(counting_model(), [[0, 2], [5, 4], [7, 6]], 10, temperature=0, stop=5)
    assert rows == [[3, 4, 5, 5, 5, 5, 5], [5] * 7, [7, 0, 1, 2, 3, 4, 5]]


def test_generate_depends_on_its_generator_alone():
    """Same seed, same text; and training's random numbers are left alone."""
    model = random_model(small_config())

    def text(seed):
        generator = torch.Generator().manual_seed(seed)
        return generated(model, [[1, 2], [3, 4]], 12, generator=generator)

    first, state = text(0), torch.get_rng_state()
    torch.manual_seed(5)
    assert text(0) == first
    torch.set_rng_state(state)
    assert text(1) != first and torch.equal(torch.get_rng_state(), state)


def test_generate_penalizes_prompt_and_new_tokens_of_their_row_alone():
    options = dict(temperature=0, repetition_penalty=1e9)
    model = counting_model()
    model.head.weight.data += 1  # every logit above 0, so that a penalty lowers it
    rows = generated(model, [[3, 2], [5, 2]], 1, **options)
    assert rows[0] != [3] and rows[1] == [3]
    model.head.weight.data = torch.tensor([5.0, 1, 8, 2, 7, 6, 4, 3])[:, None].expand(8, 8)
    assert generated(model, [[2], [5]], 6, **options) == [[4, 5, 0, 6, 7, 3], [2, 4, 0, 6, 7, 3]]


def test_generate_wants_evaluation_mode():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        next(counting_model().train().generate(torch.tensor([[0]]), 1))


@pytest.mark.parametrize("penalty, kept", [(2.0, [1.0, -4.0, 2.0, -2.0]), (1.0, [2.0, -2.0] * 2)])
def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens(
    penalty, kept, monkeypatch
):
    """Tokens 0 and 1 are seen, 2 and 3 are not."""
    calls = []
    monkeypatch.setattr(lamoe, "sample", spy_on(lamoe.sample, calls))
    step = lamoe.Step(counting_model(vocab_size=4), 1, 8, (0,), penalty, None)
    step.pick(torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[0, 1]]))
    assert calls[0][0].tolist() == [kept]


# ---------------------------------------------------------------------------------------------
# Sampling filters
# ---------------------------------------------------------------------------------------------


def random_logits(seed, B=3, V=12):
    return 2 * torch.randn(B, V, generator=torch.Generator().manual_seed(seed))


def assert_cut(drawn_BV, probs_BV, kept_BV):
    """What is kept has its old probability, scaled to sum to 1; the rest can't be drawn."""
    expected_BV = probs_BV * kept_BV
    assert_close(drawn_BV, expected_BV / expected_BV.sum(-1, keepdim=True), 1e-6)
    assert torch.equal(drawn_BV > 0, kept_BV)


temperatures = st.floats(0.5, 2.0)


@given(seed=seeds, temperature=temperatures, k=st.integers(1, 15))
def test_top_k_keeps_the_k_most_likely(seed, temperature, k):
    logits_BV = random_logits(seed)
    rank_BV = logits_BV.argsort(descending=True).argsort()
    drawn_BV = lamoe.filter_logits(logits_BV, temperature=temperature, top_k=k)
    assert_cut(drawn_BV, (logits_BV / temperature).softmax(-1), rank_BV < k)


@given(seed=seeds, temperature=temperatures, min_p=st.floats(0.01, 1.0))
def test_min_p_keeps_a_share_of_the_most_likely(seed, temperature, min_p):
    """Measured after temperature: hotter text keeps more."""
    probs_BV = (random_logits(seed) / temperature).softmax(-1)
    kept_BV = probs_BV >= min_p * probs_BV.amax(-1, keepdim=True)
    drawn_BV = lamoe.filter_logits(random_logits(seed), temperature=temperature, min_p=min_p)
    assert_cut(drawn_BV, probs_BV, kept_BV)


@given(seed=seeds, temperature=temperatures, top_p=st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_reach_it(seed, temperature, top_p):
    """The one that crosses top_p is kept; one more would be too many."""
    probs_BV = (random_logits(seed) / temperature).softmax(-1)
    kept_BV = torch.zeros_like(probs_BV, dtype=torch.bool)
    for probs, kept in zip(probs_BV, kept_BV, strict=True):
        mass = 0.0
        for token in probs.argsort(descending=True):
            kept[token], mass = True, mass + probs[token]
            if mass >= top_p:
                break
    assert_cut(
        lamoe.filter_logits(random_logits(seed), temperature=temperature, top_p=top_p),
        probs_BV,
        kept_BV,
    )


@given(
    seed=seeds,
    k=st.integers(1, 12),
    min_p=st.floats(0.0, 1.0),
    top_p=st.floats(0.01, 1.0),
)
def test_filters_together_never_leave_nothing(seed, k, min_p, top_p):
    """They only ever cut, and the most likely token survives all of them."""
    logits_BV = random_logits(seed)
    drawn_BV = lamoe.filter_logits(logits_BV, top_k=k, min_p=min_p, top_p=top_p)
    assert torch.equal(drawn_BV.argmax(-1), logits_BV.argmax(-1))
    for alone in (dict(top_k=k), dict(min_p=min_p)):
        assert not (drawn_BV > 0)[lamoe.filter_logits(logits_BV, **alone) == 0].any()


@pytest.mark.parametrize(
    "most",
    [
        dict(top_k=1),
        dict(min_p=1.0),
        dict(min_p=5.0),
        dict(top_p=1e-9),
        dict(top_p=0.0),
    ],
)
def test_the_strictest_filter_leaves_the_most_likely(most):
    best_BV = torch.eye(12)[random_logits(0).argmax(-1)]
    assert torch.equal(lamoe.filter_logits(random_logits(0), **most), best_BV)


@pytest.mark.parametrize(
    "idle", [dict(top_k=12), dict(top_k=99), dict(top_k=0), dict(top_p=1.0), dict(min_p=0.0)]
)
def test_idle_filters_change_nothing(idle):
    assert_close(lamoe.filter_logits(random_logits(0), **idle), random_logits(0).softmax(-1), 1e-6)


@given(seed=seeds)
def test_temperature_0_and_top_k_1_take_the_most_likely(seed):
    best_B = random_logits(seed).argmax(-1)
    noise_BV = random_logits(seed + 1).exp()
    assert torch.equal(lamoe.sample(random_logits(seed), noise_BV, 0), best_B)
    assert torch.equal(lamoe.sample(random_logits(seed), noise_BV, 2.0, 1), best_B)


@pytest.mark.parametrize("noise", [0.0, 1e-45, 1.0])
def test_noise_of_zero_never_draws_what_a_filter_removed(noise):
    """Some devices draw exact zeros, and 0 / 0 is the largest number for argmax."""
    noise_BV = torch.tensor([[1.0, 1.0, noise]])
    assert lamoe.sample(torch.tensor([[5.0, 1.0, 0.0]]), noise_BV, 1.0, 1).tolist() == [0]
    assert lamoe.sample(torch.tensor([[5.0, 1.0, 0.0]]), 0 * noise_BV, 1.0, 2).tolist() == [0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-30, 1e-7, 1e-6])
def test_a_temperature_near_zero_is_greedy(temperature):
    """Logits divided by it would be infinite, and their softmax NaN: token 0 for ever."""
    logits_BV, noise_BV = random_logits(3), random_logits(4).exp()
    assert torch.equal(lamoe.sample(logits_BV, noise_BV, temperature), logits_BV.argmax(-1))
    text = generated(counting_model(), [[0]], 5, temperature=temperature)
    assert text == [[1, 2, 3, 4, 5]]


def test_top_p_of_1_removes_nothing_of_a_large_vocabulary():
    """By rounding, the running sum of 150,000 probabilities reaches 1 long before its end."""
    logits_BV = random_logits(0, B=1, V=151_936)
    for top_p in (1.0, 1.5):
        assert (lamoe.filter_logits(logits_BV, top_p=top_p) > 0).all()


def test_samples_follow_the_probabilities():
    """20,000 draws: each share within five standard deviations."""
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    probs_V = (logits_V / 0.8).softmax(-1)
    noise_BV = torch.empty(20_000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    ids_B = lamoe.sample(logits_V.repeat(20_000, 1), noise_BV, 0.8)
    shares_V = torch.bincount(ids_B, minlength=4) / 20_000
    assert ((shares_V - probs_V).abs() < 5 * (probs_V * (1 - probs_V) / 20_000).sqrt()).all()


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------

V, D, HIDDEN = 23, 16, 12  # small_config's


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_counted_by_hand(tied):
    """Two layers, four query heads of width 4, two key/value heads, four experts, two active."""
    parts = lamoe.count_parameters(lamoe.LaMoE(small_config(tie_embeddings=tied)))
    attn, one_expert, norms = 2 * (D * 16 + 2 * D * 8 + 16 * D), 3 * D * HIDDEN, 5 * D
    expected = {
        "attn": (attn, attn),
        "router": (2 * 4 * D, 2 * 4 * D),
        "experts": (2 * 4 * one_expert, 2 * 2 * one_expert),
        "norms": (norms, norms),
        "embedding": (V * D, V * D if tied else 0),
    }
    if not tied:
        expected["head"] = (V * D, V * D)
    expected["all"] = tuple(sum(column) for column in zip(*expected.values(), strict=True))
    assert parts == expected


def test_what_a_subclass_adds_is_counted():
    class WithValue(lamoe.LaMoE):
        def __init__(self, config):
            super().__init__(config)
            self.value = torch.nn.Linear(config.dim, 1, bias=False)

    parts = lamoe.count_parameters(WithValue(small_config()))
    assert parts["other"] == (D, D)
    assert parts["all"][0] == lamoe.count_parameters(lamoe.LaMoE(small_config()))["all"][0] + D


def test_dense_parameters_are_all_active_but_the_embedding():
    parts = lamoe.count_parameters(lamoe.LaMoE(small_config(n_experts=1)))
    assert parts["ffn"] == (2 * 3 * D * HIDDEN,) * 2 and "router" not in parts
    assert parts["all"][0] - parts["all"][1] == V * D


@pytest.mark.parametrize(
    "changes", [dict(), dict(n_experts=6, top_k=3, head_dim=6), dict(n_experts=1)]
)
def test_flops_equal_what_torch_counts(changes, monkeypatch):
    """torch counts the masked half of attention as well, and no gradient for ids."""
    c = small_config(seq_len=8, **changes)
    model = random_model(c)
    ids_BT = random_ids(c, 3, 8)
    plain = (lamoe.plain_attention, lamoe.plain_moe)  # whose products torch can count
    monkeypatch.setattr(lamoe, "pick_kernels", lambda x, c: plain)
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")
        model(ids_BT, ids_BT).loss.backward()
    attention = 12 * c.n_layers * c.n_heads * c.head_size * 8 // 2
    assert counter.get_total_flops() == 24 * (lamoe.flops_per_token(model) + attention)


# ---------------------------------------------------------------------------------------------
# Save and load
# ---------------------------------------------------------------------------------------------


def checkpoint_of(model, **more):
    return {"config": dataclasses.asdict(model.config), "model": model.state_dict(), **more}


def saved(tmp_path, checkpoint):
    path = tmp_path / "model.pt"
    checkpoints.save(path, checkpoint)
    return path


@pytest.mark.parametrize("changes", [dict(), dict(n_experts=1), dict(tie_embeddings=True)])
def test_load_gives_back_what_was_saved(tmp_path, changes):
    model = random_model(small_config(qk_norm=True, head_dim=6, **changes)).train()
    loaded, tokenizer = exchange.load(saved(tmp_path, checkpoint_of(model)))
    assert loaded.config == model.config and tokenizer is None and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    ids_BT = random_ids(model.config, 2, 9)
    assert torch.equal(loaded(ids_BT).logits, model.eval()(ids_BT).logits)


def test_the_tokenizer_travels_with_the_model(tmp_path):
    trained = bpe.Tokenizer.train(["a cat and a hat and a bat"] * 9, 262)
    model = random_model(small_config(vocab_size=trained.vocab_size))
    path = saved(tmp_path, checkpoint_of(model, tokenizer=trained.state()))
    assert exchange.load(path)[1].encode("a hat") == trained.encode("a hat")
    other = random_model(small_config(vocab_size=trained.vocab_size + 1))
    path = saved(tmp_path, checkpoint_of(other, tokenizer=trained.state()))
    with pytest.raises(ValueError, match=f"{trained.vocab_size} tokens.*{trained.vocab_size + 1}"):
        exchange.load(path)


def assert_refused(path, message):
    """One line that names the file."""
    with pytest.raises(ValueError, match=message) as error:
        exchange.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_load_refuses_a_missing_file(tmp_path):
    assert_refused(tmp_path / "none.pt", "no such file.*train.py")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_load_refuses_a_truncated_file(tmp_path, share):
    path = saved(tmp_path, checkpoint_of(random_model(small_config())))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_refused(path, "not a readable checkpoint")


def test_load_refuses_a_text_file_and_a_folder(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("Once, upon a time")
    assert_refused(path, "not a readable checkpoint")
    assert_refused(tmp_path, "neither a readable checkpoint nor a Hugging Face folder")


class Trap:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("as_torch", [True, False])
def test_load_refuses_a_pickle_that_executes_code(tmp_path, as_torch):
    path, sprung = tmp_path / "evil.pt", tmp_path / "sprung"
    evil = {"config": {}, "model": Trap(sprung)}
    torch.save(evil, path) if as_torch else path.write_bytes(pickle.dumps(evil, protocol=2))
    assert_refused(path, "not a readable checkpoint")
    assert not sprung.exists()
    torch.load(path, weights_only=False) if as_torch else pickle.loads(path.read_bytes())
    assert sprung.exists()  # so the trap was a real one


def test_load_draws_no_numbers_that_it_would_overwrite(tmp_path):
    """They took longer than reading the file; and what is drawn next is what a seed promised."""
    model = random_model(small_config(router="noisy", n_shared_experts=1, qk_norm=True))
    path, state = saved(tmp_path, checkpoint_of(model)), torch.get_rng_state()
    loaded, _ = exchange.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, read in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, read)


def test_load_names_an_object_that_a_checkpoint_holds(tmp_path):
    """torch's own words begin with how to read it all the same, in bold."""
    checkpoint = checkpoint_of(random_model(small_config()))
    path = saved(tmp_path, {**checkpoint, "config": small_config()})
    assert_refused(path, r"it holds a lamoe\.Config, not only .* asdict")


@pytest.mark.parametrize(
    "wrap",
    [
        "_orig_mod.{}".format,
        "module.{}".format,
        "_orig_mod.module.{}".format,
        lambda name: name.replace(".attn.", "._orig_mod.attn."),
    ],
)
def test_load_takes_the_weights_of_a_wrapped_model(tmp_path, wrap):
    """As torch.compile and DDP name them, around a model or around its blocks."""
    model = random_model(small_config())
    checkpoint = checkpoint_of(model)
    checkpoint["model"] = {wrap(name): weight for name, weight in checkpoint["model"].items()}
    loaded, _ = exchange.load(saved(tmp_path, checkpoint))
    assert_close(loaded(torch.tensor([[1, 2]])).logits, model(torch.tensor([[1, 2]])).logits, 1e-6)


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"config": {}}, torch.zeros(3)])
def test_load_refuses_what_is_no_checkpoint(tmp_path, content):
    assert_refused(saved(tmp_path, content), "not a LaMoE checkpoint")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c["model"].pop("norm.weight"), "Missing.*norm.weight"),
        (lambda c: c["model"].update(extra=torch.zeros(1)), "Unexpected.*extra"),
        (lambda c: c["model"].update({"norm.weight": torch.zeros(3)}), "norm.weight"),
        (lambda c: c["config"].update(n_layers=3), r"Missing.*blocks\.2"),
        (lambda c: c["config"].update(new_field=1), "new_field"),
        (lambda c: c["config"].pop("vocab_size"), "vocab_size"),
        (lambda c: c.update(config=None), "does not fit"),
        (lambda c: c.update(model=3), "does not fit"),
        (lambda c: c.update(model={1: torch.zeros(1)}), "does not fit"),
    ],
)
def test_load_refuses_wrong_keys_and_shapes(tmp_path, spoil, message):
    checkpoint = checkpoint_of(random_model(small_config()))
    spoil(checkpoint)
    assert_refused(saved(tmp_path, checkpoint), message)


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_save_is_atomic(tmp_path, broken):
    """A disk that is full at any moment leaves the old checkpoint, and no litter."""
    path = saved(tmp_path, {"config": {}, "model": {}, "step": 1})

    def fail(*args):
        if broken == "torch.save":
            args[1].write(b"half a check")
        raise OSError("No space left on device")

    with mock.patch(broken, fail), pytest.raises(OSError, match="No space"):
        checkpoints.save(path, {"config": {}, "model": {}, "step": 2})
    assert checkpoints.read(path)["step"] == 1
    assert os.listdir(tmp_path) == ["model.pt"]


def test_save_reaches_the_disk_before_the_name_changes(tmp_path):
    """Renamed before it is flushed, a file may be empty after a power cut."""
    calls = []  # fsync has one argument, replace two
    with (
        mock.patch("os.fsync", spy_on(os.fsync, calls)),
        mock.patch("os.replace", spy_on(os.replace, calls)),
    ):
        saved(tmp_path, {"config": {}, "model": {}})
    assert [len(args) for args in calls[:2]] == [1, 2]
