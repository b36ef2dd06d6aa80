"""Routers choose as their papers say; the dispatch is only a faster way to loop over experts."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROUTERS,
    Doubled,
    assert_close,
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

import lamoe
from data import kernels
from data.run.machine import has_compiler

# ---------------------------------------------------------------------------------------------
# Dispatch
# ---------------------------------------------------------------------------------------------


def choose(N, A, E, how, generator):
    """(N, A) distinct experts: at random, all tokens alike, or with half of the experts empty."""
    if how == "alike":
        return torch.randperm(E, generator=generator)[:A].repeat(N, 1)
    usable = max(A, E // 2) if how == "empty" else E
    return torch.stack([torch.randperm(usable, generator=generator)[:A] for _ in range(N)])


def dispatch_case(N, A, E, D, hidden, how, seed, dtype=torch.float32):
    """(experts, their choice, [x, weights, gate_up_proj, down_proj] which all want gradients)."""
    generator = torch.Generator().manual_seed(seed)
    experts = randomise(lamoe.Experts(E, D, hidden), seed).to(dtype)
    x_ND = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weights_NA = torch.rand(N, A, generator=generator).to(dtype).requires_grad_()
    inputs = [x_ND, weights_NA, experts.gate_up_proj, experts.down_proj]
    return experts, choose(N, A, E, how, generator), inputs


def assert_dispatch_equals_loop(moe, case, tolerance):
    experts, experts_NA, inputs = case
    ours_ND = moe(experts, inputs[0], experts_NA, inputs[1])
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    loop_ND = loop_over_experts(exact[0], experts_NA, exact[1], *exact[2:])
    assert ours_ND.dtype == inputs[0].dtype
    assert_close(ours_ND, loop_ND, tolerance)
    # a different weight on every output, or mistakes that cancel in a plain sum would pass
    upstream_ND = torch.randn(ours_ND.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((ours_ND * upstream_ND).sum(), inputs)
    loop = torch.autograd.grad((loop_ND * upstream_ND).sum(), exact)
    for our_grad, loop_grad in zip(ours, loop, strict=True):
        assert_close(our_grad, loop_grad, tolerance)


@st.composite
def dispatch_shapes(draw):
    """(N, A, E, D, hidden, how)"""
    E = draw(st.integers(1, 6))
    A = draw(st.integers(1, E))
    how = draw(st.sampled_from(["random", "alike", "empty"]))
    sizes = [draw(st.integers(1, 9)) for _ in range(2)]
    return draw(st.integers(1, 17)), A, E, *sizes, how


@pytest.mark.parametrize("moe", [lamoe.plain_moe, lamoe.sorted_moe])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@given(shape=dispatch_shapes(), seed=seeds)
@example(shape=(12, 1, 4, 6, 5, "alike"), seed=0)  # one expert takes all
@example(shape=(12, 2, 6, 6, 5, "empty"), seed=0)  # some experts get nothing
@example(shape=(12, 4, 4, 6, 5, "random"), seed=0)  # every expert gets everything
def test_dispatch_equals_loop(moe, dtype, tolerance, shape, seed):
    """Values, and gradients of x, of the routing weights and of both expert parameters."""
    if moe is lamoe.sorted_moe:  # grouped products want rows of 16 bytes
        shape = (*shape[:3], 8 * shape[3], 8 * shape[4], shape[5])
    assert_dispatch_equals_loop(moe, dispatch_case(*shape, seed, dtype), tolerance)


@pytest.mark.parametrize("compiled", [False, True])
@given(shape=dispatch_shapes(), seed=seeds)
def test_one_token_equals_loop(compiled, shape, seed):
    """A step of generation has code of its own, and another where it is compiled."""
    with mock.patch.object(torch.compiler, "is_compiling", lambda: compiled):
        case = dispatch_case(1, *shape[1:], seed)
        assert_dispatch_equals_loop(lamoe.moe_one, case, 2e-6)


@pytest.mark.parametrize("moe", [lamoe.plain_moe, lamoe.sorted_moe])
def test_no_tokens_are_no_rows(moe):
    experts, experts_NA, inputs = dispatch_case(3, 2, 4, 8, 8, "random", 0)
    assert moe(experts, inputs[0][:0], experts_NA[:0], inputs[1][:0]).shape == (0, 8)


def test_a_choice_of_weight_zero_costs_nothing():
    """Where nearly all weights are zero, as when experts choose tokens, few rows are computed."""
    experts, experts_NA, inputs = dispatch_case(12, 4, 4, 6, 5, "random", 0)
    weights_NA, rows = inputs[1].detach().clone(), []
    weights_NA[:, 1:] = 0
    run = lamoe.run_expert
    with mock.patch.object(
        lamoe, "run_expert", lambda x, *rest: (rows.append(len(x)), run(x, *rest))[1]
    ):
        y_ND = lamoe.plain_moe(experts, inputs[0], experts_NA, weights_NA)
    assert sum(rows) == 12
    loop_ND = loop_over_experts(inputs[0], experts_NA, weights_NA, *experts.parameters())
    assert_close(y_ND, loop_ND, 2e-6)


def permutation_case(N=5, A=2, E=3):
    """token_P1 and slot_NA as sorted_moe makes them, for a random choice."""
    experts_NA = choose(N, A, E, "random", torch.Generator().manual_seed(3))
    order_P = experts_NA.flatten().argsort(stable=True)
    return order_P[:, None] // A, order_P.argsort().view(N, A)


def test_gather_gradients_check():
    """The backward of each way is written by hand: it must be the forward of the other."""
    token_P1, slot_NA = permutation_case()
    x_ND = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y_PD = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lamoe.Gather.apply(x, token_P1, slot_NA), x_ND)
    assert torch.autograd.gradcheck(lambda y: lamoe.Gather.apply(y, slot_NA, token_P1), y_PD)


def test_dispatch_gradients_check():
    _, experts_NA, inputs = dispatch_case(4, 2, 3, 3, 2, "random", 0, torch.float64)

    def run(x_ND, weights_NA, gate_up_proj, down_proj):
        now = torch.nn.Module()
        now.gate_up_proj, now.down_proj = gate_up_proj, down_proj
        return lamoe.plain_moe(now, x_ND, experts_NA, weights_NA)

    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run, inputs)


def test_dispatch_repeats_to_the_last_bit():
    """A scatter-add in the backward would add in an order that changes from run to run."""
    experts, experts_NA, inputs = dispatch_case(64, 2, 8, 16, 12, "random", 0)

    def gradients():
        y_ND = lamoe.sorted_moe(experts, inputs[0], experts_NA, inputs[1])
        return torch.autograd.grad(y_ND.square().sum(), inputs)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_one_expert_equals_dense_swiglu():
    """The baseline and the mixture are the same function when there is nothing to choose."""
    experts = randomise(lamoe.Experts(1, 8, 6))
    dense = lamoe.SwiGLU(8, 6)
    dense.gate_up_proj.weight.data = experts.gate_up_proj[0].data
    dense.down_proj.weight.data = experts.down_proj[0].data
    x_ND = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    all_to_0_N1 = torch.zeros(7, 1, dtype=torch.long)
    assert_close(lamoe.plain_moe(experts, x_ND, all_to_0_N1, torch.ones(7, 1)), dense(x_ND), 1e-6)
    expected = explicit_swiglu(x_ND, dense.gate_up_proj.weight, dense.down_proj.weight)
    assert_close(dense(x_ND), expected, 1e-6)


def test_one_expert_builds_a_dense_model_without_router():
    model = lamoe.LaMoE(small_config(n_experts=1))
    assert all(isinstance(block.ffn, lamoe.SwiGLU) for block in model.blocks)
    out = model(random_ids(model.config, 2, 5), return_experts=True)
    assert out.aux.item() == 0 and out.load.shape == (0, 1) and out.experts is None


# ---------------------------------------------------------------------------------------------
# The layer in someone else's model
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_of_its_own_begins_as_one_in_the_model(router):
    """Memory that nobody filled would be NaN, or, worse, numbers of an earlier tensor."""
    c = small_config(router=router, dim=64, n_experts=8, n_shared_experts=1)
    torch.manual_seed(0)
    model, inside = lamoe.LaMoE(c), torch.randn(2, 3, c.dim)
    junk = [torch.full((512, 64), torch.nan) for _ in range(20)]
    del junk
    alone, theirs = lamoe.MoE(c), model.blocks[0].ffn.state_dict()
    for name, weight in alone.state_dict().items():
        assert abs(weight.std() - theirs[name].std()) < 5e-3, name
    y_BTD, routing = alone(inside)
    assert y_BTD.isfinite().all() and routing.weights_NA.isfinite().all()


@pytest.mark.parametrize("router", ["topk", "noisy", "deepseek"])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4)])
def test_a_layer_takes_the_tokens_of_an_image_or_a_list(router, shape):
    layer = randomise(lamoe.MoE(small_config(router=router)))
    x = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(0))
    rows = layer.eval()(x.reshape(1, -1, 16))[0]
    assert_close(layer(x)[0], rows.view_as(x), 1e-6)
    assert layer.train()(x)[1].load_E.sum().item() == pytest.approx(1)


def test_the_sequences_of_the_deepseek_loss_are_images():
    layer = randomise(lamoe.MoE(small_config(router="deepseek")))
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x)[1].balance, layer(x.flatten(1, 2))[1].balance)


@pytest.mark.parametrize("moe", [lamoe.plain_moe, lamoe.sorted_moe, lamoe.moe_one])
@pytest.mark.parametrize("names", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_a_parametrization_of_the_experts_counts(moe, names):
    """As adapters are put on them. Asked for its parameters, a module gives what lies below."""
    N = 1 if moe is lamoe.moe_one else 5
    experts, experts_NA, (x_ND, weights_NA, *_) = dispatch_case(N, 2, 4, 8, 8, "random", 0)
    weights = {name: weight.detach().clone() for name, weight in experts.named_parameters()}
    for name in names:
        torch.nn.utils.parametrize.register_parametrization(experts, name, Doubled())
        weights[name] *= 2
    loop_ND = loop_over_experts(x_ND, experts_NA, weights_NA, *weights.values())
    assert_close(moe(experts, x_ND, experts_NA, weights_NA), loop_ND, 2e-6)


# ---------------------------------------------------------------------------------------------
# What every router promises
# ---------------------------------------------------------------------------------------------


def random_x(c, B=3, T=7, seed=0):
    return torch.randn(B, T, c.dim, generator=torch.Generator().manual_seed(seed))


def random_moe(seed=0, **changes):
    return randomise(lamoe.MoE(small_config(**changes)), seed).eval()


expert_counts = st.integers(2, 9).flatmap(lambda E: st.tuples(st.just(E), st.integers(1, E)))


@pytest.mark.parametrize("router", ROUTERS)
@given(counts=expert_counts, seed=seeds)
def test_each_token_gets_k_distinct_experts_and_weights_of_at_least_0(router, counts, seed):
    E = counts[0]
    moe = random_moe(seed, router=router, n_experts=E, top_k=counts[1])
    A = moe.router.config.n_active
    routing = moe.router(random_x(moe.router.config, seed=seed))
    assert routing.experts_NA.shape == routing.weights_NA.shape == (21, A)
    assert all(len(set(row)) == A for row in routing.experts_NA.tolist())
    assert routing.experts_NA.min() >= 0 and routing.experts_NA.max() < E
    assert (routing.weights_NA >= 0).all() and routing.weights_NA.dtype == torch.float32
    load_E = moe.router.load(routing.experts_NA)
    counted_E = torch.bincount(routing.experts_NA.flatten(), minlength=E) / (21 * A)
    assert torch.allclose(load_E, counted_E) and math.isclose(load_E.sum(), 1, abs_tol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_layer_equals_its_own_routing_in_a_loop(router):
    """Weights or experts mixed up between router and dispatch would show here."""
    moe = random_moe(router=router, n_experts=5)
    x_BTD = random_x(moe.router.config)
    y_BTD, routing = moe(x_BTD)
    loop_ND = loop_over_experts(x_BTD.flatten(0, 1), *routing[:2], *moe.experts.parameters())
    assert_close(y_BTD, loop_ND.view_as(x_BTD), 1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_evaluation_has_no_router_loss_and_no_randomness(router):
    moe = random_moe(router=router)
    x_BTD = random_x(moe.router.config)
    first, again = moe(x_BTD), moe(x_BTD)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].experts_NA, again[1].experts_NA)
    assert first[1].balance == first[1].z == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_permuting_experts_with_their_router_rows_changes_nothing(router):
    moe, shuffled = (random_moe(router=router, n_experts=6) for _ in range(2))
    order = [3, 0, 5, 1, 4, 2]
    for weight in shuffled.parameters():
        assert len(weight) == 6
        weight.data = weight.data[order]
    x_BTD = random_x(moe.router.config)
    assert_close(shuffled(x_BTD)[0], moe(x_BTD)[0], 1e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_token_is_routed_the_same_alone_and_in_a_batch(router):
    moe = random_moe(router=router, n_experts=6)
    x_BTD = random_x(moe.router.config)
    whole = moe.router(x_BTD).experts_NA.view(3, 7, -1)
    assert torch.equal(moe.router(x_BTD[1:2, 2:3]).experts_NA[0], whole[1, 2])


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("n_experts", [2, 8, 40])
def test_ties_are_broken_the_same_way_on_every_run(router, n_experts):
    """Equal scores for all experts: the same choice in every row, call and batch size."""
    moe = random_moe(router=router, n_experts=n_experts)
    moe.router.weight.data.zero_()
    choices = [moe.router(random_x(moe.router.config, T=T)).experts_NA for T in (1, 7, 7, 64)]
    first = choices[0][0]
    assert len(set(first.tolist())) == moe.router.config.n_active
    assert all((choice == first).all() for choice in choices)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_non_finite_input_ends_in_nan_never_in_an_index_error(router, bad, training):
    """One bad weight makes every score NaN; topk then must still return experts that exist."""
    model = random_model(small_config(router=router)).train(training)
    ids_BT = random_ids(model.config, 2, 6)
    model.embed.weight.data[ids_BT[0, 0]] = bad
    assert model(ids_BT, targets_BT=ids_BT).loss.isnan()


@pytest.mark.parametrize("router", ROUTERS)
def test_routing_is_fp32_under_autocast(router):
    """Rounded to bf16, near-ties between experts would flip."""
    moe = random_moe(router=router, n_experts=8)
    x_BTD = random_x(moe.router.config, T=64)
    exact = moe.router(x_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        y_BTD, routing = moe(x_BTD)
    assert torch.equal(routing.experts_NA, exact.experts_NA)
    assert torch.equal(routing.weights_NA, exact.weights_NA)
    assert y_BTD.dtype == torch.bfloat16  # ... but the experts' products are not fp32
    assert_close(y_BTD, moe(x_BTD)[0], 3e-2)


# ---------------------------------------------------------------------------------------------
# The topk router
# ---------------------------------------------------------------------------------------------


@given(counts=expert_counts, seed=seeds)
def test_topk_weights_are_the_full_softmax_renormalised(counts, seed):
    """Mixtral's softmax over the chosen logits, computed the other way round."""
    E, A = counts
    moe = random_moe(seed, n_experts=E, top_k=A)
    x_BTD = random_x(moe.router.config, seed=seed)
    routing = moe.router(x_BTD)
    probs_NE = (x_BTD.flatten(0, 1) @ moe.router.weight.T).softmax(-1)
    for probs, chosen, weights in zip(
        probs_NE, routing.experts_NA, routing.weights_NA, strict=True
    ):
        best = sorted(range(E), key=lambda e: -probs[e].item())[:A]
        assert chosen.tolist() == best
        assert_close(weights, probs[best] / probs[best].sum(), 1e-6)


@pytest.mark.parametrize("top_k, reaches", [(1, False), (2, True)])
def test_topk_task_gradient_reaches_the_router_only_above_k_1(top_k, reaches):
    moe = random_moe(top_k=top_k)
    moe(random_x(moe.router.config))[0].square().sum().backward()
    assert bool(moe.router.weight.grad.abs().max() > 0) == reaches


# ---------------------------------------------------------------------------------------------
# Balance loss and z-loss
# ---------------------------------------------------------------------------------------------


def load_share(experts_NA, n_experts):
    """The share of all choices that each expert got."""
    return torch.bincount(experts_NA.flatten(), minlength=n_experts) / experts_NA.numel()


def balance_by_hand(probs_NE, experts_NA):
    """E * sum_e f_e P_e, counted one choice at a time."""
    N, E = probs_NE.shape
    choices = [e for row in experts_NA.tolist() for e in row]
    f = [choices.count(e) / len(choices) for e in range(E)]
    P = [sum(probs_NE[n, e].item() for n in range(N)) / N for e in range(E)]
    return E * sum(a * b for a, b in zip(f, P, strict=True))


def z_by_hand(logits_NE):
    return sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits_NE.tolist()) / len(
        logits_NE
    )


@pytest.mark.parametrize("E, A", [(2, 1), (4, 2), (8, 2), (6, 3)])
def test_balanced_routing_gives_balance_loss_1(E, A):
    """Whatever the number of experts and of choices: so the logged figure can be read as it is."""
    experts_NA = torch.arange(E * A).view(-1, A) % E
    load_E = load_share(experts_NA, E)
    assert math.isclose(lamoe.balance_loss(torch.full((E, E), 1 / E), load_E), 1, rel_tol=1e-6)


@pytest.mark.parametrize("E, A", [(2, 1), (4, 2), (8, 2), (6, 3)])
def test_a_few_experts_sharing_everything_give_balance_loss_E_over_A(E, A):
    probs_NE = torch.zeros(5, E).index_fill(1, torch.arange(A), 1 / A)
    loss = lamoe.balance_loss(probs_NE, load_share(torch.arange(A).repeat(5, 1), E))
    assert math.isclose(loss, E / A, rel_tol=1e-6)


@given(counts=expert_counts, seed=seeds)
def test_balance_and_z_loss_equal_their_formulas(counts, seed):
    E, A = counts
    logits_NE = torch.randn(11, E, generator=torch.Generator().manual_seed(seed))
    probs_NE, experts_NA = logits_NE.softmax(-1), logits_NE.topk(A).indices
    expected = balance_by_hand(probs_NE, experts_NA)
    load_E = load_share(experts_NA, E)
    assert math.isclose(lamoe.balance_loss(probs_NE, load_E), expected, rel_tol=1e-5)
    moe = random_moe(seed, n_experts=E, top_k=A, z_weight=1.0).train()
    x_BTD = random_x(moe.router.config, seed=seed)
    expected = z_by_hand(x_BTD.flatten(0, 1) @ moe.router.weight.T)
    assert math.isclose(moe.router(x_BTD).z, expected, rel_tol=1e-4)


def test_balance_loss_gradient_is_the_load():
    """f counts and has no gradient; through P each expert is pushed down by its share."""
    probs_NE = torch.full((4, 2), 0.5, requires_grad=True)
    lamoe.balance_loss(probs_NE, torch.tensor([0.75, 0.25])).backward()
    assert torch.allclose(probs_NE.grad, torch.tensor([[2 * 0.75 / 4, 2 * 0.25 / 4]] * 4))


def test_descending_the_balance_loss_balances_the_load():
    moe = random_moe(n_experts=4, balance_weight=1.0, z_weight=1e-30).train()
    x_BTD = random_x(moe.router.config, B=8, T=32) + 1.0  # a common direction: routing collapses
    moe.router.weight.data[0] += 0.5
    before = load_share(moe.router(x_BTD).experts_NA, 4).max()
    for _ in range(60):
        loss = moe.router(x_BTD).balance
        (gradient,) = torch.autograd.grad(loss, moe.router.weight)
        moe.router.weight.data -= 0.3 * gradient
    after = load_share(moe.router(x_BTD).experts_NA, 4).max()
    assert before > 0.4 and after < 0.3


@given(E=st.integers(2, 9), shift=st.floats(-3, 3))
def test_z_loss_of_equal_logits_is_the_log_of_their_sum_squared(E, shift):
    expected = (shift + math.log(E)) ** 2
    router = random_moe(n_experts=E, z_weight=1.0).router.train()
    router.logits = lambda x_BTD: torch.full((5, E), shift)
    assert math.isclose(router(torch.zeros(1, 5, 16)).z, expected, abs_tol=1e-4)


@pytest.mark.parametrize("balance_weight, z_weight", [(0.01, 0.001), (0.5, 0.0), (0.0, 2.0)])
def test_aux_is_the_weighted_sum_over_layers(balance_weight, z_weight):
    """Pooling the layers would let one layer's imbalance hide another's."""
    c = small_config(n_layers=3, balance_weight=balance_weight, z_weight=z_weight)
    model = random_model(c).train()
    inputs = []
    for block in model.blocks:
        block.ffn.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    out = model(random_ids(c, 2, 9), return_experts=True)
    expected = 0.0
    for x_BTD, block, experts_BTA in zip(inputs, model.blocks, out.experts, strict=True):
        logits_NE = x_BTD.flatten(0, 1) @ block.ffn.router.weight.T
        balance = balance_by_hand(logits_NE.softmax(-1), experts_BTA.flatten(0, 1))
        expected += balance_weight * balance + z_weight * z_by_hand(logits_NE)
    assert math.isclose(out.aux.item(), expected, rel_tol=1e-4)
    for load_E, experts_BTA in zip(out.load, out.experts, strict=True):
        counts = torch.bincount(experts_BTA.flatten(), minlength=c.n_experts)
        assert torch.allclose(load_E, counts / counts.sum())
    assert model.eval()(random_ids(c, 2, 9)).aux == 0


def test_experts_with_a_backward_written_out_equal_autograds():
    torch.manual_seed(0)
    shapes = (40, 16), (40, 1), (3, 16, 16), (3, 16, 8)
    leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
    ends_E, dy = torch.tensor([8, 8, 40], dtype=torch.int32), torch.randn(40, 16)
    ours, plain = kernels.GroupedExperts.apply(*leaves, ends_E), lamoe.run_grouped(*leaves, ends_E)
    torch.testing.assert_close(ours, plain)
    grads = (torch.autograd.grad(y, leaves, dy) for y in (ours, plain))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_three_numbers_in_bf16_are_one_in_fp32(compiled):
    """Also where a compiler would leave out roundings."""
    backend = "inductor" if has_compiler("cpu") else "aot_eager"
    split = torch.compile(kernels.in_three, backend=backend) if compiled else kernels.in_three
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 16)
    parts = split(x)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert torch.equal(sum(part.double() for part in parts).float(), x)


def test_logits_by_products_in_bf16_equal_those_in_fp32(monkeypatch):
    """Their gradients are those of a product in bf16. (A CPU's mm can't sum in fp32.)"""
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: mm(a.to(out_dtype), b.to(out_dtype)))
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(50, 64, generator=generator).bfloat16().requires_grad_()
    weight_ED = torch.randn(5, 64, generator=generator).requires_grad_()
    grad_NE = torch.randn(50, 5, generator=generator)
    ours = kernels.RouterLogits.apply(x_ND, weight_ED)
    plain = F.linear(x_ND.float(), weight_ED)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert (ours - F.linear(x_ND, weight_ED.bfloat16())).abs().max() > 1e-3  # it could fail
    grads = (torch.autograd.grad(y, (x_ND, weight_ED), grad_NE) for y in (ours, plain))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() < 1e-2 * b.norm()
