"""What Hugging Face's folders call things: config.json and the tensors' names, both ways.

Four families of transformers compute exactly what lamoe.py computes; only names and the cutting of
the experts differ. What they can't express is refused, in both directions: a model that was read
wrongly still talks.
"""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from lamoe import Config, LaMoE, SwiGLU

KEYS = {  # our field -> theirs
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
MIXTRAL = {**KEYS, "n_experts": "num_local_experts", "top_k": "num_experts_per_tok"}
QWEN3_MOE = {**MIXTRAL, "n_experts": "num_experts", "hidden_dim": "moe_intermediate_size"}


class Family(NamedTuple):
    """A class of transformers, what it calls things, and what a config.json without a key means."""

    architecture: str
    keys: dict[str, str]
    absent: dict
    ffn: str = "mlp"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


NO_WINDOW = {"use_sliding_window": False}
FAMILIES = {  # model_type -> family; mistral is a llama with other defaults, and only read
    "llama": Family("LlamaForCausalLM", KEYS, {"num_key_value_heads": None}),
    "mistral": Family("LlamaForCausalLM", KEYS, {"sliding_window": 4096}),
    "qwen3": Family("Qwen3ForCausalLM", KEYS, {**NO_WINDOW, "head_dim": 128}),
    "mixtral": Family("MixtralForCausalLM", MIXTRAL, {}, "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", QWEN3_MOE, {**NO_WINDOW, "norm_topk_prob": False}),
}
LLAMA3_ROPE = {  # rope_table's constants in their words; the factor varies
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LARGEST = 1 << 20  # of the sizes in a config.json: more is no model, and would only fill the memory


def dense_layers(model: LaMoE) -> list[int]:
    """The layers without experts. The model is asked, not its config: blocks decide."""
    return [i for i, block in enumerate(model.blocks) if isinstance(block.ffn, SwiGLU)]


def family_of(c: Config, dense: list[int]) -> str:
    """The model_type that computes what a model of this config and these dense layers does.

    ValueError with the reason if there is none.
    """
    model_type = "mixtral" if c.n_experts > 1 else "llama"
    if c.qk_norm:
        model_type = "qwen3_moe" if c.n_experts > 1 else "qwen3"
    reason = None
    if model_type == "llama" and c.dim % c.n_heads:  # transformers 5 insists
        reason = f"a Llama's dim={c.dim} is a multiple of n_heads={c.n_heads}; train with --qk_norm"
    elif c.n_experts > 1 and c.router != "topk":
        reason = f"no family routes like router={c.router!r}; train with --router topk"
    elif c.n_experts > 1 and c.n_shared_experts:
        reason = "Mixtral has no shared experts; train with --n_shared_experts 0"
    elif model_type == "mixtral" and dense:
        reason = "Mixtral has no dense layers; train with --n_dense_layers 0, or --qk_norm"
    if reason:
        raise ValueError(f"no Hugging Face folder can hold this model: {reason}")
    return model_type


def to_hf_config(c: Config, dense: list[int]) -> dict:
    """The part of config.json that says what is computed, for transformers 4 and 5."""
    model_type, values = family_of(c, dense), {**dataclasses.asdict(c), "head_dim": c.head_size}
    rope = {"rope_type": "default"}
    if c.rope_factor != 1:
        rope = {**LLAMA3_ROPE, "factor": c.rope_factor}
    theirs = {
        "model_type": model_type,
        **{key: values[field] for field, key in FAMILIES[model_type].keys.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": None,
        "rope_theta": c.rope_theta,  # transformers 4, and the next
        "rope_scaling": rope if c.rope_factor != 1 else None,
        "rope_parameters": {**rope, "rope_theta": c.rope_theta},  # transformers 5
    }
    if model_type == "qwen3_moe":
        theirs |= {"mlp_only_layers": dense, "intermediate_size": c.hidden_dim * c.top_k}
        theirs |= {"norm_topk_prob": True, "decoder_sparse_step": 1}
        theirs["num_local_experts"] = c.n_experts  # transformers 5; 4 says num_experts
    return theirs


def one_spelling(rope: dict | None) -> dict:
    """rope_parameters or rope_scaling of any version, without what changes nothing."""
    nothing = (("factor", 1), ("partial_rotary_factor", 1))
    rope = {k: v for k, v in (rope or {}).items() if v is not None and (k, v) not in nothing}
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope}  # once it was `type`
    return {"rope_type": " or ".join(sorted(kinds)) or "default", **rope}


def from_hf_config(theirs: dict) -> tuple[Config, list[int]]:
    """The Config and the dense layers of a config.json of transformers 4 or 5.

    ValueError names what the Config can't express.
    """
    model_type = theirs.get("model_type")
    if model_type not in [*FAMILIES]:
        raise ValueError(f"model_type {model_type!r:.40} is none of {[*FAMILIES]}")
    family = FAMILIES[model_type]
    theirs = {"head_dim": None, "tie_word_embeddings": False, **family.absent, **theirs}
    theirs["model_type"] = "llama" if model_type == "mistral" else model_type
    if theirs.get("num_key_value_heads", 0) is None:  # Llama 1
        theirs["num_key_value_heads"] = theirs["num_attention_heads"]
    if model_type == "qwen3_moe" and "num_experts" not in theirs:  # transformers 5
        theirs["num_experts"] = theirs["num_local_experts"]
    theta = theirs.get("rope_theta") or (1e6 if model_type == "mixtral" else 1e4)
    new, old = (one_spelling(theirs.get(key)) for key in ("rope_parameters", "rope_scaling"))
    rope = {"rope_theta": theta, **(new if theirs.get("rope_parameters") else old)}
    theirs["rope_scaling"] = None if old == one_spelling(None) else old
    theirs["rope_parameters"] = rope
    dense = list(theirs.get("mlp_only_layers") or [])
    values = {"n_experts": 1, "top_k": 1}
    values |= {field: theirs[key] for field, key in family.keys.items()}
    values["n_dense_layers"] = len(dense)
    values["qk_norm"] = model_type.startswith("qwen3")
    values["rope_theta"] = rope["rope_theta"]
    values["rope_factor"] = rope.get("factor", 1.0) if rope["rope_type"] == "llama3" else 1.0
    for field in (field for field in dataclasses.fields(Config) if field.name in values):
        value, key = values[field.name], family.keys.get(field.name, field.name)
        kinds = {int: [int], float: [float, int], bool: [bool]}.get(field.type, [int, type(None)])
        if type(value) not in kinds or (field.type is not float and (value or 0) > LARGEST):
            raise ValueError(f"{key}={value!r:.60} is no usable {kinds[0].__name__}")
    c = Config(**values)
    refuse_others(theirs, c, dense)
    return c, dense


def refuse_others(theirs: dict, c: Config, dense: list[int]) -> None:
    """ValueError names the first thing that c, written as a config.json, says otherwise."""
    window = theirs.get("sliding_window") if theirs.get("use_sliding_window", True) else None
    if window is not None and window < c.seq_len:
        raise ValueError(
            f"sliding_window={window} is shorter than the context of {c.seq_len}, and only full "
            f"attention is supported; set max_position_embeddings to {window} to use less"
        )
    theirs = {**theirs, "sliding_window": None}
    if not dense:  # qwen3_moe: the width of layers that aren't there
        theirs["intermediate_size"] = None
    ours = {**to_hf_config(c, dense), "mlp_bias": False, "quantization_config": None}
    ours |= {"partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * c.n_layers}
    for key, value in ours.items():
        if theirs.get(key) not in (None, value):
            raise ValueError(f"{key}={theirs[key]!r:.160} is not supported, only {value!r:.160}")


def hf_tensors(model: LaMoE, names=()) -> dict[str, Tensor]:
    """Their name -> our tensor, or the view of it that they keep apart: to write, or to read into.

    The first half of gate_up_proj's rows is their gate, the second their up; expert e is row e.
    names: of the tensors in a folder. Of some, by transformers 5, all experts of a layer are one.
    """
    family, stacks = FAMILIES[family_of(model.config, dense_layers(model))], {}
    tensors = {"model.embed_tokens": model.embed.weight, "model.norm": model.norm.weight}
    if not model.config.tie_embeddings:
        tensors["lm_head"] = model.head.weight
    for i, block in enumerate(model.blocks):
        at, ffn, parts = f"model.layers.{i}", block.ffn, {}
        tensors[f"{at}.input_layernorm"] = block.attn_norm.weight
        tensors[f"{at}.post_attention_layernorm"] = block.ffn_norm.weight
        for name, weight in block.attn.named_parameters():  # q_proj.weight, ...
            tensors[f"{at}.self_attn.{name.removesuffix('.weight')}"] = weight
        if isinstance(ffn, SwiGLU):
            parts = {f"{at}.{family.ffn}": (ffn.gate_up_proj.weight, ffn.down_proj.weight)}
        elif f"{at}.mlp.experts.gate_up_proj" in names:
            tensors[f"{at}.mlp.gate"] = ffn.router.weight
            stacks |= {f"{at}.mlp.experts.{k}": w for k, w in ffn.experts.named_parameters()}
        else:
            tensors[f"{at}.{family.ffn}.gate"] = ffn.router.weight
            experts = zip(ffn.experts.gate_up_proj, ffn.experts.down_proj, strict=True)
            parts = {f"{at}.{family.ffn}.experts.{e}": both for e, both in enumerate(experts)}
        for name, (gate_up, down) in parts.items():
            three = zip(family.gate_up_down, (*gate_up.chunk(2), down), strict=True)
            tensors |= {f"{name}.{part}": tensor for part, tensor in three}
    tensors = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    return {name: tensor.detach() for name, tensor in {**tensors, **stacks}.items()}
