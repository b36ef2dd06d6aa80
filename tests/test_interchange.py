"""Models and tokenizers go out to Hugging Face's folders and come in from them unchanged.

The oracles are transformers, safetensors and tokenizers: what we write they must open and compute
the same with, and what they write must open here. No network; every model is tiny and random.
"""

import contextlib
import dataclasses
import importlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_bpe import fuzz_text
from conftest import (
    assert_close,
    import_oracle,
    random_ids,
    random_model,
    randomise,
    small_config,
    with_biases,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import TINY, call, make_text

import bpe
import lamoe
import sample
import train
from bpe import SPECIAL, Tokenizer
from data import datasets, foreign, formats, tokens
from data.exchange import experts, export, load
from data.exchange.huggingface import to_hf_config
from data.run import log
from data.run.checkpoint import read, save

program = importlib.import_module("data.exchange.export")
ROOT = Path(lamoe.__file__).parent
few = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = {  # model_type: what makes ours it
    "llama": dict(n_experts=1),
    "qwen3": dict(n_experts=1, qk_norm=True),
    "mixtral": dict(),
    "qwen3_moe": dict(qk_norm=True),
    "glm4_moe": dict(router="deepseek", qk_norm=True, n_shared_experts=1),
    "lara_mini": dict(qk_norm=True, n_shared_experts=1),
    "granitemoeshared": dict(n_shared_experts=1),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@st.composite
def shapes(draw, kind):
    """Fields of a Config that exports as `kind`."""
    n_kv_heads, head_dim = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    n_heads, n_experts = n_kv_heads * draw(st.integers(1, 3)), draw(st.integers(2, 6))
    fields = dict(vocab_size=31, seq_len=16, n_layers=draw(st.integers(1, 3)))
    fields |= dict(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, n_experts=n_experts)
    fields |= dict(dim=4 * draw(st.integers(1, 5)), hidden_dim=4 * draw(st.integers(1, 4)))
    fields |= dict(top_k=draw(st.integers(1, n_experts)), tie_embeddings=draw(st.booleans()))
    fields |= dict(rope_theta=draw(st.sampled_from([100.0, 1e4, 1e6])))
    fields |= dict(rope_factor=draw(st.sampled_from([1.0, 8.0])))
    fields |= dict(norm_eps=draw(st.sampled_from([1e-6, 1e-5, 0.1])))
    if kind == "llama":  # theirs insists
        fields |= dict(dim=4 * n_heads)
    fields |= KINDS[kind]
    if kind in ("qwen3_moe", "glm4_moe"):
        fields |= dict(n_dense_layers=draw(st.integers(0, 1)))
    if kind in ("qwen3_moe", "lara_mini"):
        fields |= dict(router=draw(st.sampled_from(["topk", "noisy", "switch"])))
    if "n_shared_experts" in fields:
        fields |= dict(n_shared_experts=draw(st.integers(1, 2)))
    if kind == "glm4_moe":
        fields |= draw(deepseek_fields(n_experts))
    return fields


@st.composite
def deepseek_fields(draw, n_experts):
    """Groups of two or more experts, of which a token sees top_k or more."""
    groups = [n for n in range(1, n_experts // 2 + 1) if n_experts % n == 0]
    n_groups, shared = draw(st.sampled_from(groups)), draw(st.integers(0, 2))
    top_groups = draw(st.integers(1, n_groups))
    top_k = draw(st.integers(1, n_experts // n_groups * top_groups))
    fields = dict(n_groups=n_groups, top_groups=top_groups, top_k=top_k, n_shared_experts=shared)
    scale = draw(st.sampled_from([1.0, 2.5]))
    return {**fields, "routed_scale": scale, "qk_norm": draw(st.booleans())}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # runs without pictures, in less time
    return tmp_path


def fresh(name="folder"):
    shutil.rmtree(name, ignore_errors=True)
    return name


def theirs(folder, **options):
    """What transformers makes of a folder."""
    transformers = import_oracle("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def random_theirs(config, **more):
    """A random model of transformers with our shape: their class, their initialisation of names."""
    transformers = import_oracle("transformers")
    fields = to_hf_config(config, [*range(config.n_dense_layers)]) | more
    their_config = transformers.AutoConfig.for_model(**fields)
    twin = randomise(transformers.AutoModelForCausalLM.from_config(their_config)).eval()
    return with_biases(twin, "e_score_correction_bias")


def save_tokenizer(tokenizer, folder):
    for name, text in foreign.tokenizer_files(tokenizer).items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


def edit_config(folder, **changes):
    """Changes config.json; None removes a key."""
    path = Path(folder) / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def to_dialect_4(folder):
    """config.json as transformers 4 wrote it."""
    rope = json.loads((Path(folder) / "config.json").read_text())["rope_parameters"]
    edit_config(folder, partial_rotary_factor=rope.pop("partial_rotary_factor", None))
    theta, scaled = rope.pop("rope_theta"), rope["rope_type"] != "default"
    edit_config(folder, rope_parameters=None, dtype=None, torch_dtype="float32", rope_theta=theta)
    edit_config(folder, rope_scaling=rope if scaled else None)


def stored_tensors(folder):
    """{name: (dtype, shape, bytes)}, as safetensors reads them."""
    safetensors = import_oracle("safetensors.torch")
    tensors = {}
    for path in Path(folder).glob("*.safetensors"):
        tensors |= safetensors.load_file(path)
    return {
        name: (t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def assert_same_logits(model, twin):
    ids_BT = random_ids(model.config, 2, model.config.seq_len)
    with torch.no_grad():
        ours, other = model(ids_BT).logits, twin(ids_BT).logits.float()
    assert other.abs().max() > 0.1
    assert_close(ours, other, 1e-4)


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


@pytest.mark.oracle
@every_kind
@few
@given(data=st.data())
def test_what_we_export_transformers_computes_equally(kind, data):
    model = random_model(lamoe.Config(**data.draw(shapes(kind))), seed=1)
    export(with_biases(model, "router.bias"), None, fresh())
    twin = theirs("folder")
    assert twin.config.model_type == kind and twin.dtype == torch.float32
    assert_same_logits(model, twin)
    again = load("folder")[0]
    assert_same_logits(again, twin)
    same = ["n_shared_experts", "n_dense_layers", "qk_norm", "routed_scale", "head_size"]
    for name in same + ["n_active"] * (model.config.n_experts > 1):
        assert getattr(again.config, name) == getattr(model.config, name)


@pytest.mark.oracle
@every_kind
@pytest.mark.parametrize("dialect", [4, 5])
@few
@given(data=st.data())
def test_what_transformers_saves_we_compute_equally(kind, dialect, data):
    fields = data.draw(shapes(kind))
    if kind == "glm4_moe":  # it has none without
        fields["n_shared_experts"] = max(1, fields["n_shared_experts"])
    config = lamoe.Config(**fields)
    twin = random_theirs(config)
    shard_size = data.draw(st.sampled_from(["5GB", "2KB"]))
    twin.save_pretrained(fresh(), max_shard_size=shard_size)
    if dialect == 4:
        to_dialect_4("folder")
    model, tokenizer = load("folder")
    assert tokenizer is None and not model.training
    assert_same_logits(model, twin)
    for name in ("rope_theta", "rope_factor", "norm_eps", "tie_embeddings", "n_kv_heads"):
        assert getattr(model.config, name) == getattr(config, name)


@pytest.mark.oracle
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_then_export_gives_identical_bytes_of_every_tensor(kind, dtype):
    twin = random_theirs(small_config(**KINDS[kind])).to(dtype)
    for name, bias in twin.named_buffers():  # transformers keeps it so
        if name.endswith("e_score_correction_bias"):
            bias.data = bias.data.float()
    twin.save_pretrained("folder")
    model, _ = load("folder")
    assert {p.dtype for p in model.parameters()} == {dtype}
    export(model, None, "again")
    assert stored_tensors("again") == stored_tensors("folder")
    model, _ = load("again")
    export(model, None, "third")
    for path in Path("again").iterdir():
        assert path.read_bytes() == (Path("third") / path.name).read_bytes()


@pytest.mark.oracle
def test_a_router_stored_in_fp32_stays_exact_in_a_bf16_model():
    twin = random_theirs(small_config()).to(torch.bfloat16)
    twin.save_pretrained("folder")
    path, safetensors = Path("folder/model.safetensors"), import_oracle("safetensors.torch")
    tensors = safetensors.load_file(path)
    gates = {k: v.float() + 1e-5 for k, v in tensors.items() if k.endswith("gate.weight")}
    safetensors.save_file({**tensors, **gates}, path, {"format": "pt"})
    model, _ = load("folder")
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.blocks[0].ffn.router.weight.dtype == torch.float32
    export(model, None, "again")
    assert stored_tensors("again") == stored_tensors("folder")


@pytest.mark.oracle
def test_a_large_model_is_written_in_shards_that_transformers_reads():
    model = random_model(small_config())
    export(model, None, "folder", shard_bytes=4000)
    export(model, None, "whole")
    assert len(list(Path("folder").glob("model-*-of-*.safetensors"))) > 3
    assert stored_tensors("folder") == stored_tensors("whole")
    assert_same_logits(model, theirs("folder"))
    assert_same_logits(model, load("folder")[0])


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_kind
def test_many_shards_of_any_number_format_are_read(kind, dtype):
    twin = random_theirs(small_config(**KINDS[kind])).to(dtype)
    twin.save_pretrained("folder", max_shard_size="1KB")
    assert len(list(Path("folder").glob("model-*-of-*.safetensors"))) > 8
    model, _ = load("folder")  # of fp16, which we don't compute with, fp32 is made
    wanted = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert model.embed.weight.dtype == wanted
    assert_same_logits(
        load("folder", dtype=torch.float32)[0], theirs("folder", dtype=torch.float32)
    )


def test_a_model_in_double_precision_comes_back():
    model = random_model(small_config())
    export(model.double(), None, "folder")
    assert load("folder")[0].embed.weight.dtype == torch.float32
    assert_same_logits(model.float(), load("folder")[0])


@pytest.mark.oracle
@pytest.mark.parametrize("kind, n_dense", [("mixtral", 0), ("qwen3_moe", 0), ("qwen3_moe", 1)])
@pytest.mark.parametrize("shard_size", ["5GB", "2KB"])
def test_experts_that_transformers_5_left_together_are_read(kind, n_dense, shard_size):
    twin = random_theirs(small_config(**KINDS[kind], n_dense_layers=n_dense))
    options = dict(save_original_format=False, max_shard_size=shard_size)
    twin.save_pretrained("folder", **options)
    names = stored_tensors("folder")
    assert f"model.layers.{n_dense}.mlp.experts.gate_up_proj" in names
    assert_same_logits(load("folder")[0], twin)
    half = twin.to(torch.bfloat16)
    half.save_pretrained("half", **options)
    safetensors, gate = (
        import_oracle("safetensors.torch"),
        f"model.layers.{n_dense}.mlp.gate.weight",
    )
    for path in Path("half").glob("*.safetensors"):  # a router in fp32 stays so
        stored = safetensors.load_file(path)
        stored |= {gate: stored[gate].float()} if gate in stored else {}
        safetensors.save_file(stored, path, {"format": "pt"})
    model = load("half")[0]
    assert model.blocks[n_dense].ffn.router.weight.dtype == torch.float32
    assert model.embed.weight.dtype == torch.bfloat16
    edit_config("folder", **{"num_local_experts": 5, "num_experts": 5})
    assert_refused(["gate", "[4, 16]", "[5, 16]"])


ROPES = [
    dict(rope_parameters={"type": "default", "rope_theta": 1e4}),
    dict(rope_parameters={"rope_theta": 1e4}),
    dict(rope_parameters={"rope_type": "default", "type": "default", "factor": 1.0}),
    dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 1.0}),
    dict(rope_parameters=None, rope_scaling={"type": "default"}),
    dict(rope_parameters=None, rope_scaling={"rope_type": "default"}, rope_theta=1e4),
    dict(rope_parameters={"rope_type": "default"}, rope_theta=5e5),
    dict(rope_parameters=None, rope_theta=5e5),
    dict(rope_parameters=None, rope_scaling=None),
]


@pytest.mark.oracle
@pytest.mark.parametrize("spelling", ROPES)
def test_rope_that_is_plain_in_any_spelling_is_plain(spelling):
    export(random_model(small_config(n_experts=1)), None, "folder")
    edit_config("folder", **{"rope_theta": None, **spelling})
    model = load("folder")[0]
    assert model.config.rope_factor == 1
    assert model.config.rope_theta == spelling.get("rope_theta", 1e4)
    assert_same_logits(model, theirs("folder"))


def test_llama_3s_rope_has_two_spellings():
    export(random_model(small_config(n_experts=1, rope_factor=8.0)), None, "folder")
    rope = {**LLAMA3, "type": "llama3"}
    edit_config("folder", rope_parameters=rope, rope_scaling=None)
    assert load("folder")[0].config.rope_factor == 8
    rope = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    edit_config("folder", rope_parameters=None, rope_scaling=rope, rope_theta=1e4)
    assert load("folder")[0].config.rope_factor == 8


GRANITES = {
    "granite": dict(n_experts=1),
    "granitemoe": dict(),
    "granitemoeshared": dict(n_shared_experts=2),
}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", GRANITES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, dict(save_original_format=False), dict(max_shard_size=9)])
def test_a_granite_is_read_with_its_constants_in_the_weights(kind, tied, options):
    config = small_config(**GRANITES[kind], tie_embeddings=tied)
    factors = dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=6)
    twin = random_theirs(config, model_type=kind, attention_multiplier=0.09, **factors)
    twin.save_pretrained("folder", **options)
    model = load("folder")[0]
    assert_same_logits(model, twin)
    assert model.config.tie_embeddings is False and model.config.rope_theta == 1e4
    export(model, None, "again")
    assert_same_logits(model, theirs("again"))
    edit_config("folder", rope_parameters=None, rope_theta=None, attention_multiplier=None)
    assert_same_logits(load("folder")[0], theirs("folder"))
    edit_config("folder", embedding_multiplier=None, logits_scaling=None, residual_multiplier=None)
    model = load("folder")[0]
    assert model.config.tie_embeddings is tied
    assert_same_logits(model, theirs("folder"))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["olmoe", "olmo2"])
def test_an_olmo_is_refused_by_name_for_its_norm_is_over_all_heads(kind):
    random_theirs(small_config(), model_type=kind).save_pretrained("folder")
    assert_refused([f"model_type '{kind}'"])


@pytest.mark.oracle
@few
@given(data=st.data())
def test_shared_experts_become_a_qwen3_next_with_closed_gates(data):
    fields = data.draw(shapes("lara_mini"))
    fields |= dict(n_dense_layers=data.draw(st.integers(0, 1)))
    model = random_model(lamoe.Config(**fields), seed=1)
    export(model, None, fresh(), family="qwen3_next")
    twin, again = theirs("folder"), load("folder")[0]
    assert twin.config.model_type == "qwen3_next"
    assert_same_logits(model, twin)
    assert_same_logits(again, twin)
    for name, weight in again.named_parameters():
        original = model.get_parameter(name)
        assert torch.equal(weight, original) or ("norm" in name and weight.allclose(original))
    twin.save_pretrained(fresh("again"))
    assert_same_logits(model, load("again")[0])


@pytest.mark.oracle
def test_a_qwen3_next_talks_as_ours_and_is_refused_once_its_gates_are_open():
    shape = dict(qk_norm=True, n_shared_experts=1, seq_len=64, vocab_size=50)
    model = random_model(small_config(**shape), seed=3)
    export(model, None, "folder", family="qwen3_next")
    ids_BT = random_ids(model.config, 1, 4)
    ours = torch.stack(list(model.generate(ids_BT, 50, temperature=0)), dim=1)
    options = dict(max_new_tokens=50, do_sample=False, pad_token_id=0)
    options["attention_mask"] = torch.ones_like(ids_BT)
    twin = theirs("folder")
    assert torch.equal(ours, twin.generate(ids_BT, **options)[:, 4:])
    for name in ("mlp.shared_expert_gate.weight", "self_attn.q_proj.weight"):
        changed = theirs("folder")
        with torch.no_grad():
            changed.get_parameter(f"model.layers.1.{name}")[-1, -1] = 1e-3
        changed.save_pretrained(fresh("open"))
        assert_refused([f"model.layers.1.{name}", "gate"], lambda: load("open"))
    for changes, words in (
        (dict(layer_types=["full_attention", "linear_attention"]), ["linear_attention"]),
        (dict(layer_types=None), ["layer_types"]),
        (dict(rope_parameters=None, partial_rotary_factor=None), ["partial_rotary_factor=0.25"]),
    ):
        export(model, None, fresh(), family="qwen3_next")
        edit_config("folder", **changes)
        assert_refused(words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_qwen3_next_comes_back_bit_for_bit_where_its_norms_are_near_1(dtype):
    shape = dict(qk_norm=True, n_shared_experts=1)
    model = random_model(small_config(**shape)).to(dtype)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.clamp_(0.5, 2)
    export(model, None, "folder", family="qwen3_next")
    again = load("folder")[0]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name


@pytest.mark.oracle
@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_training_an_export_there_asks_for_as_much_balance_as_here(kind, n_layers):
    config = small_config(**KINDS[kind], n_layers=n_layers, balance_weight=0.5, z_weight=0.0)
    model = random_model(config).train()
    with torch.no_grad():  # every layer alike: then their loss of all layers is one of ours
        for block in model.blocks:
            block.load_state_dict(model.blocks[0].state_dict())
            block.attn.o_proj.weight.zero_()
            block.ffn.experts.down_proj.zero_()
    export(model, None, "folder")
    twin, ids_BT = theirs("folder"), random_ids(config, 3, 16)
    out = twin(ids_BT, labels=ids_BT)
    plain = twin(ids_BT, labels=ids_BT, output_router_logits=False)
    ours = model(ids_BT).balance
    assert ours > 0.5 * n_layers
    assert_close((out.loss - plain.loss).detach(), ours.detach(), 1e-5)
    ours.backward()
    (out.loss - plain.loss).backward()
    for block, layer in zip(model.blocks, twin.model.layers, strict=True):
        assert_close(layer.mlp.gate.weight.grad, block.ffn.router.weight.grad, 1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_rope_of_llama_3_equals_theirs_over_its_whole_context(factor):
    config = small_config(head_dim=64, rope_theta=5e5, rope_factor=factor, n_experts=1)
    rotary = random_theirs(config, max_position_embeddings=131072).model.rotary_emb
    at = torch.cat([torch.arange(300), torch.arange(300, 131072, 997)])
    cos, sin = rotary(torch.zeros(1), at[None])
    ours = lamoe.rope_table(64, 131072, 5e5, factor)
    for part, other in zip(ours, (cos[0], sin[0]), strict=True):
        # fp32 angles of 1e5 are known to 0.01
        assert (part[at] - other).abs().max() < 0.02 and (
            part[:300] - other[:300]
        ).abs().max() < 1e-4


@pytest.mark.oracle
def test_mistral_without_a_window_is_a_llama():
    config = small_config(n_experts=1)
    random_theirs(config, model_type="mistral", sliding_window=None).save_pretrained("folder")
    edit_config("folder", sliding_window=16)
    assert_same_logits(load("folder")[0], theirs("folder"))
    path = Path("folder/config.json")
    path.write_text(path.read_text().replace('"sliding_window": 16', '"sliding_window": null'))
    assert_same_logits(load("folder")[0], theirs("folder"))


@pytest.mark.oracle
def test_greedy_text_of_200_tokens_equals_transformers():
    model = random_model(small_config(seq_len=210, vocab_size=50, qk_norm=True), seed=3)
    export(model, None, "folder")
    ids_BT = random_ids(model.config, 1, 4)
    ours = torch.stack(list(model.generate(ids_BT, 200, temperature=0)), dim=1)
    options = dict(max_new_tokens=200, do_sample=False, pad_token_id=0)
    options["attention_mask"] = torch.ones_like(ids_BT)
    assert torch.equal(ours, theirs("folder").generate(ids_BT, **options)[:, 4:])
    assert len(ours.unique()) > 3


@every_kind
def test_bf16_weights_compute_what_fp32_does_up_to_rounding(kind):
    model = random_model(small_config(**KINDS[kind]), seed=5)
    export(model, None, "folder")
    half, _ = load("folder", dtype=torch.bfloat16)
    kinds = {("router" in name, p.dtype) for name, p in half.named_parameters()}
    assert kinds <= {(False, torch.bfloat16), (True, torch.float32)}
    assert half.cos.dtype == torch.float32
    ids_BT = random_ids(model.config, 2, 16)
    with torch.no_grad():
        ours, rough = model(ids_BT).logits, half(ids_BT).logits
    assert 0 < (ours - rough).abs().mean() < 0.05 * ours.abs().mean()
    cached = torch.stack(list(half.generate(ids_BT[:, :4], 10, temperature=0)))
    assert cached.shape == (10, 2)


def test_bf16_from_a_checkpoint_rounds_all_but_the_router():
    model = random_model(small_config(), seed=5)
    checkpoint = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    save("model.pt", checkpoint)
    half, _ = load("model.pt", dtype=torch.bfloat16)
    for name, weight in half.named_parameters():
        assert weight.dtype == (torch.float32 if "router" in name else torch.bfloat16)
        assert torch.equal(weight, model.get_parameter(name).to(weight.dtype))


@pytest.mark.oracle
@every_kind
def test_what_a_config_leaves_out_is_the_familys_default(kind):
    head_dim = 128 if kind in ("qwen3", "lara_mini") else None
    fields = dict(n_heads=2, n_kv_heads=2, head_dim=head_dim, tie_embeddings=kind == "lara_mini")
    random_theirs(small_config(**KINDS[kind], **fields)).save_pretrained("folder")
    left_out = ["rope_parameters", "rope_theta", "head_dim", "tie_word_embeddings", "layer_types"]
    left_out += ["num_key_value_heads"] if kind == "llama" else []
    left_out += ["hidden_act", "attention_bias", "sliding_window", "mlp_only_layers"]
    needed = {"glm4_moe": ["rope_parameters"], "lara_mini": ["layer_types", "sliding_window"]}
    edit_config("folder", **dict.fromkeys({*left_out} - {*needed.get(kind, [])}))
    twin = theirs("folder")
    assert load("folder")[0].config.rope_theta == twin.config.rope_parameters["rope_theta"]
    assert_same_logits(load("folder")[0], twin)


@pytest.mark.oracle
def test_old_folders_with_redundant_tensors_are_read():
    twin = random_theirs(small_config(n_experts=1, tie_embeddings=True))
    twin.save_pretrained("folder")
    path, safetensors = Path("folder/model.safetensors"), import_oracle("safetensors.torch")
    tensors = safetensors.load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    safetensors.save_file(tensors, path, {"format": "pt"})
    assert_same_logits(load("folder")[0], twin)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stream_in_without_a_second_copy_in_memory():
    config = small_config(dim=512, hidden_dim=1024, n_layers=4, vocab_size=8192, n_experts=8)
    export(lamoe.LaMoE(config).to(torch.bfloat16), None, "folder")
    size = sum(path.stat().st_size for path in Path("folder").iterdir())
    assert size > 100e6
    code = """if True:
        from data.exchange import load
        def peak():
            status = dict(line.split(":") for line in open("/proc/self/status"))
            return 1024 * int(status["VmHWM"].split()[0])
        before = peak()
        model, _ = load("folder")
        print(peak() - before)"""
    run = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    grown = int(subprocess.run(run, env=env, capture_output=True, check=True, text=True).stdout)
    assert 0.5 * size < grown < 1.2 * size


# ---------------------------------------------------------------------------------------------
# Refusals: never a model that is almost right
# ---------------------------------------------------------------------------------------------


def assert_refused(words, call=lambda: load("folder")):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 1e4}
REFUSED = [
    ("llama", dict(model_type="gemma"), ["gemma", "mixtral"]),
    ("llama", dict(model_type=["llama"]), ["model_type"]),
    ("llama", dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    ("llama", dict(attention_bias=True), ["attention_bias"]),
    ("llama", dict(mlp_bias=True), ["mlp_bias"]),
    ("llama", dict(quantization_config={"bits": 4}), ["quantization_config"]),
    ("mixtral", dict(sliding_window=15), ["sliding_window=15", "max_position_embeddings"]),
    ("qwen3", dict(use_sliding_window=True, sliding_window=8), ["sliding_window=8"]),
    ("llama", dict(model_type="mistral", max_position_embeddings=5000), ["sliding_window=4096"]),
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), ["yarn"]),
    ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), ["linear"]),
    ("llama", dict(rope_parameters={**LLAMA3, "low_freq_factor": 2.0}), ["low_freq_factor"]),
    ("llama", dict(rope_parameters={k: LLAMA3[k] for k in LLAMA3 if k != "factor"}), ["llama3"]),
    ("llama", dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), ["full_attention"]),
    ("llama", dict(rope_parameters={"partial_rotary_factor": 0.5}), ["partial_rotary_factor"]),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2}), ["dynam"]),
    ("llama", dict(rope_scaling={"type": "yarn", "rope_type": "default"}), ["yarn"]),
    ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0}), ["linear"]),
    ("llama", dict(rope_theta=5e5), ["rope_theta=500000.0"]),
    ("llama", dict(partial_rotary_factor=0.25), ["partial_rotary_factor"]),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), ["sliding_attention"]),
    ("qwen3_moe", dict(norm_topk_prob=False), ["norm_topk_prob"]),
    ("qwen3_moe", dict(decoder_sparse_step=2), ["decoder_sparse_step"]),
    ("qwen3_moe", dict(mlp_only_layers=[1]), ["mlp_only_layers=[1]"]),
    ("mixtral", dict(num_local_experts=1), ["mixtral", "only 'llama'"]),
    ("llama", dict(hidden_size="16"), ["hidden_size='16'", "int"]),
    ("llama", dict(hidden_size=True), ["hidden_size=True"]),
    ("llama", dict(hidden_size=10**30), ["hidden_size=1000"]),
    ("llama", dict(num_attention_heads=3), ["n_kv_heads"]),
    ("llama", dict(num_hidden_layers=10**12), ["layers"]),
    ("llama", dict(num_hidden_layers=1), ["unexpected", "model.layers.1."]),
    ("llama", dict(num_hidden_layers=3), ["lacks", "model.layers.2."]),
    ("mixtral", dict(num_local_experts=10**9), ["experts"]),
    ("llama", dict(max_position_embeddings=10**12), ["max_position_embeddings"]),
    ("llama", dict(intermediate_size=11), ["gate_proj", "[12, 16]", "[11, 16]"]),
    ("llama", dict(intermediate_size=10**15), ["can't be read"]),
    ("llama", dict(head_dim=8), ["q_proj", "[16, 16]", "[32, 16]"]),
    ("llama", dict(vocab_size=24), ["embed_tokens", "[24, 16]"]),
    ("llama", dict(rms_norm_eps=float("nan")), ["norm_eps"]),
    ("llama", dict(intermediate_size=None), ["lacks", "intermediate_size"]),
    ("mixtral", dict(num_experts_per_tok=5), ["top_k=5"]),
    ("glm4_moe", dict(rope_parameters=None, partial_rotary_factor=None), ["partial", "0.5"]),
    ("glm4_moe", dict(norm_topk_prob=False), ["norm_topk_prob"]),
    ("glm4_moe", dict(first_k_dense_replace=1), ["layers.0.mlp"]),
    ("glm4_moe", dict(n_shared_experts=2), ["shared_experts", "[12, 16]", "[24, 16]"]),
    ("lara_mini", dict(layer_types=None), ["layer_types"]),
    ("lara_mini", dict(layer_types=["sliding_attention", "full_attention"]), ["full_attention"]),
    ("lara_mini", dict(sliding_window=15), ["sliding_window=15"]),
    ("lara_mini", dict(norm_topk_prob=False), ["norm_topk_prob"]),
    ("lara_mini", dict(shared_expert_intermediate_size=13), ["shared_expert_intermediate_size=13"]),
    ("granitemoeshared", dict(shared_intermediate_size=None), ["shared"]),
    ("granitemoeshared", dict(residual_multiplier="1"), ["residual_multiplier='1'"]),
    ("granitemoeshared", dict(logits_scaling=0), ["logits_scaling=0"]),
    ("granitemoeshared", dict(embedding_multiplier=float("nan")), ["embedding_multiplier=nan"]),
]


@pytest.mark.parametrize("kind, changes, words", REFUSED)
def test_a_config_we_do_not_compute_is_refused_by_name(kind, changes, words):
    export(random_model(small_config(**KINDS[kind])), None, "folder")
    load("folder")
    edit_config("folder", **changes)
    assert_refused(["folder", *words])


@pytest.mark.parametrize("name, size", [("config.json", 9), ("model.safetensors", 999)])
@pytest.mark.parametrize("whole", [True, False])
def test_of_a_folder_copied_by_half_it_is_said_to_copy_it_again(name, size, whole):
    export(random_model(small_config()), None, "folder")
    content = Path("folder", name).read_bytes()
    Path("folder", name).write_bytes(content[: 0 if whole else size])
    assert_refused(["folder", "can't be read", "copy it again"])
    if name == "model.safetensors":
        Path("folder", name).unlink()
        assert_refused(["folder", "model.safetensors", "copy it again"])


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(router="switch"), ["Mixtral", "switch", "--qk_norm"]),
        (dict(router="switch", n_shared_experts=1), ["GraniteMoeShared", "switch", "--qk_norm"]),
        (dict(router="switch", qk_norm=True, eval_capacity_factor=1.0), ["eval_capacity_factor"]),
        (dict(router="deepseek", n_groups=4, top_groups=2), ["groups", "--n_groups 1"]),
        (dict(n_shared_experts=1, n_dense_layers=1), ["Granite", "--n_dense_layers 0"]),
        (dict(n_shared_experts=1, n_dense_layers=1, qk_norm=True), ["Lara", "--n_dense_layers 0"]),
        (dict(n_dense_layers=1), ["dense layers", "--qk_norm"]),
        (dict(n_experts=1, dim=18, head_dim=4), ["dim=18", "n_heads=4", "--qk_norm"]),
    ],
)
def test_a_model_that_no_family_expresses_is_refused_with_the_reason(fields, words):
    model = random_model(small_config(**fields))
    assert_refused(words, lambda: export(model, None, "folder"))
    assert not Path("folder").exists()


def add_hook(model):
    model.head.register_forward_hook(lambda *a: 2 * a[2])


def add_adapter(model):
    model.blocks[0].attn.q_proj = torch.nn.Sequential(model.blocks[0].attn.q_proj)


@pytest.mark.parametrize("put_on", [add_hook, add_adapter])
@pytest.mark.parametrize("out", ["folder", "model.gguf"])
def test_a_model_that_is_more_than_its_weights_is_refused(put_on, out):
    """What was written would be another model, or no model."""
    model = random_model(small_config())
    put_on(model)
    assert_refused(["adapter", "merge"], lambda: export(model, None, out))
    assert not Path(out).exists()


@pytest.mark.parametrize(
    "fields", [dict(qk_norm=True), dict(n_shared_experts=1), dict(n_experts=1, qk_norm=True)]
)
def test_qwen3_next_is_refused_for_a_model_without_what_it_is_for(fields):
    model, words = random_model(small_config(**fields)), ["qwen3_next", "shared experts"]
    assert_refused(words, lambda: export(model, None, "folder", family="qwen3_next"))


@contextlib.contextmanager
def every_second_layer_dense(widen=1):
    """A reader's change in Block alone: the config knows nothing of it."""

    class Block(lamoe.Block):
        def __init__(self, c, layer):
            super().__init__(dataclasses.replace(c, n_dense_layers=0), layer)
            if layer % 2:
                self.ffn = lamoe.SwiGLU(c.dim, c.hidden_dim * c.top_k * widen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lamoe, "Block", Block)
        yield


@pytest.mark.oracle
def test_layers_that_only_block_knows_to_be_dense_are_exported_right_or_refused():
    with every_second_layer_dense():
        model = random_model(small_config(n_layers=4, qk_norm=True))
        export(model, None, "folder")
        assert_same_logits(model, load("folder")[0])
        mixtral = random_model(small_config(n_layers=4))
        assert_refused(["dense layers"], lambda: export(mixtral, None, "other"))
    assert_same_logits(model, theirs("folder"))
    assert_refused(["mlp_only_layers=[1, 3]", "[0, 1]"])  # to read it takes the same change
    with every_second_layer_dense(widen=2):
        model = random_model(small_config(n_layers=4, qk_norm=True))
        assert_refused(["dense layer 1", "48", "24"], lambda: export(model, None, "other"))
    assert not Path("other").exists()


def test_an_export_never_overwrites_and_never_stays_half_done(monkeypatch):
    model = random_model(small_config())
    Path("full").mkdir()
    Path("full/kept.txt").write_text("mine")
    assert_refused(["full", "new folder"], lambda: export(model, None, "full"))
    assert_refused(["kept.txt"], lambda: export(model, None, "full/kept.txt"))
    assert Path("full/kept.txt").read_text() == "mine"
    Path("empty").mkdir()
    export(model, None, "empty")
    export(model, None, "deep/er")
    monkeypatch.setattr("safetensors.torch.save_file", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, None, "broken")
    assert sorted(path.name for path in Path().iterdir()) == ["deep", "empty", "full"]


def test_weights_in_other_formats_are_refused_with_the_command_that_converts_them():
    export(random_model(small_config()), None, "folder")
    Path("folder/model.safetensors").rename("folder/pytorch_model.bin")
    assert_refused(["folder", "pytorch_model.bin", "save_pretrained"])
    Path("folder/pytorch_model.bin").unlink()
    assert_refused(["folder", "model.safetensors"])
    Path("folder/config.json").rename("folder/params.json")
    assert_refused(["folder", "Meta", "convert_llama_weights_to_hf"])
    Path("folder/params.json").unlink()
    assert_refused(["folder", "config.json"])


def test_without_safetensors_one_line_says_how_to_install_it(monkeypatch):
    export(random_model(small_config()), None, "folder")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    hint = ['pip install "safetensors>=0.8"']
    assert_refused(["folder", *hint])
    assert_refused(hint, lambda: export(random_model(small_config()), None, "other"))
    assert not Path("other").exists()


def rewrite_header(change):
    """Changes the JSON header of folder/model.safetensors."""
    path = Path("folder/model.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(change(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def with_entry(**changes):
    return lambda header: {**header, "lm_head.weight": {**header["lm_head.weight"], **changes}}


BROKEN = {
    "beyond": with_entry(data_offsets=[10**9, 10**9 + 1472]),
    "floats": with_entry(shape=[23.0, 16]),
    "wrong": with_entry(shape=[16, 23]),
    "list": lambda header: [header],
    "absent": lambda header: {k: v for k, v in header.items() if k != "lm_head.weight"},
    "more": lambda header: {**header, "lm_head.bias": header["model.norm.weight"]},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_refused(name):
    export(random_model(small_config()), None, "folder")
    rewrite_header(BROKEN[name])
    assert_refused(["folder"])


@pytest.mark.parametrize("dtype", ["I32", "U32"])  # as those of packed, quantised weights
def test_weights_of_another_kind_of_number_are_refused(dtype):
    export(random_model(small_config()), None, "folder")
    rewrite_header(with_entry(dtype=dtype))
    assert_refused(["folder", "lm_head.weight", dtype])


def test_a_file_that_ends_early_or_promises_a_huge_header_is_refused():
    export(random_model(small_config()), None, "folder")
    path = Path("folder/model.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert_refused(["folder"])
    path.write_bytes(b"\xff" * 8 + whole[8:])
    assert_refused(["folder", "header"])


@few
@given(data=st.data())
def test_damaged_files_end_in_one_line(data):
    tokenizer = Tokenizer.train(["the cat sat on the mat"], 260)
    export(random_model(small_config(vocab_size=260)), tokenizer, fresh(), 9000)
    path = data.draw(st.sampled_from(sorted(Path("folder").iterdir())))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        at = data.draw(st.integers(0, min(len(content), 2000) - 1))
        content[at] = data.draw(st.sampled_from(b'0"{[]},:9 \xffe-'))
    path.write_bytes(content)
    try:
        load("folder")
    except ValueError as error:
        assert "\n" not in str(error) and "folder" in str(error)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "null", '{"a": 1e999}', "\xff"])
def test_broken_json_is_refused(name, content):
    export(random_model(small_config()), None, "folder", 4000)
    (Path("folder") / name).write_bytes(content.encode("latin1"))
    assert_refused(["folder"])


def test_an_index_that_names_files_elsewhere_is_refused():
    export(random_model(small_config()), None, "folder", 4000)
    for name in ("../secret", "/etc/passwd", 7, "no-such.safetensors"):
        Path("folder/model.safetensors.index.json").write_text(
            f'{{"weight_map": {{"a": "{name}"}}}}'
        )
        assert_refused(["folder"])


# ---------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------

DOCUMENTS = ["It's 2024, isn't it?\n\n  the cat saw été 😀😀 12345  \t x", bpe.__doc__]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(DOCUMENTS, 500)


@pytest.fixture(scope="module")
def auto(tok, tmp_path_factory):
    """Our tokenizer as transformers reads it."""
    folder = tmp_path_factory.mktemp("ours")
    save_tokenizer(tok, folder)
    return import_oracle("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.mark.oracle
def test_autotokenizer_and_tiktoken_give_our_ids_on_a_fuzzed_corpus(tok, auto):
    rng, encoding = random.Random(0), foreign.to_tiktoken(tok)
    texts = ["", SPECIAL, f"a{SPECIAL}b", *(fuzz_text(rng) for _ in range(3000))]
    for text, other in zip(texts, auto(texts)["input_ids"], strict=True):
        ids = tok.encode(text)
        assert ids == other == encoding.encode_ordinary(text), text
        assert auto.decode(ids) == text
    assert auto.eos_token_id == auto.bos_token_id == tok.eot and len(auto) == tok.vocab_size
    text = f"a{SPECIAL}b"
    special = tok.encode(text, allow_special=True)
    assert special == auto.encode(text, split_special_tokens=False)
    assert special == encoding.encode(text, allowed_special="all")


def test_a_checkpoint_says_so_if_words_are_split_by_other_letters_here(run_folder, capsys):
    checkpoint = read(run_folder / "run/best.pt")
    for version, lines in ((bpe.UNICODE, 0), (None, 0), (bpe.UNICODE - 1, 1), (99, 1)):
        state = {**checkpoint["tokenizer"], "unicode": version}
        state = {key: value for key, value in state.items() if value is not None}
        save("old.pt", {**checkpoint, "tokenizer": state})
        capsys.readouterr()
        _, tokenizer = load("old.pt")
        assert tokenizer.state()["unicode"] == bpe.UNICODE
        message = capsys.readouterr().err
        assert message.count("\n") == lines and ("regex>=" in message) == bool(lines)


def test_our_own_tokenizer_comes_back_as_ours_without_another_package(tok, monkeypatch, tmp_path):
    save_tokenizer(tok, tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    again = foreign.load_tokenizer(tmp_path, tok.vocab_size)
    assert type(again) is Tokenizer and again.merges == tok.merges
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}  # no longer what ours does
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert_refused(
        ["pip install tokenizers"], lambda: foreign.load_tokenizer(tmp_path, tok.vocab_size)
    )


def byte_level():
    """A tokenizer in the manner of Llama 3: bytes as letters, a token before each text."""
    t = import_oracle("tokenizers")
    theirs = t.Tokenizer(t.models.BPE())
    theirs.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = t.decoders.ByteLevel()
    trainer = t.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(DOCUMENTS, trainer)
    theirs.post_processor = t.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return theirs, "<|begin|>", "<|end|>"


def sentencepiece():
    """A tokenizer in the manner of Llama 2: a space before each text, bytes for rare characters."""
    t = import_oracle("tokenizers")
    first = t.Tokenizer(t.models.BPE())
    normalizers = [t.normalizers.Prepend("▁"), t.normalizers.Replace(" ", "▁")]
    first.normalizer = t.normalizers.Sequence(normalizers)
    trainer = t.trainers.BpeTrainer(vocab_size=200, show_progress=False, limit_alphabet=40)
    first.train_from_iterator(DOCUMENTS, trainer)
    model = json.loads(first.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    theirs = t.Tokenizer(
        t.models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    theirs.normalizer = first.normalizer
    d = t.decoders
    parts = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    theirs.decoder = d.Sequence(parts)
    theirs.add_special_tokens(["<unk>", "<s>", "</s>"])
    theirs.post_processor = t.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return theirs, "<s>", "</s>"


def plain_byte_level():
    """In the manner of Qwen: nothing before a text."""
    theirs, _, eos = byte_level()
    theirs.post_processor = import_oracle("tokenizers").processors.ByteLevel()
    return theirs, None, eos


def begins_with_its_end():
    """One token before each text and behind it, as OPT and GPT-NeoX may have it."""
    theirs, _, eos = byte_level()
    theirs.post_processor = import_oracle("tokenizers").processors.TemplateProcessing(
        single=f"{eos} $A {eos}", special_tokens=[(eos, 1)]
    )
    return theirs, eos, eos


def save_foreign(make, folder):
    """Its tokenizer files as transformers writes them; returns transformers' own tokenizer."""
    transformers = import_oracle("transformers")
    theirs, bos, eos = make()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=theirs, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)
    return fast


every_foreign = pytest.mark.parametrize("make", [byte_level, plain_byte_level, sentencepiece])
every_separator = pytest.mark.parametrize(
    "make", [byte_level, plain_byte_level, sentencepiece, begins_with_its_end]
)


@pytest.mark.oracle
@every_foreign
def test_a_foreign_tokenizer_gives_its_own_ids_through_our_interface(make, tmp_path):
    fast, rng = save_foreign(make, tmp_path), random.Random(1)
    ours = foreign.load_tokenizer(tmp_path, 1000)
    assert ours.vocab_size == 1000 and ours.eot == fast.eos_token_id
    texts = ["Once, upon a time", "", *(fuzz_text(rng) for _ in range(500))]
    texts = [text for text in texts if fast.eos_token not in text]
    for text in texts:
        assert [*ours.start, *ours.encode(text)] == fast(text)["input_ids"]
        decoded = ours.decode_bytes([*ours.start, *ours.encode(text)])
        assert decoded == (b" " if make is sentencepiece and text else b"") + text.encode()
    array = ours.encode_array(texts)
    assert array.dtype == np.uint16
    one_by_one = [[*ours.start, *ours.encode(text), ours.eot] for text in texts]
    assert array.tolist() == [i for ids in one_by_one for i in ids]
    counted = [text for text in texts if text]  # an empty text gets no space before it
    size = sum(len(text.encode()) + len(SPECIAL) for text in counted)
    assert ours.byte_lengths[ours.encode_array(counted)].sum() == size
    special = f"a{fast.eos_token}b"
    assert ours.eot not in ours.encode(special)
    assert ours.eot in ours.encode(special, allow_special=True)
    with pytest.raises(ValueError, match="lone surrogate U\\+D800"):
        ours.encode("\ud800")
    again = foreign.tokenizer_from_state(json.loads(json.dumps(ours.state())))
    assert again.encode(texts[0]) == ours.encode(texts[0]) and again.start == ours.start
    other = tmp_path / "again"
    other.mkdir()
    save_tokenizer(again, other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (other / name).read_text() == (tmp_path / name).read_text()


@pytest.fixture
def two_sources():
    """Documents of two files, short and long, ASCII alone, so that every byte is a character."""
    rng = random.Random(3)
    words = "the cat saw a dog . one two three four Pip, silver\n".split(" ")
    texts = {name: [] for name in ("x", "y")}
    for i in range(120):
        text = " ".join(rng.choices(words, k=rng.choice((1, 5, 40)))) + f" {i}"
        texts["xy"[i % 3 == 0]].append(text.strip())
    for name, documents in texts.items():
        Path(f"{name}.txt").write_text(f"\n{SPECIAL}\n".join(documents))
    return "x.txt,y.txt"


@pytest.mark.oracle
@every_separator
def test_bytes_sources_and_windows_are_right_whatever_stands_between_documents(make, two_sources):
    save_foreign(make, ".")
    tokenizer, corpus = foreign.load_tokenizer(".", 1000), datasets.read(two_sources)
    settings = train.TrainConfig(data=two_sources, device="cpu", dtype="fp32")
    config = small_config(vocab_size=1000)
    data = train.load_data(settings, config, corpus, tokenizer)
    ids, documents = data.val_ids, list(corpus.val)
    start, eot = tokenizer.start, tokenizer.eot
    assert bool(start) == (make is not plain_byte_level)
    assert (start == [eot]) == (make is begins_with_its_end)

    before = start if start and start != [eot] else []
    wanted = [] if before else [eot]
    for text in documents:
        wanted += [*before, *tokenizer.encode(text), eot]
    assert ids.tolist() == wanted

    sizes = [len(text) + len(SPECIAL) for text in documents]
    assert tokenizer.byte_lengths[ids[1:]].sum() == sum(sizes)
    assert data.source_of_byte.tolist() == np.repeat(corpus.val.sources, sizes).tolist()
    text, at = "".join(text + SPECIAL for text in documents), 0
    for token, last in zip(ids[1:], tokens.last_bytes(ids, tokenizer), strict=True):
        piece = tokenizer.decode([token])
        at += len(piece) - (make is sentencepiece and text[at : at + len(piece)] != piece)
        assert last == at - 1 or not piece  # the token before a text has no bytes
    assert at == len(text)

    model = random_model(config)
    for first in data.batches.starts[~data.batches.is_cut]:
        prompt = start or [eot]  # what sample.py puts before a text
        assert ids_of(data.batches.ids, first, len(prompt)) == prompt
    score = train.evaluate(model, data, settings, data.source_of_byte)
    nats = 0.0
    for begin, end in data.spans:
        window = torch.from_numpy(ids[begin : end + 1].astype(np.int64))
        logits = model(window[None, :-1]).logits[0].double()
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert score.bits_per_byte == pytest.approx(nats / np.log(2) / sum(sizes), rel=1e-5)
    shares = np.bincount(data.source_of_byte) / sum(sizes)
    by_source = list(log.by_source(score, data).values())
    assert shares @ by_source == pytest.approx(score.bits_per_byte, rel=1e-9)


def ids_of(array, at, n):
    return array[at : at + n].tolist()


@pytest.mark.oracle
@pytest.mark.parametrize(
    "make, data",
    [
        (byte_level, "two sources"),
        (byte_level, "facts"),
        (plain_byte_level, "two sources"),
        (sentencepiece, "facts"),
        (begins_with_its_end, "two sources"),
    ],
)
def test_fine_tuning_a_foreign_folder_runs_and_resumes(make, data, two_sources, capsys):
    random_theirs(small_config(vocab_size=1000, seq_len=64)).save_pretrained("folder")
    save_foreign(make, "folder")
    data = ["--data", two_sources] if data == "two sources" else ["--data", "facts", "--draw_mb", 1]
    flags = ["--seq_len", 16, "--device", "cpu", "--batch_size", 2, "--dtype", "fp32", "--steps", 2]
    assert call(train, *data, "--init", "folder", *flags, "--out", "run") == 0
    out = capsys.readouterr().out
    assert "by source" in out or "floor" in out
    assert "changes some characters" not in out
    assert call(train, "--resume", "--out", "run") == 0


@pytest.mark.oracle
@every_separator
def test_a_long_document_is_encoded_whole_in_parts_of_any_size(make, monkeypatch, tmp_path):
    save_foreign(make, tmp_path)
    tokenizer, rng = foreign.load_tokenizer(tmp_path, 1000), random.Random(5)
    texts = ["".join(fuzz_text(rng) for _ in range(40)) for _ in range(30)]
    texts += ["word and word  and\n\nwords " * 60, "a" * 999, " " * 999, "字" * 999, "x y " * 300]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(foreign, "BLOCK", 50)
    assert [tokenizer.encode(text) for text in texts] == whole
    monkeypatch.setattr(formats, "PIECE", 300)
    Path("long.txt").write_text(texts[30] * 9, newline="\n")
    corpus = datasets.read("long.txt")
    assert len(list(corpus.train)) > 30
    for name, side in (("train", corpus.train), ("val", corpus.val)):
        assert len(side) == 1
        ids = tokens.encode(side, tokenizer, tmp_path / f"{name}.ids")
        separator = [tokenizer.eot] * (tokens.first_id(tokenizer) == tokenizer.eot)
        assert ids.tolist() == [*separator, *tokenizer.encode_array(["".join(side)])]
        assert ids.tolist().count(tokenizer.eot) == 1 + len(separator)


@pytest.mark.oracle
def test_a_text_is_not_cut_where_a_token_reaches_over_a_space(tmp_path, monkeypatch):
    t = import_oracle("tokenizers")
    theirs = t.Tokenizer(t.models.BPE())
    theirs.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.decoder = t.decoders.ByteLevel()
    letters = t.pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=["<e>"], initial_alphabet=letters, show_progress=False)
    theirs.train_from_iterator(
        ["by the way, "] * 9, t.trainers.BpeTrainer(vocab_size=290, **options)
    )
    save_foreign(lambda: (theirs, None, "<e>"), tmp_path)
    tokenizer, text = foreign.load_tokenizer(tmp_path, 290), "by the way, " * 99
    whole = tokenizer.encode(text)
    assert any(" " in tokenizer.decode([i]).strip() for i in whole)
    monkeypatch.setattr(foreign, "BLOCK", 50)
    assert tokenizer.encode(text) == whole


@pytest.mark.oracle
def test_a_tokenizer_that_changes_a_text_says_so(tmp_path, capsys):
    theirs, bos, eos = byte_level()
    theirs.normalizer = import_oracle("tokenizers").normalizers.NFC()
    save_foreign(lambda: (theirs, bos, eos), tmp_path)
    tokenizer = foreign.load_tokenizer(tmp_path, 400)
    settings = train.TrainConfig(data="book.txt", device="cpu", dtype="fp32")
    for text, says in (("cafe\u0301 and more, ", True), ("caf\u00e9 and more, ", False)):
        Path("book.txt").write_text(text * 99, encoding="utf-8")
        corpus = datasets.read("book.txt")
        train.load_data(settings, small_config(vocab_size=400), corpus, tokenizer)
        assert ("changes some characters" in capsys.readouterr().out) == says


@pytest.mark.oracle
@every_separator
def test_a_text_that_is_shown_begins_as_a_prompt_does(make, tmp_path):
    save_foreign(make, tmp_path)
    tokenizer = foreign.load_tokenizer(tmp_path, 1000)
    Path("two.txt").write_text(f"one cat\n{SPECIAL}\ntwo")
    before = tokenizer.start or [tokenizer.eot]
    wanted = [*before, *tokenizer.encode("one cat"), *before, *tokenizer.encode("two")]
    assert experts.read_ids("two.txt", tokenizer) == wanted


@pytest.mark.oracle
@every_separator
def test_the_end_and_the_beginning_are_never_in_a_text_even_if_called_ordinary(make, tmp_path):
    fast = save_foreign(make, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(content))
    tokenizer = foreign.load_tokenizer(tmp_path, 1000)
    names = [name for name in (fast.bos_token, fast.eos_token) if name]
    assert not {tokenizer.eot, *tokenizer.start} & {*tokenizer.encode(f"a{''.join(names)}b")}


@pytest.mark.oracle
def test_an_end_that_a_tokenizer_can_not_spell_is_refused_in_a_text(tmp_path):
    def unigram():
        t = import_oracle("tokenizers")
        theirs = t.Tokenizer(t.models.Unigram())
        theirs.pre_tokenizer, theirs.decoder = t.pre_tokenizers.Metaspace(), t.decoders.Metaspace()
        special = dict(special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False)
        theirs.train_from_iterator(DOCUMENTS, t.trainers.UnigramTrainer(vocab_size=200, **special))
        return theirs, None, "</s>"

    save_foreign(unigram, tmp_path)
    tokenizer = foreign.load_tokenizer(tmp_path, 1000)
    assert tokenizer.eot in tokenizer.encode("a</s>", allow_special=True)
    with pytest.raises(ValueError, match="the text holds </s>, which this tokenizer can't spell"):
        tokenizer.encode("a</s>")


@pytest.mark.oracle
@every_separator
def test_tokens_added_beyond_the_model_are_left_out_and_refused_in_a_text(make, tmp_path, capsys):
    fast = save_foreign(make, tmp_path)
    n, texts = len(fast), ["Once, upon a time", "a<pad>b", ""]
    ids = [foreign.load_tokenizer(tmp_path, n).encode(text) for text in texts]
    fast.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<x>", "<y>"]})
    fast.save_pretrained(tmp_path)
    tokenizer = foreign.load_tokenizer(tmp_path, n)
    assert [tokenizer.encode(text) for text in texts] == ids and tokenizer.vocab_size == n
    again = foreign.tokenizer_from_state(tokenizer.state())
    assert again.encode(texts[1]) == ids[1]
    fast.add_tokens(["<tool>"])  # this one is in texts
    fast.save_pretrained("folder")
    random_theirs(small_config(vocab_size=n, seq_len=64)).save_pretrained("folder")
    ask = ["--model", "folder", "--max_new_tokens", 3]
    assert call(sample, "Once", *ask) == 0
    capsys.readouterr()
    assert call(sample, "Once <tool>", *ask) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "<tool>" in message
    export(*load("folder"), "again")
    for name in foreign.FILES:
        assert Path("folder", name).read_bytes() == Path("again", name).read_bytes()


@pytest.mark.oracle
def test_a_tokenizer_of_another_size_than_the_model_is_refused(tok, tmp_path):
    import_oracle("tokenizers")
    save_tokenizer(tok, tmp_path)
    assert_refused(
        ["outside", str(tmp_path)], lambda: foreign.load_tokenizer(tmp_path, tok.vocab_size - 1)
    )
    assert (
        foreign.load_tokenizer(tmp_path, tok.vocab_size + 3).vocab_size == tok.vocab_size + 3
    )  # rounded up
    model = random_model(small_config())
    assert_refused(["23", str(tok.vocab_size)], lambda: export(model, tok, "folder"))


@pytest.mark.oracle
def test_a_foreign_tokenizer_that_we_can_not_decode_is_refused(tmp_path):
    save_foreign(byte_level, tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text())
    for change, words in (
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, ["WordPiece"]),
        ({"decoder": None}, ["decoder"]),
        ({"model": {"type": "Nonsense"}}, ["tokenizer.json"]),
        ({"added_tokens": 3}, ["tokenizer.json"]),
    ):
        path.write_text(json.dumps({**whole, **change}))
        assert_refused([str(tmp_path), *words], lambda: foreign.load_tokenizer(tmp_path, 1000))
    path.write_text(json.dumps(whole))
    assert_refused(["outside", "300"], lambda: foreign.load_tokenizer(tmp_path, 300))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert_refused(["eos_token"], lambda: foreign.load_tokenizer(tmp_path, 1000))
    assert foreign.load_tokenizer(tmp_path, 1000, eot=1).eot == 1


# ---------------------------------------------------------------------------------------------
# The programs
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run, tiny, but with every other flag at its default, and a BPE of its own."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "book.txt").write_text(make_text())
    flags = [flag for flag in TINY if flag not in ("--tokenizer", "bytes")]
    data = ["--data", folder / "book.txt", "--out", folder / "run", "--vocab_size", 300]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert call(train, *data, *flags, "--steps", 4) == 0
    return folder


@pytest.mark.oracle
def test_what_default_training_makes_exports_and_talks_the_same(run_folder, capsys):
    assert call(program, run_folder / "run/best.pt", "folder") == 0
    model, tokenizer = load(run_folder / "run/best.pt")
    ends = json.loads(Path("folder/generation_config.json").read_text())
    assert ends == dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot, pad_token_id=255)
    twin = theirs("folder")
    assert type(twin).__name__ == "Qwen3MoeForCausalLM"
    assert_same_logits(model, twin)
    auto = import_oracle("transformers").AutoTokenizer.from_pretrained("folder")
    assert auto("the old cat")["input_ids"] == tokenizer.encode("the old cat")
    assert twin.generation_config.eos_token_id == auto.eos_token_id == tokenizer.eot
    capsys.readouterr()
    greedy = ["the old", "--max_new_tokens", 10, "--temperature", 0]
    texts = []
    for path in (run_folder / "run/best.pt", "folder"):
        assert call(sample, *greedy, "--model", path) == 0
        texts.append(capsys.readouterr().out)
    ids = torch.tensor([[tokenizer.eot, *auto("the old")["input_ids"]]])
    options = dict(max_new_tokens=10, do_sample=False, pad_token_id=0)
    new = twin.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    text = auto.decode(new, skip_special_tokens=True)
    assert texts[0] == texts[1]
    assert texts[0].rstrip("\n\ufffd") == text.rstrip("\n\ufffd")


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_an_export_saved_again_by_transformers_stays_ours(kind, tok, capsys):
    transformers = import_oracle("transformers")
    tokenizer = tok if kind == "bpe" else Tokenizer([])
    model = random_model(small_config(vocab_size=tokenizer.vocab_size, seq_len=64, qk_norm=True))
    export(model, tokenizer, "export")
    greedy = ["Once", "--temperature", 0, "--max_new_tokens", 12, "--model"]
    assert call(sample, *greedy, "export") == 0
    text = capsys.readouterr().out

    def save_again(folder, change=lambda auto, twin: None, **options):
        auto = transformers.AutoTokenizer.from_pretrained("export")
        twin = transformers.AutoModelForCausalLM.from_pretrained("export")
        change(auto, twin)
        auto.save_pretrained(folder)
        twin.save_pretrained(folder, **options)
        again, ours = load(folder)
        capsys.readouterr()
        assert ours.start == [tokenizer.eot] and ours.eot == tokenizer.eot
        assert ours.encode("It's 2024 <|endoftext|>") == tokenizer.encode("It's 2024 <|endoftext|>")
        assert call(sample, *greedy, folder) == 0
        assert capsys.readouterr().out == text
        return again, ours

    assert type(save_again("again")[1]) is Tokenizer
    assert type(save_again("fused", save_original_format=False)[1]) is Tokenizer
    pad = {"pad_token": "<pad>"}
    ours = save_again("padded", lambda auto, _: auto.add_special_tokens(pad))[1]
    assert type(ours) is Tokenizer and ours.vocab_size == tokenizer.vocab_size

    def resize(auto, twin):
        auto.add_special_tokens(pad)
        twin.resize_token_embeddings(len(auto), pad_to_multiple_of=8)
        with torch.no_grad():  # so that the new rows are not likely
            twin.lm_head.weight[tokenizer.vocab_size :] = 0

    again, ours = save_again("resized", resize)
    assert ours.vocab_size == again.config.vocab_size > tokenizer.vocab_size
    ids = ours.encode_array(["one", "two"]).tolist()
    assert ids == tokenizer.encode_array(["one", "two"]).tolist()


@pytest.mark.oracle
@pytest.mark.parametrize("make", [byte_level, sentencepiece, "ours"])
def test_chat_template_ends_and_generation_settings_survive_load_training_and_export(
    make, run_folder, tok, capsys
):
    transformers = import_oracle("transformers")
    n = tok.vocab_size if make == "ours" else 1000
    model = random_model(small_config(vocab_size=n, seq_len=64))
    export(model, tok if make == "ours" else None, "folder")
    fast = save_foreign(make, "folder") if make != "ours" else None
    fast = fast or transformers.AutoTokenizer.from_pretrained("folder")
    fast.chat_template = "{% for m in messages %}\r\n{{ m.content }}\n{% endfor %}é"
    fast.save_pretrained("folder")
    settings = {"do_sample": True, "temperature": 0.6, "eos_token_id": [fast.eos_token_id, 30]}
    Path("folder/generation_config.json").write_text(json.dumps(settings))
    edit_config("folder", eos_token_id=[fast.eos_token_id, 30])
    kept = {name: Path("folder", name).read_bytes() for name in foreign.KEPT[:2] + foreign.FILES}
    flags = ["--seq_len", 16, "--device", "cpu", "--batch_size", 4, "--dtype", "fp32", "--steps", 2]
    tune = ["--data", run_folder / "book.txt", "--init", "folder", *flags]
    assert call(train, *tune, "--out", "run") == 0
    assert call(program, "run/best.pt", "tuned") == 0
    for folder in ("tuned", "plain"):
        if folder == "plain":
            export(*load("folder"), folder)
        assert {name: Path(folder, name).read_bytes() for name in kept} == kept
        config = json.loads(Path(folder, "config.json").read_text())
        assert config["eos_token_id"] == [fast.eos_token_id, 30]
        assert load(folder)[1].stops == [fast.eos_token_id, 30]
    assert theirs("plain").generation_config.eos_token_id == [fast.eos_token_id, 30]


@pytest.mark.oracle
def test_sampling_ends_at_any_of_the_ends(tmp_path, capsys):
    model = random_model(small_config(vocab_size=1000, seq_len=64), seed=3)
    export(model, None, "folder")
    save_foreign(byte_level, "folder")
    ask = ["Once", "--temperature", 0, "--max_new_tokens", 20, "--model"]
    _, tokenizer = load("folder")
    ids = torch.tensor([[*tokenizer.start, *tokenizer.encode("Once")]])
    new = [i.item() for i in model.generate(ids, 20, temperature=0)]
    end = next(i for i in new[3:] if i not in new[:3])
    for where in ("config.json", "generation_config.json"):
        path = Path("folder", where)
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, "eos_token_id": [tokenizer.eot, end]}))
        for n in (1, 3):
            assert call(sample, *ask, "folder", "-n", n) == 0
            wanted = "Once" + tokenizer.decode(new[: new.index(end)])
            assert capsys.readouterr().out.count(wanted + "\n") == n
        path.write_text(json.dumps(content))


def test_the_exports_mistakes_end_in_one_line(run_folder, capsys):
    for arguments, words in (
        (["none.pt", "folder"], ["none.pt", "no such file"]),
        ([run_folder / "run/best.pt", run_folder], [str(run_folder), "new folder"]),
        (["none.pt"], ["FOLDER", "export.py --help"]),
        (["none.pt", "folder", "more"], ["more", "--help"]),
    ):
        assert call(program, *arguments) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and all(word in message for word in words), message


def test_a_full_disk_ends_an_export_in_one_line_and_leaves_nothing(run_folder, capsys):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # no file grows beyond
    try:
        assert call(program, run_folder / "run/best.pt", "folder") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "folder" in message and "too large" in message
    assert not [*Path().iterdir()]


@pytest.mark.oracle
@every_foreign
def test_a_foreign_folder_samples_fine_tunes_resumes_and_exports(make, run_folder, capsys):
    config = small_config(vocab_size=1000, seq_len=64)
    random_theirs(config).save_pretrained("folder")
    fast = save_foreign(make, "folder")
    assert call(sample, "Once", "--model", "folder", "--max_new_tokens", 8, "--dtype", "bf16") == 0
    capsys.readouterr()
    assert call(sample, "Once", "--model", "folder", "--max_new_tokens", 8, "--temperature", 0) == 0
    out = capsys.readouterr().out
    ids = torch.tensor([fast("Once")["input_ids"]])
    options = dict(
        max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=fast.eos_token_id
    )
    twin = theirs("folder")
    new = twin.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    _, tokenizer = load("folder")
    text = tokenizer.decode(new.tolist()).removesuffix(SPECIAL)
    assert out == f"Once{text}\n"

    tune = ["--data", run_folder / "book.txt", "--init", "folder", "--seq_len", 16, "--device"]
    tune += ["cpu", "--batch_size", 4, "--dtype", "fp32", "--eval_every", 2, "--steps"]
    assert call(train, *tune, 4, "--out", "whole") == 0
    start, _ = load("folder")
    tuned, again = load("whole/best.pt")
    assert dataclasses.replace(tuned.config, seq_len=64) == start.config
    moved = (tuned.embed.weight - start.embed.weight).abs().max()
    assert 0 < moved < 0.1 and again.files == tokenizer.files
    export(tuned, again, "tuned")
    assert_same_logits(tuned, theirs("tuned"))
    auto = import_oracle("transformers").AutoTokenizer.from_pretrained("tuned")
    assert auto("Once upon")["input_ids"] == fast("Once upon")["input_ids"]
    assert call(train, "--resume", "--out", "whole") == 0  # finished: says so


@pytest.mark.oracle
def test_a_run_that_starts_from_a_folder_resumes_bit_for_bit(run_folder):
    from tiny_run import at_training_step, press_ctrl_c

    random_theirs(small_config(vocab_size=1000, seq_len=64)).save_pretrained("folder")
    save_foreign(byte_level, "folder")
    flags = ["--data", run_folder / "book.txt", "--init", "folder", "--seq_len", 16]
    flags += ["--device", "cpu", "--batch_size", 4, "--dtype", "fp32", "--steps", 6]
    assert call(train, *flags, "--out", "whole") == 0
    with at_training_step(3, press_ctrl_c):
        assert call(train, *flags, "--out", "cut") == 130
    shutil.rmtree("folder")  # all that is needed is in the checkpoint
    assert call(train, "--resume", "--out", "cut") == 0
    whole, cut = (read(f"{name}/last.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_run_can_start_from_our_own_checkpoint_and_its_mistakes_are_named(run_folder, capsys):
    best = run_folder / "run/best.pt"
    start = ["--data", run_folder / "book.txt", "--init", best, "--steps", 2, "--device", "cpu"]
    assert call(train, *start, "--out", "more", "--batch_size", 4, "--seq_len", 8) == 0
    model, _ = load("more/best.pt")
    assert model.config.qk_norm and model.config.seq_len == 8
    for flags, words in (
        (["--dim", 32], ["--dim 32", "16", "leave it out"]),
        (["--seq_len", 17], ["--seq_len 17", "16"]),
        (["--tokenizer", "bytes"], ["--tokenizer", "leave it out"]),
        (["--vocab_size", 500], ["--vocab_size 500"]),
    ):
        capsys.readouterr()
        assert call(train, *start, "--out", "other", *flags) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and all(word in message for word in words), message
    assert not Path("other").exists()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_transformers_fills_batches_with_a_token_that_no_text_has(kind, tok):
    tokenizer = tok if kind == "bpe" else Tokenizer([])
    model = random_model(small_config(vocab_size=tokenizer.vocab_size, seq_len=64, qk_norm=True))
    export(model, tokenizer, "folder")
    auto = import_oracle("transformers").AutoTokenizer.from_pretrained(
        "folder", padding_side="left"
    )
    assert len(auto) == tokenizer.vocab_size and auto.pad_token_id == 255 != auto.eos_token_id
    rng, texts = random.Random(1), ["ÿ <|pad|> \xff", "Ā"]
    texts += [fuzz_text(rng) for _ in range(500)]
    for text, ids in zip(texts, auto(texts)["input_ids"], strict=True):
        assert ids == tokenizer.encode(text) and 255 not in ids and auto.decode(ids) == text
    texts, twin = ["Once", "Once, upon a time"], theirs("folder")
    # transformers 5.24 can't count a batch's balance loss while it generates.
    options = dict(max_new_tokens=9, do_sample=False, output_router_logits=False)
    batch = twin.generate(**auto(texts, padding=True, return_tensors="pt"), **options)
    alone = [twin.generate(**auto(text, return_tensors="pt"), **options)[0] for text in texts]
    for row, one in zip(batch, alone, strict=True):  # of a whole batch, the longest ends last
        kept = [i for i in row.tolist() if i != 255]
        assert kept == one.tolist()[: len(kept)]


@pytest.mark.oracle
def test_with_add_bos_tokenizers_there_begin_a_text_as_prompts_do_here(tok, run_folder):
    transformers = import_oracle("transformers")
    assert call(program, run_folder / "run/best.pt", "folder", "--add_bos") == 0
    auto, ours = transformers.AutoTokenizer.from_pretrained("folder"), load("folder")[1]
    assert type(ours) is Tokenizer and ours.start == [ours.eot]
    for text in ("", "Once", f"a{SPECIAL}b"):
        assert auto(text)["input_ids"] == [ours.eot, *ours.encode(text)]
        assert auto(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    auto.save_pretrained("again")
    shutil.copy("folder/config.json", "again")
    shutil.copy("folder/model.safetensors", "again")
    assert type(load("again")[1]) is Tokenizer
