"""What Hugging Face's folders call things: config.json and the tensors' names, both ways.

Seven families of transformers compute exactly what lamoe.py computes; only names and the cutting of
the experts differ (an eighth, Qwen3-Next, needs gates.py). What they can't express is refused, in
both directions: a model that was read wrongly still talks.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from data.exchange.granite import FACTORS
from lamoe import Config, DeepSeek, LaMoE, MoE, SwiGLU

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
GLM4_MOE = {**QWEN3_MOE, "n_experts": "n_routed_experts", "n_shared_experts": "n_shared_experts"}
GLM4_MOE |= {"n_groups": "n_group", "top_groups": "topk_group"}
GLM4_MOE |= {"routed_scale": "routed_scaling_factor", "n_dense_layers": "first_k_dense_replace"}


class Family(NamedTuple):
    """A class of transformers, what it calls things, and what a config.json without a key means."""

    architecture: str
    keys: dict[str, str]
    absent: dict
    ffn: str = "mlp"
    parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")  # gate and up apart, or as one
    router: str = "gate"
    shared: str = ""  # the shared experts, in a layer
    shared_width: str = ""  # their width together, where it has a key of its own
    is_stacked: bool = False  # all experts of a layer in one tensor


NO_WINDOW = {"use_sliding_window": False}
MIXED = {"layer_types": "a mixture"}  # of kinds of layers that we don't have
FAMILIES = {  # model_type -> family; mistral is a llama with other defaults, and only read
    "llama": Family("LlamaForCausalLM", KEYS, {"num_key_value_heads": None}),
    "mistral": Family("LlamaForCausalLM", KEYS, {"sliding_window": 4096}),
    "qwen3": Family("Qwen3ForCausalLM", KEYS, {**NO_WINDOW, "head_dim": 128}),
    "mixtral": Family(
        "MixtralForCausalLM", MIXTRAL, {}, ffn="block_sparse_moe", parts=("w1", "w3", "w2")
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", QWEN3_MOE, {**NO_WINDOW, "norm_topk_prob": False}),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        GLM4_MOE,
        absent={"partial_rotary_factor": 0.5, "first_k_dense_replace": 1},
        shared="mlp.shared_experts",
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedForCausalLM",
        MIXTRAL,
        absent={"shared_intermediate_size": 0},
        ffn="block_sparse_moe",
        parts=("input_linear", "output_linear"),
        router="router.layer",
        shared="shared_mlp",
        shared_width="shared_intermediate_size",
    ),
    "lara_mini": Family(
        "LaraMiniForCausalLM",
        QWEN3_MOE,
        absent={**MIXED, "sliding_window": 512, "head_dim": 128, "tie_word_embeddings": True},
        shared="mlp.shared_expert",
        shared_width="shared_expert_intermediate_size",
        is_stacked=True,
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        QWEN3_MOE,
        absent={**MIXED, "partial_rotary_factor": 0.25, "head_dim": 256},
        shared="mlp.shared_expert",
        shared_width="shared_expert_intermediate_size",
    ),
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


def reason_against(c: Config) -> str:
    """Why no other program computes these experts, "" if some do."""
    if c.router not in ("topk", "noisy", "switch", "deepseek"):
        return f"no family routes like router={c.router!r}; train with --router topk"
    if c.router == "switch" and c.eval_capacity_factor is not None:
        return "no family has a capacity; train without --eval_capacity_factor"
    if c.router == "deepseek" and c.top_groups < c.n_groups == c.n_experts:
        return "no family has groups of one expert; train with --n_groups 1 --top_groups 1"
    return ""


def family_of(c: Config, dense: list[int], asked: str | None = None) -> str:
    """The model_type that computes what a model of this config and these dense layers does.

    ValueError with the reason if there is none. In evaluation `noisy` is `topk`. asked: qwen3_next,
    which see gates.py, or None.
    """
    reason = reason_against(c) if c.n_experts > 1 else ""
    if asked:
        fits = c.n_experts > 1 and c.n_shared_experts and c.qk_norm and c.router != "deepseek"
        reason = reason or (
            "" if fits else f"{asked} needs shared experts and qk_norm; leave it out"
        )
        model_type = asked
    elif c.n_experts == 1:
        model_type = "qwen3" if c.qk_norm else "llama"
    elif c.router == "deepseek":
        model_type = "glm4_moe"
    elif c.n_shared_experts:
        model_type = "lara_mini" if c.qk_norm else "granitemoeshared"
    else:
        model_type = "qwen3_moe" if c.qk_norm else "mixtral"
    name = FAMILIES[model_type].architecture.removesuffix("ForCausalLM")
    if model_type == "llama" and c.dim % c.n_heads:  # transformers 5 insists
        reason = f"a Llama's dim={c.dim} is a multiple of n_heads={c.n_heads}; train with --qk_norm"
    elif c.n_experts > 1 and c.router == "switch" and not c.qk_norm:
        reason = f"{name} has weights that sum to 1, and router='switch' not; train with --qk_norm"
    elif model_type in ("mixtral", "granitemoeshared", "lara_mini") and dense:
        or_else = {"mixtral": ", or --qk_norm", "lara_mini": ", or export with --family qwen3_next"}
        remedy = f"train with --n_dense_layers 0{or_else.get(model_type, '')}"
        reason = f"{name} has no dense layers; {remedy}"
    elif model_type == "glm4_moe" and dense != [*range(len(dense))]:
        reason = f"{name}'s dense layers are its first, not {dense}"
    if reason:
        raise ValueError(f"no Hugging Face folder can hold this model: {reason}")
    return model_type


def to_hf_config(c: Config, dense: list[int], asked: str | None = None) -> dict:
    """The part of config.json that says what is computed, for transformers 4 and 5."""
    model_type = family_of(c, dense, asked)
    values = {**dataclasses.asdict(c), "head_dim": c.head_size}
    family, shared_dim = FAMILIES[model_type], c.n_shared_experts * c.hidden_dim
    values |= {"top_k": c.n_active, "n_dense_layers": len(dense)}
    if c.top_groups == c.n_groups:  # all of them
        values |= {"n_groups": 1, "top_groups": 1}
    rope = {"rope_type": "default"}
    if c.rope_factor != 1:
        rope = {**LLAMA3_ROPE, "factor": c.rope_factor}
    theirs = {
        "model_type": model_type,
        **{key: values[field] for field, key in family.keys.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": None,
        "rope_theta": c.rope_theta,  # transformers 4, and the next
        "rope_scaling": rope if c.rope_factor != 1 else None,
        "rope_parameters": {**rope, "rope_theta": c.rope_theta},  # transformers 5
    }
    if family.shared_width:
        theirs[family.shared_width] = shared_dim
    if model_type in ("qwen3_moe", "lara_mini", "qwen3_next"):
        theirs["norm_topk_prob"] = c.router != "switch"
        theirs["num_local_experts"] = c.n_experts  # transformers 5; 4 says num_experts
    if model_type in ("qwen3_moe", "qwen3_next"):
        theirs |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if model_type in ("qwen3_moe", "qwen3_next", "glm4_moe"):  # of its dense layers
        theirs["intermediate_size"] = c.hidden_dim * c.n_active + shared_dim
    if model_type in ("qwen3_next", "glm4_moe"):  # else they would turn a part of each head
        theirs["partial_rotary_factor"] = 1.0
        theirs["rope_parameters"]["partial_rotary_factor"] = 1.0
    if model_type == "qwen3_next":
        theirs["layer_types"] = ["full_attention"] * c.n_layers
    elif model_type == "lara_mini":  # the layers of another kind have no RoPE
        theirs |= {"layer_types": ["sliding_attention"] * c.n_layers, "sliding_window": c.seq_len}
    elif model_type == "glm4_moe":
        theirs |= {"norm_topk_prob": True, "use_qk_norm": c.qk_norm}
        theirs["n_shared_experts"] = max(1, c.n_shared_experts)  # vLLM divides by it: see no_shared
    elif model_type == "granitemoeshared":
        factors = dict.fromkeys(FACTORS, 1.0)
        theirs |= {**factors, "attention_multiplier": c.head_size**-0.5}
    return theirs


def one_spelling(rope: dict | None) -> dict:
    """rope_parameters or rope_scaling of any version, without what changes nothing."""
    nothing = (("factor", 1), ("partial_rotary_factor", 1))
    rope = {k: v for k, v in (rope or {}).items() if v is not None and (k, v) not in nothing}
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope}  # once it was `type`
    return {"rope_type": " or ".join(sorted(kinds)) or "default", **rope}


def from_hf_config(theirs: dict, no_shared: bool = False) -> tuple[Config, list[int]]:
    """The Config and the dense layers of a config.json of transformers 4 or 5.

    ValueError names what the Config can't express. no_shared: the shared experts are zeros, and
    there because the family has none without.
    """
    model_type = theirs.get("model_type")
    if model_type not in [*FAMILIES]:
        raise ValueError(f"model_type {model_type!r:.40} is none of {[*FAMILIES]}")
    family = FAMILIES[model_type]
    theirs = {"head_dim": None, "tie_word_embeddings": False, **family.absent, **theirs}
    theirs["model_type"] = "llama" if model_type == "mistral" else model_type
    if theirs.get("num_key_value_heads", 0) is None:  # Llama 1
        theirs["num_key_value_heads"] = theirs["num_attention_heads"]
    if "num_local_experts" in theirs:  # transformers 5
        theirs.setdefault(family.keys.get("n_experts"), theirs["num_local_experts"])
    theta = theirs.get("rope_theta") or (1e6 if model_type == "mixtral" else 1e4)
    new, old = (one_spelling(theirs.get(key)) for key in ("rope_parameters", "rope_scaling"))
    rope = {"rope_theta": theta, **(new if theirs.get("rope_parameters") else old)}
    if "partial_rotary_factor" in (theirs.get("rope_parameters") or {}):
        theirs["partial_rotary_factor"] = theirs["rope_parameters"]["partial_rotary_factor"]
    theirs["rope_scaling"] = None if old == one_spelling(None) else old
    theirs["rope_parameters"] = rope
    values = {"n_experts": 1, "top_k": 1}
    values |= {field: theirs[key] for field, key in family.keys.items()}
    dense = list(theirs.get("mlp_only_layers") or range(values.get("n_dense_layers", 0)))
    values["n_dense_layers"] = len(dense)
    values |= {"n_shared_experts": 0} if no_shared else shared_of(theirs, family)
    values["qk_norm"] = model_type.startswith("qwen3") or model_type == "lara_mini"
    values["qk_norm"] |= theirs.get("use_qk_norm") is True
    values["rope_theta"] = rope["rope_theta"]
    values["rope_factor"] = rope.get("factor", 1.0) if rope["rope_type"] == "llama3" else 1.0
    for field in (field for field in dataclasses.fields(Config) if field.name in values):
        value, key = values[field.name], family.keys.get(field.name, field.name)
        kinds = {int: [int], float: [float, int], bool: [bool]}.get(field.type, [int, type(None)])
        if type(value) not in kinds or (field.type is not float and (value or 0) > LARGEST):
            raise ValueError(f"{key}={value!r:.60} is no usable {kinds[0].__name__}")
    c = Config(**values, router=router_of(theirs))
    refuse_others(theirs, c, dense)
    return c, dense


def shared_of(theirs: dict, family: Family) -> dict[str, int]:
    """The number of shared experts, where a family says their width."""
    width, one = theirs.get(family.shared_width), theirs.get(family.keys["hidden_dim"])
    is_known = type(width) is type(one) is int and one > 0
    return {"n_shared_experts": width // one} if is_known else {}


def router_of(theirs: dict) -> str:
    if theirs["model_type"] == "glm4_moe":
        return "deepseek"
    is_raw = theirs.get("norm_topk_prob") is False and theirs.get("num_experts_per_tok") == 1
    return "switch" if is_raw else "topk"


def asked_of(theirs: dict) -> str | None:
    """For family_of: the model_type of a config.json, if it is one that has to be asked for."""
    return "qwen3_next" if theirs.get("model_type") == "qwen3_next" else None


def refuse_others(theirs: dict, c: Config, dense: list[int]) -> None:
    """ValueError names the first thing that c, written as a config.json, says otherwise."""
    window = theirs.get("sliding_window") if theirs.get("use_sliding_window", True) else None
    if window is not None and window < c.seq_len:
        raise ValueError(
            f"sliding_window={window} is shorter than the context of {c.seq_len}, and only full "
            f"attention is supported; set max_position_embeddings to {window} to use less"
        )
    theirs = {**theirs, "sliding_window": None}
    if not dense:  # the width of layers that aren't there
        theirs["intermediate_size"] = None
    ours = {
        **to_hf_config(c, dense, asked_of(theirs)),
        "mlp_bias": False,
        "quantization_config": None,
    }
    ours = {"layer_types": ["full_attention"] * c.n_layers, "partial_rotary_factor": 1.0, **ours}
    ours["rope_parameters"].pop("partial_rotary_factor", None)
    for key, value in ours.items():
        if theirs.get(key) not in (None, value):
            raise ValueError(f"{key}={theirs[key]!r:.160} is not supported, only {value!r:.160}")


def hf_tensors(model: LaMoE, names=(), asked: str | None = None) -> dict[str, Tensor]:
    """Their name -> our tensor, or the view of it that they keep apart: to write, or to read into.

    The first half of gate_up_proj's rows is their gate, the second their up; expert e is row e.
    names: of the tensors in a folder. Of some, by transformers 5, all experts of a layer are one.
    """
    model_type = family_of(model.config, dense_layers(model), asked)
    family = as_stored(FAMILIES[model_type], names)
    tensors = {"model.embed_tokens": model.embed.weight, "model.norm": model.norm.weight}
    if not model.config.tie_embeddings:
        tensors["lm_head"] = model.head.weight
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}"
        tensors[f"{at}.input_layernorm"] = block.attn_norm.weight
        tensors[f"{at}.post_attention_layernorm"] = block.ffn_norm.weight
        for name, weight in block.attn.named_parameters():  # q_proj.weight, ...
            tensors[f"{at}.self_attn.{name.removesuffix('.weight')}"] = weight
    tensors = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    for i, block in enumerate(model.blocks):
        tensors |= ffn_tensors(block.ffn, f"model.layers.{i}", family)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def as_stored(family: Family, names) -> Family:
    """The family with the layout that these names have.

    Of transformers 5 with save_original_format=False, or a Granite without shared experts.
    """
    granite = FAMILIES["granitemoeshared"]
    if any(name.endswith(".block_sparse_moe.input_linear.weight") for name in names):
        return granite
    if not any(name.endswith(".experts.gate_up_proj") for name in names):
        return family
    if any(name.endswith(".block_sparse_moe.router.weight") for name in names):
        return granite._replace(router="router", is_stacked=True)
    return family._replace(ffn="mlp", is_stacked=True)


def ffn_tensors(ffn: SwiGLU | MoE, layer: str, family: Family) -> dict[str, Tensor]:
    """hf_tensors of one feed-forward layer, dense or sparse."""

    def cut(name: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
        gate_up = gate_up.chunk(2) if len(family.parts) == 3 else [gate_up]
        parts = zip(family.parts, (*gate_up, down), strict=True)
        return {f"{name}.{part}.weight": tensor for part, tensor in parts}

    at = f"{layer}.{family.ffn}"
    if isinstance(ffn, SwiGLU):
        return cut(at, ffn.gate_up_proj.weight, ffn.down_proj.weight)
    tensors, experts = {f"{at}.{family.router}.weight": ffn.router.weight}, ffn.experts
    if isinstance(ffn.router, DeepSeek):
        tensors[f"{at}.{family.router}.e_score_correction_bias"] = ffn.router.bias
    if ffn.shared is not None:
        tensors |= cut(f"{layer}.{family.shared}", *ffn.shared.parameters())
    elif "n_shared_experts" in family.keys:  # none without: zeros add nothing
        zeros = (torch.zeros_like(stack[0]) for stack in experts.parameters())
        tensors |= cut(f"{layer}.{family.shared}", *zeros)
    if family.is_stacked:
        stacks = experts.named_parameters()
        return tensors | {f"{at}.experts.{name}": weight for name, weight in stacks}
    if len(family.parts) == 2:
        return tensors | cut(at, experts.gate_up_proj, experts.down_proj)
    for e, both in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        tensors |= cut(f"{at}.experts.{e}", *both)
    return tensors
