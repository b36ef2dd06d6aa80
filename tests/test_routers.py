"""Each router does what its paper says: oracles first, then properties."""

import math
from unittest import mock

import pytest
import torch
from conftest import assert_close, import_oracle, randomise, seeds, small_config
from hypothesis import given
from hypothesis import strategies as st

import lamoe


def moe_of(router, seed=0, **changes):
    config = dict(vocab_size=9, dim=16, hidden_dim=8, n_experts=8, router=router, jitter=0.0)
    return randomise(lamoe.MoE(lamoe.Config(**{**config, **changes})), seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------
# Oracles
# ---------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("factor", [0.5, 1.0, 8.0])
def test_switch_chooses_weighs_and_drops_as_hugging_face_does_in_one_row(factor):
    """In one row their order of places is ours; over several rows each of theirs has its own."""
    hf = import_oracle("transformers.models.switch_transformers.modeling_switch_transformers")
    T, moe = 24, moe_of("switch", capacity_factor=factor).train()
    config = hf.SwitchTransformersConfig(
        hidden_size=16, num_experts=8, expert_capacity=math.ceil(factor * T / 8)
    )
    theirs = hf.SwitchTransformersTop1Router(config).eval()
    theirs.classifier.weight.data = moe.router.weight.data
    x_BTD = noise(1, T, 16)
    mask_BTE, probs_BT1, _ = theirs(x_BTD)
    routing = moe.router(x_BTD)
    kept_T = mask_BTE[0].sum(-1) > 0
    assert torch.equal(routing.weights_NA[:, 0] > 0, kept_T)
    assert torch.equal(routing.experts_NA[kept_T, 0], mask_BTE[0, kept_T].argmax(-1))
    assert_close(routing.weights_NA[kept_T], probs_BT1[0, kept_T], 1e-6)
    assert routing.dropped.item() == pytest.approx(1 - kept_T.float().mean().item())


@pytest.mark.oracle
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1)])
def test_deepseek_layer_equals_hugging_face(groups):
    hf = import_oracle("transformers.models.deepseek_v3.modeling_deepseek_v3")
    n_groups, top_groups = groups
    shape = dict(top_k=3, n_shared_experts=2, routed_scale=2.5)
    moe = moe_of("deepseek", n_groups=n_groups, top_groups=top_groups, **shape).eval()
    moe.router.bias.copy_(noise(8, seed=3).abs() * 0.3)  # they mask with 0: equal where all are > 0
    config = hf.DeepseekV3Config(
        hidden_size=16,
        moe_intermediate_size=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=n_groups,
        topk_group=top_groups,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    config._experts_implementation = "eager"
    theirs = hf.DeepseekV3MoE(config)
    theirs.gate.weight.data = moe.router.weight.data
    theirs.gate.e_score_correction_bias.copy_(moe.router.bias)
    theirs.experts.gate_up_proj.data = moe.experts.gate_up_proj.data
    theirs.experts.down_proj.data = moe.experts.down_proj.data
    gate, up = moe.shared.gate_up_proj.weight.data.chunk(2)
    theirs.shared_experts.gate_proj.weight.data = gate
    theirs.shared_experts.up_proj.weight.data = up
    theirs.shared_experts.down_proj.weight.data = moe.shared.down_proj.weight.data
    x_BTD = noise(2, 9, 16)
    assert_close(moe(x_BTD)[0], theirs(x_BTD), 1e-5)


# ---------------------------------------------------------------------------------------------
# Switch: places, and what a token may see
# ---------------------------------------------------------------------------------------------


def queue_one_by_one(experts_BT, n_experts):
    waiting, queue_BT = [0] * n_experts, torch.zeros_like(experts_BT)
    for t in range(experts_BT.shape[1]):
        for b in range(experts_BT.shape[0]):
            waiting[experts_BT[b, t]] += 1
            queue_BT[b, t] = waiting[experts_BT[b, t]]
    return queue_BT


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), seeds)
def test_the_queue_is_in_time_order(B, T, E, seed):
    experts_BT = torch.randint(E, (B, T), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(lamoe.Switch.queue(experts_BT, E), queue_one_by_one(experts_BT, E))


@given(st.integers(1, 3), st.integers(2, 8), seeds, st.data())
def test_in_training_nothing_later_changes_a_token(B, T, seed, data):
    moe = moe_of("switch", seed, capacity_factor=0.5).train()
    b, t = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, T - 1))
    x_BTD = noise(B, T, 16, seed=seed)
    changed_BTD = x_BTD.clone()
    changed_BTD[b, t] = noise(16, seed=seed + 1)
    before, after = moe(x_BTD)[0], moe(changed_BTD)[0]
    torch.testing.assert_close(after[:, :t], before[:, :t])  # earlier times, in every row
    torch.testing.assert_close(after[:b, t], before[:b, t])  # the same time, in lower rows


def test_an_earlier_token_of_another_row_can_use_up_the_capacity():
    """What the docstring admits: rows do compete in training. In evaluation they don't."""
    moe = moe_of("switch", capacity_factor=0.01)  # one token per expert
    x_BTD = noise(1, 1, 16).expand(2, 1, 16)
    assert moe.train().router(x_BTD).weights_NA.count_nonzero() == 1
    assert moe.eval().router(x_BTD).weights_NA.count_nonzero() == 2


def test_a_finite_capacity_in_evaluation_is_refused_with_a_cache():
    config = lamoe.Config(vocab_size=9, router="switch", eval_capacity_factor=1.0)
    model = lamoe.LaMoE(config).eval()
    ids_BT = torch.zeros(1, 4, dtype=torch.long)
    assert model(ids_BT).logits.isfinite().all()
    with pytest.raises(ValueError, match="eval_capacity_factor"):
        model(ids_BT, cache=lamoe.Cache(config, 1, 8))


def test_dropped_tokens_pass_on_the_residual():
    moe = moe_of("switch", capacity_factor=0.2).train()
    y_BTD, routing = moe(noise(2, 20, 16))
    lost_N = routing.weights_NA[:, 0] == 0
    assert 0 < lost_N.float().mean().item() == pytest.approx(routing.dropped.item())
    assert y_BTD.flatten(0, 1)[lost_N].count_nonzero() == 0


# ---------------------------------------------------------------------------------------------
# Noisy: the load's probability, and noise in training only
# ---------------------------------------------------------------------------------------------


def test_the_load_probability_is_that_of_being_chosen_when_the_noise_is_drawn_again():
    """P(x, i): the others' noise stays as drawn, i's own is drawn anew [7, appendix A]."""
    moe = moe_of("noisy", n_experts=5, top_k=2).train()
    clean_NE = moe.router.logits(noise(1, 3, 16))
    std_NE = torch.nn.functional.softplus(
        moe.router.logits(noise(1, 3, 16), moe.router.noise_weight)
    )
    noisy_NE, ndtr, margins = clean_NE + noise(3, 5, seed=1) * std_NE, torch.special.ndtr, []
    with (
        mock.patch.object(torch, "randn_like", lambda x: noise(3, 5, seed=1)),
        mock.patch.object(torch.special, "ndtr", lambda x: (margins.append(x), ndtr(x))[1]),
    ):
        moe.router(noise(1, 3, 16))
    probability_NE = ndtr(margins[0])
    draws = 20_000
    for i in range(5):
        again = noisy_NE.expand(draws, 3, 5).clone()
        again[..., i] = clean_NE[:, i] + noise(draws, 3, seed=i + 2) * std_NE[:, i]
        chosen_N = (again.topk(2).indices == i).any(-1).float().mean(0)
        assert_close(chosen_N, probability_NE[:, i], 0.02)


def test_noise_is_drawn_in_training_only_and_from_the_global_generator():
    moe, x_BTD = moe_of("noisy"), noise(1, 50, 16)
    torch.manual_seed(1)
    first, second = moe.train().router(x_BTD), moe.router(x_BTD)
    torch.manual_seed(1)
    assert torch.equal(moe.router(x_BTD).weights_NA, first.weights_NA)
    assert not torch.equal(first.weights_NA, second.weights_NA)
    moe.eval()
    assert torch.equal(moe.router(x_BTD).weights_NA, moe.router(x_BTD).weights_NA)


def test_with_all_experts_chosen_the_load_loss_is_zero():
    """Then only the importance is left, and that of uniform weights is 0 too."""
    moe = moe_of("noisy", n_experts=3, top_k=3).train()
    moe.router.noise_weight.data.fill_(0).sub_(10.0)
    moe.router.weight.data.zero_()
    assert moe.router(noise(1, 8, 16).abs()).balance.item() == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------------------------
# DeepSeek: bias and groups
# ---------------------------------------------------------------------------------------------


def test_the_bias_chooses_and_does_not_weigh():
    moe, x_BTD = moe_of("deepseek", top_k=8), noise(1, 6, 16)
    before = moe.eval().router(x_BTD)
    moe.router.bias.copy_(noise(8, seed=2))
    after = moe.router(x_BTD)
    order, reorder = before.experts_NA.argsort(-1), after.experts_NA.argsort(-1)
    assert_close(after.weights_NA.gather(1, reorder), before.weights_NA.gather(1, order), 1e-6)
    moe = moe_of("deepseek", top_k=2).eval()
    moe.router.bias[3] = 9.0
    assert (moe.router(x_BTD).experts_NA == 3).any(-1).all()


def test_groups_hold_even_when_every_biased_score_is_negative():
    """A mask of 0 would beat them: the chosen expert would lie outside the chosen groups."""
    moe = moe_of("deepseek", n_groups=4, top_groups=1, top_k=2).eval()
    moe.router.bias.fill_(-5.0)
    experts_NA = moe.router(noise(2, 20, 16)).experts_NA
    assert torch.equal(experts_NA[:, 0] // 2, experts_NA[:, 1] // 2)


@pytest.mark.parametrize("order", [[4, 5, 0, 1, 6, 7, 2, 3], [1, 0, 2, 3, 5, 4, 7, 6]])
def test_permuting_whole_groups_or_inside_them_changes_nothing(order):
    """Rows of the router, biases and experts together. Across groups it does: the last line."""
    moe, shuffled, torn = (
        moe_of("deepseek", n_groups=4, top_groups=2, top_k=2).eval() for _ in range(3)
    )
    bias = noise(8, seed=1) / 10
    for layer, of in ((moe, range(8)), (shuffled, order), (torn, [0, 2, 1, 3, 4, 6, 5, 7])):
        layer.router.bias.copy_(bias[list(of)])
        for weight in layer.parameters():
            weight.data = weight.data[list(of)]
    x_BTD = noise(3, 20, 16, seed=2)
    assert_close(shuffled(x_BTD)[0], moe(x_BTD)[0], 1e-6)
    assert (torn(x_BTD)[0] - moe(x_BTD)[0]).abs().max() > 1e-3


def test_the_bias_evens_out_a_constant_preference():
    moe = moe_of("deepseek", bias_rate=0.005, top_k=1).train()
    moe.router.weight.data *= 0.1
    moe.router.weight.data[0] += 0.3
    x_BTD = noise(4, 64, 16) + 0.5
    loads = []
    for _ in range(800):
        loads.append(moe.router.load(moe.router(x_BTD).experts_NA))
        moe.router.update_bias(loads[-1])
    assert loads[0].max() > 0.5 and loads[-1].max() < 0.2
    assert moe.router.bias.mean().abs() < 1e-6


def test_the_bias_moves_in_a_model_in_bf16_too():
    """There 0.5 and the next number are four steps apart. In fp32 it stays the same memory."""
    router = moe_of("deepseek", n_experts=4).router
    place = router.bias.data_ptr()
    router.update_bias(torch.tensor([0.0, 0.5, 0.0, 0.5]))
    assert router.bias.data_ptr() == place and router.bias.abs().min() > 0
    router.bfloat16().bias.fill_(0.5)
    for _ in range(20):
        router.update_bias(torch.tensor([0.0, 0.5, 0.0, 0.5]))
    assert torch.allclose(router.bias.float(), torch.tensor([0.52, 0.48, 0.52, 0.48]))


def test_the_sequence_loss_is_one_when_uniform():
    moe = moe_of("deepseek", sequence_weight=1.0, n_experts=4, top_k=4).train()
    moe.router.weight.data.zero_()
    assert moe.router(noise(2, 5, 16)).balance.item() == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["topk", "noisy", "switch", "deepseek"])
def test_at_k_1_the_task_teaches_only_the_router_that_keeps_the_raw_probability(router):
    moe = moe_of(router, top_k=1, capacity_factor=8.0).train()
    moe(noise(2, 16, 16))[0].square().sum().backward()
    gradient = moe.router.weight.grad.abs().max().item()
    assert gradient > 0.1 if router == "switch" else gradient < 1e-4


@given(st.sampled_from(sorted(lamoe.ROUTERS)), st.integers(1, 4), seeds)
def test_weights_are_not_negative_and_sum_as_the_paper_says(router, k, seed):
    moe = moe_of(router, seed, top_k=k, routed_scale=2.5, capacity_factor=0.7)
    for mode in (True, False):
        routing = moe.train(mode).router(noise(2, 7, 16, seed=seed))
        assert (routing.weights_NA >= 0).all()
        sums_N = routing.weights_NA.sum(-1)
        if router == "switch":
            assert (sums_N <= 1).all()
        else:
            whole = 2.5 if router == "deepseek" else 1.0
            assert_close(sums_N, torch.full_like(sums_N, whole), 1e-5)


def test_deepseeks_loss_counts_the_highest_scores_and_not_what_the_bias_chose():
    c = small_config(router="deepseek", n_experts=4, top_k=1)
    router = randomise(lamoe.DeepSeek(c)).train()
    x_BTD = noise(2, 8, c.dim)
    before = router(x_BTD)
    router.bias[3] = 9.0  # all go to expert 3 now
    after = router(x_BTD)
    assert (after.experts_NA == 3).all() and not torch.equal(after.experts_NA, before.experts_NA)
    assert torch.equal(after.balance, before.balance)


def test_switchs_load_is_what_was_wanted_and_not_what_capacity_left():
    c = small_config(router="switch", n_experts=4, capacity_factor=0.5, jitter=0.0)
    router = lamoe.Switch(c).train()
    torch.nn.init.zeros_(router.weight)  # a tie: all want expert 0, which takes 2 of 16
    routing = router(torch.ones(2, 8, c.dim))
    assert routing.dropped == 14 / 16 and routing.load_E.tolist() == [1, 0, 0, 0]
    router.weight.data[1, 0], x_BTD = 1.0, torch.zeros(2, 8, c.dim)
    x_BTD[:, 4:6, 0] = 1.0  # 4 of 16 want expert 1
    assert router(x_BTD).load_E.tolist() == [0.75, 0.25, 0, 0]
