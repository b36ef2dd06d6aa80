"""Qwen3-Next without its novelties: a home for shared experts with qk_norm that most programs know.

Its layers may all be full attention, and are then ours with two gates more: attention's output and
the shared experts' are multiplied by sigmoid(x W). With W = 0 that is a half, and doubling the
matrix behind it makes up for that exactly. Its norms multiply by 1 + weight. A model that was
trained on there has gates that opened: it is no model of ours any more, and is refused.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from lamoe import Config

HALVED = ("self_attn.o_proj.weight", "mlp.shared_expert.down_proj.weight")  # behind a gate
QUERY, SHARED_GATE = "self_attn.q_proj.weight", "mlp.shared_expert_gate.weight"


def close(tensors: dict[str, Tensor], c: Config) -> dict[str, Tensor]:
    """Our tensors, under their names, as theirs with closed gates."""
    theirs = {}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor = (tensor.float() - 1).to(tensor.dtype)
        elif name.endswith(HALVED):
            tensor = 2 * tensor
        elif name.endswith(QUERY):  # of each head the query's rows, then the gate's
            heads = tensor.view(c.n_heads, 1, c.head_size, c.dim)
            tensor = torch.cat([heads, torch.zeros_like(heads)], 1).flatten(0, 2)
        theirs[name] = tensor
        if name.endswith(HALVED[1]):
            gate = name.replace("shared_expert.down_proj", "shared_expert_gate")
            theirs[gate] = torch.zeros(1, c.dim, dtype=tensor.dtype, device=tensor.device)
    return theirs


class WithoutGates:
    """An open file of theirs, read as if it held our tensors; ValueError if a gate is not zero."""

    def __init__(self, file, c: Config):
        self.file, self.c = file, c

    def get_slice(self, name: str):
        found = self.file.get_slice(name)
        shape, dtype = found.get_shape(), found.get_dtype()
        if name.endswith(QUERY):
            shape = [shape[0] // 2, *shape[1:]]
        return SimpleNamespace(get_shape=lambda: shape, get_dtype=lambda: dtype)

    def get_tensor(self, name: str) -> Tensor:
        tensor = self.file.get_tensor(name)
        if name.endswith("norm.weight"):
            return 1 + tensor.float()
        if name.endswith(HALVED):
            return tensor / 2
        if name.endswith(QUERY):
            query, gate = tensor.view(self.c.n_heads, 2, -1, self.c.dim).unbind(1)
            self.check(name, gate)
            return query.flatten(0, 1)
        return tensor

    @staticmethod
    def check(name: str, gate: Tensor) -> None:
        if gate.any():
            remedy = "to train elsewhere, export without --family qwen3_next"
            raise ValueError(
                f"{name} has a gate that is open, and only closed ones are supported; {remedy}"
            )


def without_gates(files: dict, c: Config) -> dict:
    """{name: open file} of a Qwen3-Next, as one of a model of ours."""
    for name in [name for name in files if name.endswith(SHARED_GATE)]:
        WithoutGates.check(name, files[name].get_tensor(name))
    opened = {name: WithoutGates(file, c) for name, file in files.items()}
    return {name: file for name, file in opened.items() if not name.endswith(SHARED_GATE)}
