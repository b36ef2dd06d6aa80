"""Several GPUs: `torchrun --nproc_per_node N train.py` starts N processes, the ranks.

Every rank takes its share of each batch and averages its gradients with those of the others, so
that the run is the one of a single process with the same flags. Only rank 0 writes and prints.

Two routers differ, because they look at a whole batch while the layer runs: `noisy` computes its
CV^2, and `switch` its capacity, within the batch of each rank.
"""

import contextlib
import datetime
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from data.run.flags import first_line
from data.run.routers import BUILT_IN

# torchrun tells each process its number and how many there are.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(device: str) -> None:
    """Meets the other ranks; each takes the GPU of its number on this host."""
    if WORLD == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    hours = datetime.timedelta(hours=3)  # the others wait while rank 0 reads a large text
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=hours)


def end_distributed() -> None:
    """The others wait for rank 0, then all leave."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def explain_dead_rank():
    """Among several ranks, an error of torch's ends this one with a line instead of a traceback."""
    try:
        yield
    except RuntimeError as error:
        if WORLD == 1:
            raise
        print(f"error: rank {RANK}: {first_line(error)}", file=sys.stderr)
        print("       if another rank died, see its line; go on: add --resume", file=sys.stderr)
        os._exit(3)  # at once: a clean end would wait for the rank that is gone


def share_of_rows(batch_size: int) -> range:
    """The rows of a batch that this rank computes."""
    if batch_size % WORLD:
        raise ValueError(
            f"batch_size={batch_size} is not divisible by {WORLD} processes; try "
            f"--batch_size {max(1, round(batch_size / WORLD)) * WORLD}"
        )
    return range(RANK, batch_size, WORLD)


def sum_over_ranks(x: np.ndarray, device) -> np.ndarray:
    total = torch.from_numpy(x).to(device, torch.float32)
    dist.all_reduce(total)
    return total.double().cpu().numpy()


def is_sharded(name: str) -> bool:
    """Whether FSDP shards this parameter: experts and embeddings, nearly all of the weights.

    A stack is cut between experts, so that Muon finds whole matrices in each shard. Every rank has
    the rest: attention and dense layers, for the same reason; the router, for it is in fp32.
    """
    return any(part in name for part in (".ffn.experts.", "embed.", "head."))


def is_shard(x) -> bool:
    return hasattr(x, "full_tensor")


def local(x: torch.Tensor) -> torch.Tensor:
    """The part of x that is here: all of it, unless it is sharded."""
    return x.to_local() if is_shard(x) else x


def parallelize(model, settings):
    """The model as this rank runs it: itself, a copy kept equal (DDP), or in shards (FSDP2)."""
    if WORLD == 1:
        return model.to(settings.device)
    if settings.device == "cpu" and dist.get_backend() == "nccl":
        raise ValueError("this run was on the CPU; go on there with --device cpu")
    if not settings.fsdp:
        is_own = model.config.router not in BUILT_IN  # may have parameters that it doesn't use
        options = {"gradient_as_bucket_view": True, "find_unused_parameters": is_own}
        return DistributedDataParallel(model.to(settings.device), **options)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    others = {weight for name, weight in model.named_parameters() if not is_sharded(name)}
    dtype = torch.bfloat16 if settings.dtype == "bf16" else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = dist.device_mesh.init_device_mesh(settings.device, (WORLD,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=others)
    return model.to(settings.device)


def averaging(parallel, on: bool):
    """A context in which backward averages gradients over the ranks, or leaves that for later."""
    if hasattr(parallel, "set_requires_gradient_sync"):  # FSDP
        parallel.set_requires_gradient_sync(on)
    if hasattr(parallel, "no_sync") and not on:  # DDP
        return parallel.no_sync()
    return contextlib.nullcontext()


def average_unsharded(parallel) -> None:
    """Averages the gradients that FSDP leaves alone: those of parameters that it doesn't shard."""
    if not hasattr(parallel, "set_requires_gradient_sync"):
        return
    grads = [p.grad for p in parallel.parameters() if not is_shard(p) and p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = (flat / WORLD).split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


def total_norm(grads) -> torch.Tensor:
    """The norm of all gradients, in fp32 even where some are in bf16."""
    if is_shard(grads[0]):
        return torch.nn.utils.get_total_norm(grads)
    norms, fp32 = [], torch.float32
    for dtype in dict.fromkeys(grad.dtype for grad in grads):  # mixed, they take longer
        norms += torch._foreach_norm([grad for grad in grads if grad.dtype == dtype], dtype=fp32)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parallel, most: float, muon) -> torch.Tensor:
    """Scales gradients down to a norm of at most `most`; returns the norm before, of all shards.

    Those of muon are only told their share: its own first pass scales them.
    """
    parameters = [p for p in parallel.parameters() if p.grad is not None]
    parts = [[p for p in parameters if is_shard(p) == of_shards] for of_shards in (False, True)]
    norms = [total_norm([p.grad for p in part]) for part in parts if part]
    norms = [norm.full_tensor() if is_shard(norm) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms))
    muon.share = (most / (total + 1e-6)).clamp(max=1.0)
    of_muon = {p for group in muon.param_groups for p in group["params"]}
    for part in parts:
        if others := [p for p in part if p not in of_muon]:
            torch.nn.utils.clip_grads_with_norm_(others, most, total)
    return total


def full_state(state):
    """A state dict without shards: the same file whatever the number of ranks."""

    def gather(x):  # one at a time, and only rank 0 keeps it: all together may not fit a GPU
        full = x.full_tensor()
        return full.cpu() if RANK == 0 else None

    return tree_map(lambda x: gather(x) if is_shard(x) else x, state)


def shard_like(weight, value):
    """A full value of a weight's shape, such as its momentum, in shards if the weight is."""
    if is_shard(weight) and not is_shard(value) and value.shape == weight.shape:
        from torch.distributed.tensor import distribute_tensor  # here: a second to import

        return distribute_tensor(value, weight.device_mesh, weight.placements)
    return value


def same_on_all(choose):
    """What rank 0 chooses, on every rank; its mistake too."""
    choice = [None]
    if RANK == 0:
        try:
            choice = [choose()]
        except ValueError as error:
            choice = [error]
    if WORLD > 1:
        dist.broadcast_object_list(choice)
    if isinstance(choice[0], ValueError):
        raise choice[0]
    return choice[0]


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block first; the others wait for it, and then run it, too."""
    if RANK > 0:
        dist.barrier()
    try:
        yield
    finally:  # a mistake found here is one that all of them find
        if RANK == 0 and WORLD > 1:
            dist.barrier()


def on_any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    flags = [flag] * WORLD
    if WORLD > 1:
        dist.all_gather_object(flags, flag)
    return any(flags)
