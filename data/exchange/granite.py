"""IBM's Granite: a Llama or a Mixtral that multiplies by four constants, which weights can take.

The embeddings are multiplied, what a layer adds, the scores of attention; the logits are divided.
Read from a folder, these constants go into the matrices beside them, and ours is left. Where head
and embedding were one matrix they are then two.
"""

from typing import NamedTuple

from torch import Tensor

TYPES = {"granite": "llama", "granitemoe": "mixtral", "granitemoeshared": "granitemoeshared"}
FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
LAST = (".o_proj.weight", ".down_proj.weight", ".output_linear.weight", ".experts.down_proj")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Factors(NamedTuple):
    """What to multiply the matrices with."""

    embedding: float
    residual: float  # the last matrix of attention and of feed-forward layers
    head: float
    query: float
    is_untied: bool  # the head is to be read from the embedding

    def of(self, name: str) -> float:
        if name.endswith(LAST):
            return self.residual
        exact = {EMBED: self.embedding, HEAD: self.head}
        return self.query if name.endswith(".q_proj.weight") else exact.get(name, 1.0)


def take_factors(theirs: dict) -> tuple[dict, Factors | None]:
    """(config.json as of a family without factors, the factors); None where nothing changes."""
    if theirs.get("model_type") not in [*TYPES]:
        return theirs, None
    values = [1.0 if theirs.get(key) is None else theirs[key] for key in FACTORS]
    for key, value in zip(FACTORS, values, strict=True):
        if type(value) not in (int, float) or not 0 < value < 1e9:
            raise ValueError(f"{key}={value!r:.60} is no usable number")
    embedding, residual, scaling, attention = values
    size = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    is_tied = theirs.get("tie_word_embeddings") is True
    is_untied = is_tied and not embedding == scaling == 1
    query = 1.0 if attention == size**-0.5 else attention * size**0.5
    factors = Factors(embedding, residual, 1 / scaling, query, is_untied)
    plain = {key: value for key, value in theirs.items() if key not in FACTORS}
    plain["tie_word_embeddings"] = is_tied and not is_untied
    plain["model_type"] = TYPES[theirs["model_type"]]
    if plain["model_type"] == "granitemoeshared" and not theirs.get("shared_intermediate_size"):
        plain["model_type"] = "mixtral"
    if "rope_theta" not in (plain.get("rope_parameters") or {}):
        plain.setdefault("rope_theta", 1e4)
    return plain, factors


class Multiplied:
    """An open file of theirs, read as if it held the matrices with the factors in them."""

    def __init__(self, file, name: str, factor: float):
        self.file, self.name, self.factor = file, name, factor

    def get_slice(self, name: str):
        return self.file.get_slice(self.name)

    def get_tensor(self, name: str) -> Tensor:
        tensor = self.file.get_tensor(self.name)
        return tensor if self.factor == 1 else tensor.float() * self.factor


def with_factors(files: dict, factors: Factors) -> dict:
    """{name: open file} of a Granite, as one of a model without its factors."""
    names = {name: name for name in files} | ({HEAD: EMBED} if factors.is_untied else {})
    return {k: Multiplied(files[name], name, factors.of(k)) for k, name in names.items()}
