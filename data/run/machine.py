"""What depends on the machine: number formats, memory, the compiler, and signals."""

import collections
import contextlib
import ctypes
import dataclasses
import math
import os
import re
import signal
import sys
import time
import warnings

import torch

import lamoe
from data.run import checkpoint, ranks
from data.run.flags import first_line
from data.run.log import print_line
from data.run.masters import Masters
from data.run.routers import BUILT_IN, with_built_in


def pick_dtype(name: str, device: str) -> str:
    """bf16 where it is faster: on a GPU, and on a CPU that multiplies bf16 (AVX512-BF16 or AMX)."""
    if name != "auto":
        return name
    cpu_has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device == "cuda" or (device == "cpu" and cpu_has_bf16 and ranks.WORLD == 1):
        return "bf16"  # with several ranks, their CPUs may differ
    return "fp32"


def autocast(settings):
    """A context in which matrix products are in settings.dtype."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bf16")


def keep_freed_memory() -> None:
    """Keeps freed memory for the next step; called once the text is out of memory.

    The C library (glibc) is told to keep the large buffers that each step takes and returns.
    Otherwise it gives each back to the system at once, and a third of a step goes into mapping
    them anew, page by page.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to tell
            libc = ctypes.CDLL("libc.so.6")
            libc.malloc_trim(0)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: from the heap, however large
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: don't shrink the heap


def check_memory(config: lamoe.Config) -> None:
    """ValueError for a model that this machine can't hold, before it starts to swap."""
    one = dataclasses.replace(with_built_in(config), n_layers=1, n_dense_layers=0, seq_len=1)
    with checkpoint.shapes_only():
        try:
            model = lamoe.LaMoE(one)
            n, layer = (sum(w.numel() for w in m.parameters()) for m in (model, model.blocks))
            n += layer * (config.n_layers - 1)
        except (RuntimeError, OverflowError):  # more elements than torch can count
            n = math.inf
    here = math.inf
    if os.name == "posix":
        here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 16 * n > here:  # weight, gradient and two moments, in fp32
        raise ValueError(
            f"training {n / 1e9:.1f}B parameters takes {16 * n / 1e9:,.0f} GB and this machine has "
            f"{here / 1e9:,.0f} GB of memory; try a smaller --dim, --n_layers or --n_experts"
        )


@contextlib.contextmanager
def out_of_memory_advice(settings):
    """Turns "out of memory" into a ValueError that names the flags which halve it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch has a class for a GPU's memory, and words for that of a CPU or a Mac.
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not re.search("allocate memory|out of memory", str(error)):
            raise
        half, twice = settings.batch_size // 2, 2 * settings.grad_accum
        advice = "halve --seq_len, or train a smaller model"
        if half:
            flags = f"--batch_size {half} --grad_accum {twice}"
            advice = f"half the memory and the same steps in a new run: {flags}"
        raise ValueError(f"out of memory; {advice}") from None


def can_compile(model: lamoe.LaMoE) -> bool:
    """Whether no layer loops over experts, which asks the device how many rows each of them has."""
    weight = model.embed.weight
    x = torch.empty(0, device=weight.device, dtype=lamoe.compute_dtype(weight))
    return not model.sparse_layers or lamoe.pick_kernels(x, model.config)[1] is lamoe.sorted_moe


def compile_blocks(model: lamoe.LaMoE) -> None:
    """Compiles the block, once for all layers since they share its code, and the loss.

    `forward` and not the module, so that what FSDP hooks around a block stays outside.
    """
    from data import kernels  # here: importing Triton takes a second

    kernels.use()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    model.predict = torch.compile(model.predict, fullgraph=True, dynamic=False)


def undo_compiling(model: lamoe.LaMoE) -> None:
    for module, name in (*((block, "forward") for block in model.blocks), (model, "predict")):
        delattr(module, name)  # the class has it


def has_compiler(device: str) -> bool:
    """Whether torch.compile finds what it needs; a line says so if not."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever a missing compiler makes of it
        why = f"there is no compiler here ({first_line(error)})"
        print(f"           {why}: going on without", file=sys.stderr)
        return False


def compile_model(run) -> bool:
    """Whether it compiled the model. It also runs it once, so that no step has that time in it."""
    if not run.settings.compile:
        return False
    started, (inputs, targets) = time.perf_counter(), run.data.batches(0, run.settings.device)
    with autocast(run.settings):
        if not can_compile(run.model):
            why = "experts need bf16 on an NVIDIA card from Ampere on"
            print_line(f"compile    {why}: not compiled")
            return False
    print_line("compile    writing kernels for this model; about half a minute, less the next time")
    warnings.filterwarnings("ignore", module=r"torch\.")  # hints to itself, in later steps too
    if not has_compiler(run.settings.device):
        return False
    keep_masters(run)
    compile_blocks(run.model)
    here = [torch.cuda.current_device()] if run.settings.device == "cuda" else []
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    with torch.random.fork_rng(here):  # leaves no trace in the run
        try:
            with autocast(run.settings):
                out = run.parallel(inputs, targets, return_logits=False)
            (out.loss + out.aux).backward()
        except torch._dynamo.exc.TorchDynamoException as error:
            if run.model.config.router in BUILT_IN:
                raise
            undo_compiling(run.model)
            why = f"your router can't be compiled: {first_line(error)}"
            print_line(f"compile    {why}; going on without")
            return False
    for weight in run.model.parameters():
        weight.grad = None
    for name, buffer in run.model.named_buffers():  # a router's forward may have changed them
        buffer.copy_(buffers[name])
    print_line(f"           done in {time.perf_counter() - started:.0f} s")
    return True


def set_rates(optimizers, share: float) -> None:
    """The rates of a step, as a share of the highest."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        rate = share * group["highest_lr"]
        if isinstance(group["lr"], torch.Tensor):  # a recorded step reads it where it is
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def can_record(run) -> bool:
    """Whether a compiled step can be a CUDA graph: on one GPU."""
    if run.settings.device != "cuda" or ranks.WORLD > 1:
        return False
    # Before Hopper a grouped product asks for its rows.
    return not run.model.sparse_layers or torch.cuda.get_device_capability() >= (9, 0)


def keep_masters(run) -> None:
    """Puts what Muon trains into bf16, if steps will be recorded. Compiling comes after it, as it
    looks at dtypes: so not with a router of one's own, which may turn out not to compile; nor with
    several micro-steps, whose gradients would add up in bf16.
    """
    settings, is_ours = run.settings, run.model.config.router in BUILT_IN
    if can_record(run) and is_ours and settings.dtype == "bf16" and settings.grad_accum == 1:
        Masters(run.model, run.optimizers[0])


def recorded(take_step, run):
    """take_step as a CUDA graph, if it runs on one GPU, compiled; else itself."""
    works = run.is_compiled and can_record(run)
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = torch.zeros((), device="cuda") if works else 0.0  # set_rates fills it
        if "capturable" in group:  # AdamW wants to be told
            group["capturable"] = works
    if works:
        compile_muon(run.optimizers[0])
    return Recorded(take_step) if works else take_step


def compile_muon(muon) -> None:
    """Compiles Muon's step, by taking one that moves nothing: gradients of 0, a rate of 0, and a
    state that is thrown away. (In a recorded step that pays; else Python needs longer to start it.)
    """
    if not isinstance(muon.move, Masters):  # which compiles it
        muon.move = torch.compile(muon.move, dynamic=False)
    muon.share = torch.ones((), device="cuda")
    state, muon.state = muon.state, collections.defaultdict(dict)
    for weight in (weight for group in muon.param_groups for weight in group["params"]):
        weight.grad = torch.zeros_like(weight)
    set_rates([muon], 0)
    muon.step()
    muon.zero_grad()
    muon.state = state


class Recorded:
    """A training step as one CUDA graph, recorded once and then replayed.

    The step of a small model is thousands of kernels, and Python needs longer to start them than
    the GPU to run them. A recording repeats the same work on the same memory: so batches are
    copied to where it reads them, and rates are tensors. The first steps run as they are, on a
    stream of their own as recording asks: they choose kernels and make the optimizers' state.
    """

    def __init__(self, take_step):
        self.take_step, self.steps_before, self.graph = take_step, 3, None
        self.stream = torch.cuda.Stream()

    def __call__(self, *micro_batches) -> None:
        if self.steps_before > 0:
            self.steps_before -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.take_step(*micro_batches)
            return torch.cuda.current_stream().wait_stream(self.stream)
        if self.graph is None:
            self.micro_batches, self.graph = micro_batches, torch.cuda.CUDAGraph()
            torch.cuda.empty_cache()  # a graph has memory of its own
            with torch.cuda.graph(self.graph):
                self.take_step(*micro_batches)
        for kept, new in zip(self.micro_batches, micro_batches, strict=True):
            torch._foreach_copy_(list(kept), list(new))
        self.graph.replay()


@contextlib.contextmanager
def stop_on_signals():
    """A list that Ctrl-C fills: the current step is finished, then saved. Twice: at once.

    So does SIGTERM, with which schedulers end a job, of a single process: torchrun has its own way.
    """
    numbers = [signal.SIGINT, signal.SIGTERM] if ranks.WORLD == 1 else [signal.SIGINT]
    pressed = []

    def handler(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield pressed
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
