"""Hugging Face's Mixtral, Llama and Qwen3-MoE with our weights must compute what we compute."""

import pytest
import torch
import torch.nn.functional as F
from conftest import import_oracle, random_ids, random_model, small_config

pytestmark = pytest.mark.oracle

RENAMED = {  # ours -> theirs; what is not here keeps its name
    "embed.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    "attn_norm": "input_layernorm",
    "attn.": "self_attn.",
    "ffn_norm": "post_attention_layernorm",
    "ffn.router": "mlp.gate",
    "ffn.": "mlp.",
    "head.": "lm_head.",
}

SHAPES = [
    dict(),
    dict(n_heads=4, n_kv_heads=1, n_experts=8, top_k=3, rope_theta=500_000.0),
    dict(dim=24, n_heads=3, n_kv_heads=3, head_dim=6, n_experts=5, top_k=1, norm_eps=1e-3),
    dict(tie_embeddings=True, head_dim=10, n_experts=3, top_k=3),
    dict(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, hidden_dim=20, n_experts=16, top_k=4),
]


def to_their_names(tensors):
    """Our named weights or gradients, under Hugging Face's names."""
    theirs = {}
    for name, tensor in tensors.items():
        name = name if name != "norm.weight" else "model.norm.weight"
        for ours, their in RENAMED.items():
            name = name.replace(ours, their)
        if name.endswith("mlp.gate_up_proj.weight"):  # a dense layer keeps them apart
            gate, up = tensor.chunk(2)
            theirs[name.replace("gate_up", "gate")] = gate
            theirs[name.replace("gate_up", "up")] = up
        else:
            theirs[name] = tensor
    return theirs


def their_model(kind, model, **their_fields):
    """transformers' `kind`ForCausalLM with our model's shape and weights."""
    transformers, c = import_oracle("transformers"), model.config
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_size,
        intermediate_size=c.hidden_dim,
        max_position_embeddings=c.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        **their_fields,
    )
    twin = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    missing = twin.load_state_dict(to_their_names(model.state_dict()), strict=False)
    assert not missing.unexpected_keys and not missing.missing_keys
    return twin


def mixtral(model):
    c = model.config
    return their_model("Mixtral", model, num_local_experts=c.n_experts, num_experts_per_tok=c.top_k)


def qwen3_moe(model):
    c = model.config
    return their_model(
        "Qwen3Moe",
        model,
        moe_intermediate_size=c.hidden_dim,
        num_experts=c.n_experts,
        num_experts_per_tok=c.top_k,
        norm_topk_prob=True,
    )


def llama(model):
    return their_model("Llama", model)


CASES = [(mixtral, shape) for shape in SHAPES]
CASES += [(qwen3_moe, {**shape, "qk_norm": True}) for shape in SHAPES]
CASES += [(llama, {**shape, "n_experts": 1}) for shape in SHAPES]
names = [f"{twin_of.__name__}-{i % len(SHAPES)}" for i, (twin_of, _) in enumerate(CASES)]
every_case = pytest.mark.parametrize("twin_of, shape", CASES, ids=names)


@every_case
def test_logits_equal_hugging_face(twin_of, shape):
    model = random_model(small_config(**shape), seed=1)
    ids_BT = random_ids(model.config, 3, 16)
    with torch.no_grad():
        ours, theirs = model(ids_BT).logits, twin_of(model)(ids_BT).logits
    assert theirs.abs().max() > 1  # so 1e-4 is a small difference
    assert (ours - theirs).abs().max() < 1e-4


@every_case
def test_gradients_equal_hugging_face_for_every_parameter(twin_of, shape):
    model = random_model(small_config(**shape), seed=2)
    ids_BT, targets_BT = (random_ids(model.config, 3, 16, seed=seed) for seed in (0, 1))
    twin = twin_of(model)
    model(ids_BT, targets_BT).loss.backward()
    F.cross_entropy(twin(ids_BT).logits.flatten(0, 1), targets_BT.flatten()).backward()
    ours = to_their_names({name: weight.grad for name, weight in model.named_parameters()})
    theirs = {name: weight.grad for name, weight in twin.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, name


@pytest.mark.parametrize("shape", SHAPES)
def test_balance_loss_equals_mixtrals_layer_by_layer(shape):
    """Theirs counts f to a sum of k, ours to a sum of 1: on one layer alone it is k times ours."""
    import_oracle("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = random_model(small_config(**shape, balance_weight=1.0, z_weight=0.0), seed=3).train()
    c, twin = model.config, mixtral(model)
    ids_BT = random_ids(c, 3, 16)
    all_logits = twin(ids_BT, output_router_logits=True).router_logits
    assert len(all_logits) == c.n_layers
    theirs = sum(load_balancing_loss_func((x,), c.n_experts, c.top_k) for x in all_logits) / c.top_k
    ours = model(ids_BT).aux
    assert (ours - theirs).abs() < 1e-5
    ours.backward()
    theirs.backward()
    for block, layer in zip(model.blocks, twin.model.layers, strict=True):
        assert (block.ffn.router.weight.grad - layer.mlp.gate.weight.grad).abs().max() < 1e-5


@pytest.mark.parametrize("twin_of, shape", [CASES[0], CASES[5], CASES[10]])
def test_greedy_text_equals_hugging_face(twin_of, shape):
    model = random_model(small_config(**shape), seed=4)
    ids_BT = random_ids(model.config, 3, 4)
    steps = list(model.generate(ids_BT, 12, temperature=0))
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    theirs = twin_of(model).generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
    assert torch.equal(torch.stack(steps, dim=1), theirs[:, 4:])
