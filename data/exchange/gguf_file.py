"""A model as one GGUF file, which llama.cpp runs, and with it Ollama and LM Studio.

    python data/exchange/export.py runs/stories/best.pt model.gguf --dtype q8_0

Its architectures `qwen3` and `qwen3moe` compute what lamoe.py does with qk_norm, `llama`, dense or
sparse, what it does without; `granitemoe` has shared experts besides. `glm4moe` has all the rest:
shared experts with qk_norm, the other routers, dense first layers.
The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
from pathlib import Path

import torch

from bpe import Tokenizer
from data.exchange.huggingface import dense_layers, reason_against
from data.foreign import VISIBLE, tokenizer_json
from data.run.files import replacing
from lamoe import Config, DeepSeek, LaMoE, MoE, SwiGLU, rope_table

NORMAL, CONTROL = 1, 3  # types of tokens
SOFTMAX, SIGMOID = 1, 2  # kinds of routers
FORMATS = {"fp32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}  # of numbers: ours -> theirs


def write_gguf(model: LaMoE, tokenizer, path: str | os.PathLike, dtype: str = "fp32") -> None:
    """Writes a new file. dtype: of the matrices, a key of FORMATS; the rest is fp32, and what isn't
    made of blocks of 32. ValueError if llama.cpp can't compute this model.
    """
    if os.path.exists(path):
        raise ValueError(f"{path} is there already; name a new file")
    try:
        import gguf
    except ImportError:
        raise ValueError("a GGUF file needs: pip install gguf") from None
    architecture = architecture_of(model, tokenizer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        writer = gguf.GGUFWriter(file.name, architecture)
        for key, value in settings_of(model.config, architecture).items():
            add = {float: writer.add_float32, bool: writer.add_bool}.get(type(value))
            add = add or writer.add_uint32
            add(f"{architecture}.{key}", value)
        add_tokenizer(writer, tokenizer)
        for name, weight in named_tensors(model, architecture):
            array = weight.detach().float().cpu().numpy()
            is_matrix = array.ndim > 1 and "gate_inp" not in name and array.shape[-1] % 32 == 0
            kind = gguf.GGMLQuantizationType[FORMATS[dtype] if is_matrix else "F32"]
            name = name if name.endswith(".bias") else f"{name}.weight"
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def architecture_of(model: LaMoE, tokenizer) -> str:
    """llama.cpp's name for what the model computes; ValueError with the reason if it has none."""
    c, dense, reason = model.config, dense_layers(model), ""
    if c.n_experts == 1:
        architecture = "qwen3" if c.qk_norm else "llama"
    elif c.router in ("switch", "deepseek") or dense or (c.n_shared_experts and c.qk_norm):
        architecture = "glm4moe"
    elif c.n_shared_experts:
        architecture = "granitemoe"
    else:
        architecture = "qwen3moe" if c.qk_norm else "llama"
    if not isinstance(tokenizer, Tokenizer):
        reason = "the tokenizer is not bpe.py's; export a folder, and convert that with llama.cpp"
    elif c.rope_factor != 1 and architecture != "llama":
        reason = f"{architecture} has no rope_factor; train with --rope_factor 1"
    elif c.n_experts > 1 and dense != [*range(len(dense))]:
        reason = f"{architecture}'s dense layers are its first, not {dense}"
    elif c.n_experts > 1:
        reason = reason_against(c)
    if reason:
        raise ValueError(f"no GGUF file can hold this model: {reason}")
    return architecture


def settings_of(c: Config, architecture: str) -> dict:
    settings = {
        "context_length": c.seq_len,
        "embedding_length": c.dim,
        "block_count": c.n_layers,
        "feed_forward_length": c.hidden_dim,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads,
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "rope.freq_base": float(c.rope_theta),
    }
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        settings[key] = c.head_size
    if c.n_experts > 1:
        settings |= {"expert_count": c.n_experts, "expert_used_count": c.n_active}
        settings["expert_feed_forward_length"] = c.hidden_dim
    if architecture == "granitemoe":
        settings["expert_shared_feed_forward_length"] = c.n_shared_experts * c.hidden_dim
        scales = ("embedding_scale", "residual_scale", "logit_scale")
        settings |= {**dict.fromkeys(scales, 1.0), "attention.scale": c.head_size**-0.5}
    elif architecture == "glm4moe":
        is_sigmoid = c.router == "deepseek"
        settings |= {
            "expert_shared_count": max(1, c.n_shared_experts),
            "leading_dense_block_count": c.n_dense_layers,
            "feed_forward_length": (c.n_active + c.n_shared_experts) * c.hidden_dim,
            "expert_gating_func": SIGMOID if is_sigmoid else SOFTMAX,
            "expert_weights_norm": c.router != "switch",
            "expert_weights_scale": float(c.routed_scale) if is_sigmoid else 1.0,
        }
        if c.top_groups < c.n_groups and is_sigmoid:
            settings |= {"expert_group_count": c.n_groups, "expert_group_used_count": c.top_groups}
    return settings


def add_tokenizer(writer, tokenizer: Tokenizer) -> None:
    """Bytes in GPT-2's letters, and the merges. "dbrx" is llama.cpp's name for bpe.py's pattern."""
    content = tokenizer_json(tokenizer)
    names = [*content["model"]["vocab"], content["added_tokens"][0]["content"]]
    no_merge = [f"{VISIBLE[255]} {VISIBLE[255]}"]  # it wants one; no text has this byte
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("dbrx")
    writer.add_token_list(names)
    writer.add_token_types([NORMAL] * tokenizer.eot + [CONTROL])
    writer.add_token_merges(content["model"]["merges"] or no_merge)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(True)  # as here before each prompt


def named_tensors(model: LaMoE, architecture: str):
    """Yields their name of each tensor, without .weight, and the tensor."""
    c = model.config
    yield "token_embd", model.embed.weight
    yield "output_norm", model.norm.weight
    if not c.tie_embeddings:
        yield "output", model.head.weight
    if c.rope_factor != 1:  # by how much each pair of a head turns more slowly
        tables = (rope_table(c.head_size, 2, c.rope_theta, f) for f in (1.0, c.rope_factor))
        plain, slow = (torch.atan2(sin, cos)[1, : c.head_size // 2] for cos, sin in tables)
        yield "rope_freqs", plain / slow
    for i, block in enumerate(model.blocks):
        attn, ffn = block.attn, block.ffn
        ffn_norm = "post_attention_norm" if architecture == "glm4moe" else "ffn_norm"
        names = {"attn_norm": block.attn_norm, ffn_norm: block.ffn_norm, "attn_v": attn.v_proj}
        names |= {"attn_output": attn.o_proj, "attn_q": attn.q_proj, "attn_k": attn.k_proj}
        if c.qk_norm:
            names |= {"attn_q_norm": attn.q_norm, "attn_k_norm": attn.k_norm}
        weights = {name: module.weight for name, module in names.items()}
        if architecture in ("llama", "granitemoe"):  # their RoPE turns neighbours, ours halves
            for name, n_heads in (("attn_q", c.n_heads), ("attn_k", c.n_kv_heads)):
                halves = weights[name].view(n_heads, 2, -1, c.dim)
                weights[name] = halves.transpose(1, 2).reshape(-1, c.dim)
        weights |= ffn_tensors(ffn, architecture)
        yield from ((f"blk.{i}.{name}", weight) for name, weight in weights.items())


def ffn_tensors(ffn: SwiGLU | MoE, architecture: str) -> dict[str, torch.Tensor]:
    """Their names and the tensors of a feed-forward layer, dense or sparse."""
    if isinstance(ffn, SwiGLU):
        return cut_tensors("", *ffn.parameters())
    tensors = {"ffn_gate_inp": ffn.router.weight, **cut_tensors("_exps", *ffn.experts.parameters())}
    shared = ffn.shared and ffn.shared.parameters()
    if architecture == "glm4moe":
        is_biased = isinstance(ffn.router, DeepSeek)
        n_experts = len(ffn.router.weight)
        tensors["exp_probs_b.bias"] = ffn.router.bias if is_biased else torch.zeros(n_experts)
        # It knows no layer without shared experts: one of zeros adds nothing.
        shared = shared or [torch.zeros_like(stack[0]) for stack in ffn.experts.parameters()]
    return tensors | cut_tensors("_shexp", *shared) if shared else tensors


def cut_tensors(end: str, gate_up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    gate, up = gate_up.chunk(2, dim=-2)
    return {f"ffn_gate{end}": gate, f"ffn_up{end}": up, f"ffn_down{end}": down}
