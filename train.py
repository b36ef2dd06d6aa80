"""Train LaMoE: text -> tokens -> windows -> a plain loop -> log.csv, last.pt, best.pt, loss.png.

    python train.py                              the embedded corpus, minutes on a laptop
    python train.py --data book.txt              your own text: a file, a folder, a zip, or A,B,C
    python train.py --resume                     go on where the newest run stopped
    python train.py --init FOLDER --data book.txt  fine-tune a Hugging Face model, or a checkpoint
    python train.py --device cuda
    python train.py --plot runs/A runs/B         runs in one picture

Notable features
- every field of TrainConfig and of lamoe.Config is a flag; nothing is named twice
- Muon on the attention matrices, AdamW on the rest; warm-up, then linear to zero
- batches without replacement from a seeded permutation, so a run resumes bit for bit (on a CPU)
- validation in bits per byte, over every byte: comparable across tokenizers

References
 [1] AdamW                      Loshchilov & Hutter 2017   arXiv:1711.05101
 [2] Muon                       Jordan et al. 2024         kellerjordan.github.io/posts/muon
 [3] Linear decay to zero       Bergsma et al. 2025        arXiv:2502.15938
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import typing
import warnings
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

import bpe
import lamoe
from bpe import Tokenizer
from data import datasets, logs
from data.tokens import encode, replacing
from lamoe import first_line

# --- 1. What can be chosen: fields are flags ------------------------------------------------------


@dataclass
class TrainConfig:
    """How to train; lamoe.Config says what."""

    data: str = "stories"  # an embedded corpus, a public set, a file, folder or zip; or A,B,C
    text_column: str = ""  # of csv and jsonl files; empty: guessed
    out: str = ""  # the run's folder; empty: runs/ and the data's name
    init: str = ""  # Hugging Face folder or checkpoint: weights, config and tokenizer to start from
    device: str = "auto"  # auto, cpu, cuda or mps
    preset: str = ""  # laptop, gpu or gpu-large; empty: by device
    draw_mb: int = 0  # text to draw of an embedded corpus [MB]; 0: by preset
    tokenizer: str = "bpe"  # bpe (trained on the data) or bytes
    dtype: str = "auto"  # of matrix products: bf16 or fp32; auto: bf16 where it is faster
    seed: int = 0  # of weights and of the order of batches
    steps: int = 850  # optimizer steps; 0: by preset
    batch_size: int = 16  # windows a micro-step, on all GPUs together
    grad_accum: int = 1  # micro-steps an optimizer step
    lr: float = 8e-3  # of AdamW, at its highest
    muon_lr: float = 0.02  # of Muon, at its highest [2]
    muon_ffn: bool = False  # Muon on the experts too, not only on attention
    weight_decay: float = 0.1  # of matrices, times the rate
    warmup: float = 0.05  # share of the steps in which the rate rises
    clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 0  # steps; 0: five times a run
    save_every: int = 0  # steps; 0: with each evaluation
    log_every: int = 10  # steps
    compile: bool = False  # let torch.compile write the kernels: a GPU trains twice as fast
    fsdp: bool = False  # under torchrun: shard experts and embeddings, where DDP copies them
    track: str = ""  # mlflow: log there too, into ./mlruns or MLFLOW_TRACKING_URI

    def __post_init__(self):
        most = 2**63 - 1
        ranges = dict.fromkeys(("eval_every", "save_every", "seed", "draw_mb"), (0, most))
        ranges |= dict.fromkeys(("steps", "batch_size", "grad_accum", "log_every"), (1, most))
        ranges |= dict.fromkeys(("lr", "muon_lr", "weight_decay"), (0, math.inf))
        ranges |= {"warmup": (0, 1), "clip": (1e-12, math.inf)}
        for name, (least, most) in ranges.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name}={value} must be from {least} to {most}")
        choices = {"tokenizer": ("bpe", "bytes"), "dtype": ("auto", "bf16", "fp32")}
        for name, known in (choices | {"track": ("", "mlflow")}).items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; try one of {known}")
        if self.fsdp and self.muon_ffn:
            raise ValueError(
                "--fsdp shards the experts, which Muon needs whole; leave it out, or start a run "
                "with --no-muon_ffn --lr 4e-3"
            )
        self.eval_every = self.eval_every or max(1, self.steps // 5)
        self.save_every = self.save_every or self.eval_every


LAPTOP = {"qk_norm": True}
GPU = {**LAPTOP, "steps": 1200, "batch_size": 64, "compile": True, "draw_mb": 64}
# 285M parameters, 115M active, for gigabytes of text; fits a card of 24 GB. 262,144 tokens a step.
GPU_LARGE = {**GPU, "dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 4, "n_experts": 8}
GPU_LARGE |= {"hidden_dim": 1024, "seq_len": 1024, "vocab_size": 50304, "tie_embeddings": True}
GPU_LARGE |= {"batch_size": 16, "grad_accum": 16, "steps": 4000, "lr": 1e-3, "muon_lr": 0.02}
GPU_LARGE |= {"muon_ffn": False}  # so that --fsdp can shard them
PRESETS = {"laptop": LAPTOP, "gpu": GPU, "gpu-large": GPU_LARGE}
# Text below so many bytes, and what suits it. A token must be met often to be learned, so small
# texts get few; a short context makes many windows of them; and they are read several times over,
# which weight decay keeps from being learned by heart. The third row is for the embedded corpora:
# they have few words, weight decay harms the recall of names, and with muon_ffn it comes late. For
# articles, where Muon has the experts, lr is that of embeddings and head: without it, 4e-3.
ARTICLES = {"vocab_size": 4096, "seq_len": 256, "n_layers": 3, "lr": 2e-2, "weight_decay": 0.3}
ARTICLES |= {"muon_lr": 0.04, "muon_ffn": True}
TEXTS = (
    (4e6, {"vocab_size": 2048, "seq_len": 64, "n_layers": 4, "lr": 4e-3, "weight_decay": 0.6}),
    (6e6, ARTICLES),
    (1e8, {"vocab_size": 2048, "seq_len": 256, "n_layers": 3, "lr": 8e-3, "weight_decay": 0.1}),
    (math.inf, {"vocab_size": 8192, "seq_len": 512, "lr": 4e-3, "weight_decay": 0.1}),
)
# With --init: what is known already is not to be torn down.
TUNE = {"lr": 2e-4, "muon_lr": 5e-4, "muon_ffn": False}
CLASSES = (TrainConfig, lamoe.Config)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags given; one not given is absent, so that a preset can fill it in."""

    description = __doc__.split("\n\n")[0]
    parser = lamoe.OneLineParser("train.py", description=description, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--plot", nargs="+", metavar="RUN", help="draw runs into one picture, --out"
    )
    for cls in CLASSES:
        group = parser.add_argument_group(cls.__name__)
        # The comment behind a field is the help of its flag.
        meaning = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(cls), re.M))
        for field in dataclasses.fields(cls):
            default = LAPTOP.get(field.name, field.default)
            default = "by the text" if any(field.name in suits for _, suits in TEXTS) else default
            text = f"{meaning[field.name]} (default: {default})".replace("%", "%%")
            options = {"default": argparse.SUPPRESS, "help": text}
            if field.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:  # of `int | None` the int
                options["type"] = (*typing.get_args(field.type), field.type)[0]
            group.add_argument(f"--{field.name}", **options)
    return parser.parse_args(arguments)


def fill(cls, values: dict):
    """An instance of a dataclass from those values that name its fields."""
    return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


class Ranks(typing.NamedTuple):
    """Which process of how many this is: one, unless torchrun started several (section 6)."""

    rank: int = 0
    world: int = 1


RANKS = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

# --- 2. Data: one flat array of ids -> windows -> batches -----------------------------------------
# Ids are those of <|endoftext|> (eot), a document, eot, a document, ..., eot.


def windows(
    tokens: np.ndarray, eot: int, length: int, documents: array | None = None
) -> np.ndarray:
    """(start, next start) of windows of `length` positions that begin at a document where they can.

    The next window begins at the last document that starts inside this one, else where it ends. A
    start in mid-story would ask the model for names it was never told. Between a window's start and
    the next one's, each token is met exactly once: the span that evaluation scores.

    documents: where they start, if that is known already.
    """
    if documents is None:
        documents = document_starts(tokens[:-1], eot)
    last = len(tokens) - 1
    documents = documents + array("q", [last + length])  # one beyond every window
    starts, i = array("q", [0]), 0  # documents[i]: the last one that starts inside the window
    while (start := starts[-1]) < last:
        while documents[i + 1] <= start + length:
            i += 1
        starts.append(min(documents[i] if documents[i] > start else start + length, last))
    return np.stack([starts[:-1], starts[1:]], axis=1)


def document_starts(tokens: np.ndarray, eot: int, block: int = 1 << 22) -> array:
    """Positions of eot: position p is the token before the text that starts at p + 1.

    Of a mapped file, blocks are read beside the mapping: pages that it touched would stay.
    """
    found = array("q")
    for at in range(0, len(tokens), block):
        part = tokens[at : at + block]
        if isinstance(tokens, np.memmap):
            place = tokens.offset + at * tokens.itemsize
            part = np.fromfile(tokens.filename, tokens.dtype, len(part), offset=place)
        found.frombytes((np.flatnonzero(part == eot) + at).astype(np.int64).tobytes())
    return found


class Batches:
    """Windows in a seeded order without replacement; batch i is a function of i alone."""

    def __init__(self, tokens: np.ndarray, eot: int, length: int, size: int, seed: int):
        self.tokens, self.length, self.size, self.seed = tokens, length, size, seed
        if size % RANKS.world:
            raise ValueError(
                f"batch_size={size} is not divisible by {RANKS.world} processes; try "
                f"--batch_size {max(1, round(size / RANKS.world)) * RANKS.world}"
            )
        self.rows = range(RANKS.rank, size, RANKS.world)  # those of this process
        last = len(tokens) - 1 - length  # the text's last window moves back to be full
        documents = document_starts(tokens[:-1], eot)  # a pass over the whole text
        starts = windows(tokens, eot, length, documents)[:, 0]
        self.starts = np.unique(np.minimum(starts, last))
        self.is_cut = ~np.isin(self.starts, documents)  # begins where the one before ended
        self.epoch, self.order = -1, None

    def __call__(self, i: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of batch i, (B, T) each: this process's share of its rows."""
        starts = [self.start(i * self.size + row) for row in self.rows]
        ids = self.tokens[np.array(starts)[:, None] + np.arange(self.length + 1)]
        ids = torch.from_numpy(ids.astype(np.int64))
        if device == "cuda":  # from pinned memory the copy runs beside the step before
            ids = ids.pin_memory()
        ids = ids.to(device, non_blocking=True)
        return ids[:, :-1], ids[:, 1:]

    def start(self, n: int) -> int:
        epoch, position = divmod(n, len(self.starts))
        if epoch != self.epoch:
            generator = np.random.default_rng((self.seed, epoch))
            # Windows that begin inside a text begin elsewhere each time it is read.
            earlier = generator.integers(self.length) if epoch else 0
            starts = np.maximum(self.starts - earlier * self.is_cut, 0)
            self.epoch, self.order = epoch, generator.permutation(starts)
        return self.order[position]


# --- 3. Evaluation: bits per byte, and where they go ----------------------------------------------


class Score(typing.NamedTuple):
    loss: float  # nats a token
    bits_per_byte: float
    bits_of_label: np.ndarray | None  # total bits of the bytes with each label


@torch.inference_mode()
def evaluate(model, ids, spans, tokenizer, settings, labels=None, ranks=None) -> Score:
    """Scores every token of ids but the first, each once, in the window whose span it is in.

    labels: a number for each byte of those tokens: its source, or an index into datasets.KINDS.
    Several ranks share the windows, unless told that this one is alone: ranks=Ranks().
    """
    ranks, was_training = ranks or RANKS, model.training
    model.eval()
    device, length = model.embed.weight.device, model.config.seq_len
    rows = max(1, (2_048 if settings.device == "cpu" else 16_384) // length)
    missing = -len(spans) % (rows * ranks.world)  # empty ones, so that all blocks are of one shape
    blocks = np.concatenate([spans, np.zeros((missing, 2), spans.dtype)])
    nats = np.zeros(len(ids) - 1)
    with torch.compiler.set_stance("force_eager"):  # not worth a compilation of its own
        for block in blocks.reshape(-1, ranks.world, rows, 2)[:, ranks.rank]:
            at = block[:, :1] + np.arange(length)
            counted = at < block[:, 1:]
            at = np.where(counted, at, block[:, :1])
            inputs, targets = (
                torch.from_numpy(ids[at + offset].astype(np.int64)).to(device) for offset in (0, 1)
            )
            with autocast(settings):
                logits = model(inputs).logits.float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="none"
            )
            nats[at[counted]] = losses.view(targets.shape).cpu().numpy()[counted]
    model.train(was_training)
    if ranks.world > 1:
        total = torch.from_numpy(nats).to(device, torch.float32)
        dist.all_reduce(total)
        nats = total.double().cpu().numpy()
    sizes = tokenizer.byte_lengths[ids[1:]]
    bits = nats / math.log(2)
    of_label = None
    if labels is not None:  # a token has the label of its last byte
        label = labels[np.cumsum(sizes) - 1]
        of_label = np.bincount(label, weights=bits, minlength=len(datasets.KINDS))
    return Score(float(nats.mean()), float(bits.sum() / sizes.sum()), of_label)


# --- 4. Optimizers and schedule -------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal [2]: no direction of a matrix is learned slowly.

    A Newton-Schulz iteration pushes all singular values of the momentum near 1, on a GPU in bf16,
    which few CPUs have. torch's own Muon does the same matrix by matrix; here those of one shape,
    stacks of experts too, go through it as one batch, a dozen kernels instead of hundreds.
    """

    def __init__(self, matrices, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                for weight in weights:
                    if not self.state[weight]:
                        self.state[weight]["momentum"] = torch.zeros_like(weight)
                momenta = [self.state[weight]["momentum"] for weight in weights]
                grads = [weight.grad for weight in weights]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
                stack = torch.stack(ahead).flatten(0, -3)
                stack = stack.bfloat16() if stack.is_cuda else stack
                steps = orthogonal(stack).to(weights[0].dtype).view(len(weights), *shape)
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * max(1, shape[-2] / shape[-1]) ** 0.5
                torch._foreach_add_(weights, list(steps), alpha=-rate)


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U V^T, nearly, of each matrix U S V^T of a batch: singular values within 0.7 to 1.2 [2].

    Each step maps every singular value s to a s + b s^3 + c s^5, which needs products only.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        update = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, update, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(model: lamoe.LaMoE, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon [2] on the attention matrices, AdamW [1] on the rest; norms are not decayed.

    muon_ffn gives Muon the experts too. On articles that is 0.05 bits a byte better after 300
    steps; on the embedded corpora it is worse, for copying is discovered later.
    """
    matrices, sharded, routers, vectors = [], [], [], []
    for name, weight in model.named_parameters():
        of_muon = not is_sharded(name) or config.muon_ffn and ".ffn." in name
        kind = routers if ".router." in name else matrices if of_muon else sharded
        (vectors if weight.dim() < 2 else kind).append(weight)
    decay = config.weight_decay
    groups = [{"params": of_adamw, "weight_decay": decay} for of_adamw in (sharded, routers)]
    groups = [group for group in groups if group["params"]]
    groups.append({"params": vectors, "weight_decay": 0.0})
    muon = Muon(matrices, config.muon_lr, decay)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    for group in (*muon.param_groups, *adamw.param_groups):
        group["highest_lr"] = group["lr"]
    return [muon, adamw]


def schedule(step: int, config: TrainConfig) -> float:
    """The share of the highest rate at a step: a linear rise, then linear to zero [3]."""
    rise = max(1, round(config.warmup * config.steps))
    return min((step + 1) / rise, (config.steps - step) / max(1, config.steps - rise))


# --- 5. Setting up: device, dtype, sizes, data ----------------------------------------------------


def pick_dtype(name: str, device: str) -> str:
    """bf16 where it pays: on a GPU, and on a CPU that wins a short race with it."""
    if name != "auto":
        return name
    if device != "cpu":
        return {"cuda": "bf16", "mps": "fp32"}[device]
    if RANKS.world > 1:  # each might come to another result
        return "fp32"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, race = torch.randn(512, 512).to(dtype), []
        for _ in range(7):
            start = time.perf_counter()
            x @ x
            race.append(time.perf_counter() - start)
        seconds[dtype] = min(race)
    return "bf16" if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else "fp32"


class Data(typing.NamedTuple):
    tokenizer: Tokenizer
    batches: Batches
    corpus: datasets.Corpus
    val_ids: np.ndarray
    spans: np.ndarray  # windows of val_ids that begin at documents
    floor: float | None  # bits per byte that no model can beat, where the source is known
    source_of_byte: np.ndarray | None  # of the validation text, where there is more than one


def load_data(settings: TrainConfig, shape: dict, saved: dict | None, corpus, ready=None) -> Data:
    """Text -> tokenizer (the checkpoint's, or one that is ready) -> ids on disk -> windows."""
    n_bytes = corpus.train.n_bytes
    say(f"data       {settings.data}: {corpus.how}; {n_bytes / 1e6:.1f} MB to train on")
    if saved and saved["text"] != corpus.key:
        raise ValueError(
            f"the text of {settings.data} is not the one this run began with; bring that back, or "
            f"start a new run with another --out"
        )
    tokenizer = Tokenizer.from_state(saved["tokenizer"]) if saved else ready
    tokenizer = tokenizer or make_tokenizer(settings, shape["vocab_size"], corpus)
    name = hashlib.sha256(json.dumps(tokenizer.state()).encode()).hexdigest()[:12]
    train_ids, val_ids = (
        encode(side, tokenizer, datasets.CACHE / f"{corpus.key}-{name}-{of}.ids", say_in_place)
        for of, side in (("train", corpus.train), ("val", corpus.val))
    )
    length = shape["seq_len"]
    if min(len(train_ids), len(val_ids)) < length + 2:
        raise ValueError(
            f"{settings.data} is too short: {len(train_ids)} tokens to train on and {len(val_ids)} "
            f"to validate do not fill a context of {length}; give more text, or a --seq_len of "
            f"{max(1, min(len(train_ids), len(val_ids)) - 2)} or less"
        )
    batches = Batches(train_ids, tokenizer.eot, length, settings.batch_size, settings.seed)
    say(
        f"tokens     {len(train_ids):,} of a vocabulary of {tokenizer.vocab_size:,} "
        f"({n_bytes / len(train_ids):.2f} bytes each); {len(batches.starts):,} windows of {length}"
    )
    floor = None
    if corpus.floor_bits is not None:
        floor = corpus.floor_bits.sum() / len(corpus.kind_of_byte)
    spans = windows(val_ids, tokenizer.eot, length)
    sources = source_of_byte(val_ids, tokenizer, corpus) if len(corpus.sources) > 1 else None
    return Data(tokenizer, batches, corpus, val_ids, spans, floor, sources)


SAMPLE = 100_000_000  # bytes: a tokenizer learns nothing new from more


def make_tokenizer(settings: TrainConfig, vocab_size: int, corpus) -> Tokenizer:
    """Learned from the training text, or remembered from an earlier run on it."""
    if settings.tokenizer == "bytes":
        return Tokenizer([])
    code = hashlib.sha256(Path(bpe.__file__).read_bytes()).hexdigest()[:8]  # an edit: learn anew
    path = datasets.CACHE / f"{corpus.key}-{vocab_size}-{code}.bpe"
    if path.exists():
        return Tokenizer.load(path)
    every = math.ceil(corpus.train.n_bytes / SAMPLE)
    if every > 1:
        say(f"tokenizer  learns from one document in {every}, {SAMPLE / 1e6:.0f} MB in all")
    sample = itertools.islice(corpus.train, 0, None, every)
    tokenizer = Tokenizer.train(sample, vocab_size, say_in_place)
    with replacing(path) as file:
        file.write(json.dumps(tokenizer.state()).encode())
    return tokenizer


def source_of_byte(val_ids: np.ndarray, tokenizer: Tokenizer, corpus) -> np.ndarray:
    """For each byte of the validation text, separators included, an index into corpus.sources."""
    ends = np.flatnonzero(val_ids[1:] == tokenizer.eot)
    bytes_till = np.cumsum(tokenizer.byte_lengths[val_ids[1:]])[ends]
    return np.repeat(corpus.val.sources, np.diff(bytes_till, prepend=0))


def by_source(score: Score, data: Data) -> dict:
    """Columns of the log: bits per byte of each source, if evaluate was given source_of_byte."""
    if data.source_of_byte is None:
        return {}
    n_bytes = np.bincount(data.source_of_byte, minlength=len(data.corpus.sources))
    names = enumerate(data.corpus.sources)  # of some all texts may be on the side of training
    return {
        f"val_bpb_{name}": score.bits_of_label[i] / n_bytes[i] for i, name in names if n_bytes[i]
    }


def device_and_preset(given: dict) -> tuple[str, str]:
    device = lamoe.pick_device(given.get("device", "auto"))
    preset = given.get("preset") or ("gpu" if device == "cuda" else "laptop")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; try one of {sorted(PRESETS)}")
    return device, preset


def settle(given: dict, saved: dict | None, corpus, init=None) -> tuple[TrainConfig, dict]:
    """Settings, and fields of lamoe.Config: by flag, else preset, else the text's size, or default.

    init: the Config of the model to start from; it and TUNE come right after the flags, and flags
    can't change what its weights depend on.
    """
    if saved:
        settled = {**saved["config"], **saved["train_config"], **saved["given"]}
        for name, value in given.items():
            if name not in PLACES and value != settled[name]:
                raise ValueError(
                    f"--{name} {value} differs from the run's {settled[name]}; leave it out to "
                    f"resume, or start a new run with another --out"
                )
        settings = TrainConfig(**saved["train_config"])
        device = lamoe.pick_device(given.get("device", settings.device))
        places = {"device": device, "fsdp": given.get("fsdp", False)}
        places["compile"] = given.get("compile", settings.compile and device == "cuda")
        return dataclasses.replace(settings, **places), saved["config"]
    device, preset = device_and_preset(given)
    by_text = next(suits for limit, suits in TEXTS if corpus.train.n_bytes < limit)
    chosen = {**by_text, **PRESETS[preset], **given}
    if init:
        chosen = {**chosen, **TUNE, **fit(init, chosen["seq_len"], given), **given}
    settings = fill(TrainConfig, {**chosen, "device": device, "preset": preset})
    settings.dtype = pick_dtype(settings.dtype, device)
    config = fill(lamoe.Config, chosen)
    check_memory(config)  # mistakes, before any work is done
    return settings, dataclasses.asdict(config)


FREE = "seq_len dropout balance_weight z_weight capacity_factor eval_capacity_factor jitter".split()
FREE += ["bias_rate", "sequence_weight"]  # no weight depends on these


def fit(init: lamoe.Config, seq_len: int, flags: dict) -> dict:
    """The fields of a model to start from, cut to seq_len; a flag may change those in FREE."""
    fields = {**dataclasses.asdict(init), "seq_len": min(seq_len, init.seq_len)}
    if "tokenizer" in flags:
        raise ValueError(f"--tokenizer: {flags['init']} brings its own; leave it out")
    for name, value in flags.items():
        if name in fields and name not in FREE and value != fields[name]:
            raise ValueError(
                f"--{name} {value} differs from the {fields[name]} of {flags['init']}; leave it out"
            )
    if flags.get("seq_len", 0) > init.seq_len:
        raise ValueError(
            f"--seq_len {flags['seq_len']} is more than the {init.seq_len} positions that "
            f"{flags['init']} knows; try --seq_len {init.seq_len}"
        )
    return fields


def keep_freed_memory() -> None:
    """Tells glibc to keep the large buffers that each training step takes and returns.

    Otherwise it gives each back to the system at once, and a third of a step on a CPU goes into
    mapping them anew, page by page. Called once the text is out of memory.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc: nothing to tell
            libc = ctypes.CDLL("libc.so.6")
            libc.malloc_trim(0)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: from the heap, however large
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: don't shrink the heap


def check_memory(config: lamoe.Config) -> None:
    """Refuses a model that this machine can't hold, before it starts to swap."""
    one = dataclasses.replace(config, n_layers=1, n_dense_layers=0)
    with torch.device("meta"):  # shapes without memory
        try:
            model = lamoe.LaMoE(one)
            n, layer = (sum(w.numel() for w in m.parameters()) for m in (model, model.blocks))
            n += layer * (config.n_layers - 1)
        except (RuntimeError, OverflowError):  # more elements than torch can count
            n = math.inf
    here = math.inf
    if os.name == "posix":
        here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 16 * n > here:
        raise ValueError(
            f"training {n / 1e9:.1f}B parameters takes {16 * n / 1e9:,.0f} GB and this machine has "
            f"{here / 1e9:,.0f} GB of memory; try a smaller --dim, --n_layers or --n_experts"
        )


PLACES = ("out", "device", "compile", "fsdp")  # where a run happens: free to differ on a resume
RUN_FILES = ("last.pt", "best.pt", "log.csv", "load.csv")
DONE = {"step": 0, "seconds": 0.0, "best": math.inf, "best_step": 0}  # of a run: how far it is


def load_init(path: str | None):
    """(model with fp32 weights, tokenizer) to start from; (None, None) without a path."""
    if not path:
        return None, None
    model, tokenizer = lamoe.load(path, dtype=torch.float32)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer; put the model's tokenizer.json there")
    return model, tokenizer


def new_folder(given: dict) -> Path:
    """The folder of a new run, not made yet: never one in which a run already is."""
    if given.get("out"):
        folder = Path(given["out"])
    else:
        folder = logs.first_free(Path("runs") / Path(given.get("data", "stories")).resolve().stem)
    if any((folder / name).exists() for name in RUN_FILES):
        raise ValueError(
            f"{folder} already holds a run; go on: python train.py --resume --out {folder}; "
            f"or choose another --out"
        )
    existing = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{folder}: {existing} is no folder to write in; choose another --out")
    return folder


def make_folder(folder: Path) -> None:
    """With its parents, and each entry flushed: a power cut must not take all that is in it."""
    folder = folder.absolute()
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        lamoe.flush_folder(folder.parent)


def old_folder(given: dict) -> Path:
    """The folder to resume: --out, or the newest run.

    With the flags of a run that was killed before its folder was there, it is that of a new one:
    a command with --resume always goes on or begins.
    """
    runs = sorted(Path("runs").glob("*/log.csv"), key=lambda path: path.stat().st_mtime)
    if "out" not in given and runs:
        return runs[-1].parent
    folder = Path(given.get("out") or "runs")
    if given.get("out") and folder.is_dir():
        return folder
    if knows_what(given) and not folder.is_file():
        return new_folder(given)
    if given.get("out"):
        raise ValueError(
            f"{folder}: no such run to resume; start one: python train.py --out {folder}"
        )
    raise ValueError("no run in runs/ to resume; start one: python train.py")


def knows_what(given: dict) -> bool:
    """Whether flags say what to train, not only where."""
    return bool(given.keys() - set(PLACES))


def begin_again(folder: Path, given: dict) -> None:
    """Says that a run without a checkpoint starts over, if its flags are known.

    They are in the checkpoint; without one, the default flags might be those of another run.
    """
    if not knows_what(given):
        raise ValueError(
            f"{folder} has no usable checkpoint, and without one its flags are not known; repeat "
            f"them, at least --data: python train.py --resume --out {folder} --data stories"
        )
    found = any((folder / name).exists() for name in RUN_FILES)
    kept = "; what is there gets .old" if found else ""
    say(f"           no usable checkpoint in {folder}: starting over{kept}")


def remove_leftovers(folder: Path) -> None:
    """Temporary files of a run that was killed while it wrote them; whoever locks it may."""
    for name in RUN_FILES:
        for left in folder.glob(f"{name}.*.tmp"):
            left.unlink()


def usable_checkpoint(folder: Path) -> dict | None:
    """What last.pt holds; None, and why, if a run can't go on from it.

    If it can't be read at all, that is an OSError: it may be as good as ever.
    """
    path = folder / "last.pt"
    if not path.exists():
        return None
    try:
        saved = lamoe.read(path)
        types = {"given": dict, "train_config": dict, "tokenizer": dict, "text": str, "meter": list}
        types |= {"optimizers": list, "rng": torch.Tensor, "done": dict}
        wrong = [name for name, kind in types.items() if not isinstance(saved.get(name), kind)]
        if wrong := wrong or sorted(DONE.keys() - saved["done"].keys()):
            raise ValueError(f"{path} lacks {wrong}")
        lamoe.build(saved, path)  # config, weights and tokenizer fit this version
        if saved["train_config"].keys() != {f.name for f in dataclasses.fields(TrainConfig)}:
            raise ValueError(f"{path} is from another version of train.py")
        TrainConfig(**saved["train_config"])
        return saved
    except (ValueError, TypeError) as error:
        say(f"resume     {error}")
        return None


def set_aside(folder: Path) -> None:
    """Renames a run's files: a fresh start never overwrites what may still be wanted."""
    for path in [folder / name for name in RUN_FILES if (folder / name).exists()]:
        os.rename(path, logs.first_free(f"{path}.old"))


def say(text: str) -> None:
    if RANKS.rank == 0:
        logs.say(text)


def say_in_place(text: str) -> None:
    if RANKS.rank == 0 and sys.stdout.isatty():
        print(f"{text[:79]:79}", end="\r", flush=True)


# --- 6. Several GPUs ------------------------------------------------------------------------------
# `torchrun --nproc_per_node N train.py` starts N processes, the ranks, and tells each its number.
# Every rank takes its share of each batch and averages gradients with the others, so that the run
# is the one of a single process with the same flags. Only rank 0 writes and speaks.
# Two things differ, for both ask about a whole batch while the layer runs: `noisy` takes its CV^2,
# and `switch` hands out its places, within the batch of each rank.


def join(device: str) -> None:
    """Meets the other ranks; each takes the GPU of its number on this host."""
    if RANKS.world == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    hours = datetime.timedelta(hours=3)  # the others wait while rank 0 reads a large text
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=hours)


def is_sharded(name: str) -> bool:
    """Whether FSDP shards this parameter: experts and embeddings, nearly all of the weights.

    The rest stays whole on every rank: attention because Muon needs whole matrices, the router
    because it stays in fp32.
    """
    return any(part in name for part in (".ffn.", "embed.", "head.")) and ".router." not in name


def spread(model: lamoe.LaMoE, settings: TrainConfig):
    """The model as this rank runs it: itself, a copy kept equal (DDP), or in shards (FSDP2)."""
    if RANKS.world == 1:
        return model.to(settings.device)
    if not settings.fsdp:
        model.to(settings.device)
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    others = {weight for name, weight in model.named_parameters() if not is_sharded(name)}
    dtype = torch.bfloat16 if settings.dtype == "bf16" else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = dist.device_mesh.init_device_mesh(settings.device, (RANKS.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=others)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=others)
    return model.to(settings.device)


def synchronize(parallel, on: bool):
    """A context in which backward averages gradients over the ranks, or leaves that for later."""
    if hasattr(parallel, "set_requires_gradient_sync"):  # FSDP
        parallel.set_requires_gradient_sync(on)
    if hasattr(parallel, "no_sync") and not on:  # DDP
        return parallel.no_sync()
    return contextlib.nullcontext()


def average_whole(parallel) -> None:
    """Averages the gradients that FSDP leaves alone: those of the parameters kept whole."""
    if not hasattr(parallel, "set_requires_gradient_sync"):
        return
    grads = [p.grad for p in parallel.parameters() if not is_shard(p) and p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = (flat / RANKS.world).split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


def is_shard(x) -> bool:
    return hasattr(x, "full_tensor")


def clip(parameters, most: float) -> torch.Tensor:
    """Scales gradients down to a norm of at most `most`; returns the norm, of all shards."""
    parameters = [p for p in parameters if p.grad is not None]
    parts = [[p for p in parameters if is_shard(p) == of_shards] for of_shards in (False, True)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in part]) for part in parts if part]
    norms = [norm.full_tensor() if is_shard(norm) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for part in filter(None, parts):
        torch.nn.utils.clip_grads_with_norm_(part, most, total)
    return total


def whole(state):
    """A state dict with every shard made whole: the same file whatever the number of ranks."""

    def gather(x):  # one at a time, and kept by rank 0 alone: all together may not fit a GPU
        full = x.full_tensor()
        return full.cpu() if RANKS.rank == 0 else None

    return tree_map(lambda x: gather(x) if is_shard(x) else x, state)


def same_on_all(choose):
    """What rank 0 chooses, on every rank; its mistake too."""
    choice = [None]
    if RANKS.rank == 0:
        try:
            choice = [choose()]
        except ValueError as error:
            choice = [error]
    if RANKS.world > 1:
        dist.broadcast_object_list(choice)
    if isinstance(choice[0], ValueError):
        raise choice[0]
    return choice[0]


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block first; the others wait for it, and then run it, too."""
    if RANKS.rank > 0:
        dist.barrier()
    try:
        yield
    finally:  # a mistake found here is one that all of them find
        if RANKS.rank == 0 and RANKS.world > 1:
            dist.barrier()


def on_any_rank(flag: bool) -> bool:
    flags = [None] * RANKS.world
    dist.all_gather_object(flags, flag)
    return any(flags)


# --- 7. The loop ----------------------------------------------------------------------------------


class Meter:
    """Sums since the last row of the log, kept on the device: reading them waits for a GPU."""

    def __init__(self, model: lamoe.LaMoE):
        c, device = model.config, model.embed.weight.device
        layers = sum(isinstance(block.ffn, lamoe.MoE) for block in model.blocks)
        # micro-steps, loss, aux, dropped, and the last gradient norm
        self.scalars = torch.zeros(5, device=device)
        self.load = torch.zeros(layers, c.n_experts, device=device)

    @torch.no_grad()
    def add(self, out: lamoe.Output) -> None:
        one = torch.ones_like(out.loss)
        self.scalars[:4] += torch.stack([one, out.loss, out.aux, out.dropped])
        self.load += out.load  # already that of all ranks

    def row(self) -> dict:
        """Columns of the log; a dense model has no load."""
        n, loss, aux, dropped, grad_norm = lamoe.global_mean(self.scalars).tolist()
        row = {"train_loss": loss / n, "aux": aux / n, "dropped": dropped / n}
        row["grad_norm"] = grad_norm
        if self.load.numel():
            share = self.share()
            row["load_max_over_mean"] = share.max().item()
            row["dead_experts"] = int((share < 0.01).sum())
        return row

    def share(self) -> torch.Tensor:
        """Of each layer, its experts' load, (layers, E); 1 is an equal share."""
        return self.load / self.scalars[0] * self.load.shape[1]

    def loads(self, step: int) -> list[dict]:
        """Rows of load.csv: a layer each."""
        return [
            {"step": step, "layer": layer, **{str(e): s for e, s in enumerate(of_layer)}}
            for layer, of_layer in enumerate(self.share().tolist())
        ]

    def reset(self) -> None:
        self.scalars.zero_()
        self.load.zero_()


def autocast(settings: TrainConfig):
    on = settings.dtype == "bf16"
    return torch.autocast(settings.device, torch.bfloat16, enabled=on)


def update(
    parallel, optimizers, batches: Batches, meter: Meter, settings: TrainConfig, step: int
) -> bool:
    """One optimizer step: rates, micro-steps, clip, step. Never waits for a GPU.

    On a CPU, where it costs nothing, a loss or gradient that is not finite ends it before it moves
    a weight: False. On a GPU that is seen at the next row of the log, or save if that comes first.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, settings) * group["highest_lr"]
    load_LE = 0.0
    for micro in range(settings.grad_accum):
        inputs, targets = batches(step * settings.grad_accum + micro, settings.device)
        with synchronize(parallel, on=micro == settings.grad_accum - 1):
            with autocast(settings):
                out = parallel(inputs, targets)
            ((out.loss + out.aux) / settings.grad_accum).backward()
        meter.add(out)
        load_LE = load_LE + out.load
        del out  # the logits, before the optimizer needs memory
    average_whole(parallel)
    meter.scalars[4] = norm = clip(parallel.parameters(), settings.clip)
    meter.scalars[1] += 0 * norm  # 0, or nan: then the next row of the log shows it
    if settings.device == "cpu" and not meter.scalars[1].isfinite():
        return False
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    getattr(parallel, "module", parallel).update_bias(load_LE)  # routers that balance by a bias
    return True


def compile_blocks(model, parallel, batches: Batches, settings: TrainConfig) -> None:
    """Compiles the model, and runs it once, so that no step of the log has that time in it."""
    if not settings.compile:
        return
    started, (inputs, targets) = time.perf_counter(), batches(0, settings.device)
    with autocast(settings):
        if not lamoe.can_compile(model):
            return say(
                "compile    experts need bf16 on an NVIDIA card from Ampere on: not compiled"
            )
    say("compile    writing kernels for this model; about half a minute, less the next time")
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=settings.device))
    except Exception as error:  # whatever a missing compiler makes of it
        return say(f"           there is no compiler here ({first_line(error)}): going on without")
    model.compile()
    here = [torch.cuda.current_device()] if settings.device == "cuda" else []
    with torch.random.fork_rng(here), warnings.catch_warnings():  # as if it had not been
        warnings.simplefilter("ignore")  # the compiler's hints to itself
        with autocast(settings):
            out = parallel(inputs, targets)
        (out.loss + out.aux).backward()
    for weight in model.parameters():
        weight.grad = None
    say(f"           done in {time.perf_counter() - started:.0f} s")


def train(given: dict, resume: bool) -> None:
    """The whole run: set up, go on from a checkpoint if there is one, loop, close."""
    join(lamoe.pick_device(given.get("device", "auto")))
    folder = same_on_all(lambda: old_folder(given) if resume else new_folder(given))
    resume = same_on_all(lambda: resume and folder.is_dir())
    held = logs.lock(folder) if resume and RANKS.rank == 0 else None  # as long as it stays open
    saved = usable_checkpoint(folder) if resume else None
    if resume and not saved:
        begin_again(folder, given)
    presets = PRESETS[device_and_preset(given)[1]]
    # What reading the data asks for; its size can then settle the rest.
    asked = saved["train_config"] if saved else {**vars(TrainConfig()), **presets, **given}
    tracker = logs.Tracker(asked["track"] if RANKS.rank == 0 else "")
    with rank_0_first():  # it makes the files that the others then find
        size = asked["draw_mb"] * 10**6
        corpus = datasets.read(asked["data"], asked["text_column"], size, say_in_place)
        init, ready = load_init(None if saved else given.get("init"))
        settings, shape = settle(given, saved, corpus, init and init.config)
        data = load_data(settings, shape, saved, corpus, ready)
    if RANKS.world > 1 and settings.device == "cpu" and dist.get_backend() == "nccl":
        raise ValueError("this run was on the CPU; go on there with --device cpu")
    config = lamoe.Config(**{**shape, "vocab_size": data.tokenizer.vocab_size})
    torch.manual_seed(settings.seed)
    model, done = lamoe.LaMoE(config), dict(DONE)
    if saved or init:
        model.load_state_dict(saved["model"] if saved else init.state_dict())
    del init
    parallel = spread(model, settings)
    optimizers, meter = make_optimizers(model, settings), Meter(model)
    if saved:
        done = restore(saved, optimizers, meter, folder)
        say(f"resume     {folder} at step {done['step']} of {settings.steps}")
        if done["step"] >= settings.steps:
            say(f"           it is finished; try: python sample.py --model {folder}/best.pt")
            if RANKS.rank == 0 and (folder / "best.pt").exists():  # it may not have come to that
                close(folder, settings, data, done)
            return
        given = saved["given"]
    tracker.start(dataclasses.asdict(settings) | dataclasses.asdict(config), folder, done)
    if RANKS.rank > 0:  # noise of its own
        torch.manual_seed(hash((settings.seed, RANKS.rank, done["step"])))
    else:
        if not resume:
            make_folder(folder)
        held = held or logs.lock(folder)
        remove_leftovers(folder)
        if not saved:
            set_aside(folder)
    introduce(model, settings, data, folder)
    keep_freed_memory()
    run = Run(folder, parallel, model, optimizers, meter, data, settings, given, done, tracker)
    try:
        compile_blocks(model, parallel, data.batches, settings)
        with stop_on_signals() as stop:
            loop(run, stop)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ValueError(out_of_memory(settings)) from None
        raise
    if done["step"] < settings.steps:
        say(f"\nstopped and saved at step {done['step']}; go on:")
        say(f"           python train.py --resume --out {folder}")
        # As a shell has it: 130 after Ctrl-C, 143 after SIGTERM, of this rank or of another.
        sys.exit(128 + (stop or [signal.SIGINT])[0])
    if RANKS.rank == 0:
        close(folder, settings, data, done)
        tracker.end(folder)
    if RANKS.world > 1:
        dist.barrier()  # the others wait for rank 0
        dist.destroy_process_group()


@dataclass
class Run:
    """All that a run is made of."""

    folder: Path
    parallel: torch.nn.Module  # what forward and backward go through: model, or DDP around it
    model: lamoe.LaMoE
    optimizers: list
    meter: Meter
    data: Data
    settings: TrainConfig
    given: dict  # the flags, which a resume compares
    done: dict  # step, seconds, best, best_step
    tracker: logs.Tracker


def loop(run: Run, stop: list) -> None:
    """Steps until all are done, or `stop` has something in it."""
    settings, meter, data, done = run.settings, run.meter, run.data, run.done
    tables, usual, stopping = open_logs(run), None, False
    before = dict(done)  # at the last row of the log
    while done["step"] < settings.steps and not stopping:
        started, step = time.perf_counter(), done["step"] + 1
        if not update(run.parallel, run.optimizers, data.batches, meter, settings, step - 1):
            raise ValueError(not_finite(step, run.folder, settings))
        done["step"] = step
        evaluating, saving, logging = (
            step % every == 0 or step == settings.steps
            for every in (settings.eval_every, settings.save_every, settings.log_every)
        )
        stopping = bool(stop) if RANKS.world == 1 else logging and on_any_rank(bool(stop))
        if not (evaluating or saving or logging or stopping):
            done["seconds"] += time.perf_counter() - started
            continue
        row = {"step": step, **meter.row()}  # reading the meter waits for the device
        done["seconds"] += time.perf_counter() - started
        if evaluating:
            score = evaluate(
                run.model, data.val_ids, data.spans, data.tokenizer, settings, data.source_of_byte
            )
            row |= {"val_loss": score.loss, "val_bits_per_byte": score.bits_per_byte}
            row |= by_source(score, data)
        if not all(map(math.isfinite, row.values())):
            raise ValueError(not_finite(step, run.folder, settings))
        if evaluating and score.bits_per_byte < done["best"]:
            done |= {"best": score.bits_per_byte, "best_step": step}
            save(run, "best.pt")
        if evaluating or logging:
            tokens = settings.batch_size * settings.grad_accum * data.batches.length
            row |= {"tokens": step * tokens, "lr": schedule(step - 1, settings) * settings.lr}
            seconds, tokens = done["seconds"] - before["seconds"], (step - before["step"]) * tokens
            row |= {"tokens_per_s": tokens / seconds, "seconds": done["seconds"]}
            before = dict(done)
            report(run, row, tables)
            usual = watch(row, usual, settings)
            meter.reset()
        if saving or stopping:
            save(run, "last.pt", tables)


def report(run: Run, row: dict, tables: tuple) -> None:
    if RANKS.rank == 0:
        log, loads = tables
        log.write(row)
        loads.write(*run.meter.loads(row["step"]))
        run.tracker.log(row)
        show(row, run.settings, run.data.floor)


COLUMNS = "step tokens train_loss val_loss val_bits_per_byte lr grad_norm aux".split()
COLUMNS += "load_max_over_mean dead_experts dropped tokens_per_s seconds".split()


def open_logs(run: Run) -> tuple | None:
    """log.csv, with a column for each source where there are several, and load.csv."""
    if RANKS.rank > 0:
        return None
    names, step = run.data.corpus.sources, run.done["step"]
    sources = [f"val_bpb_{name}" for name in names if len(names) > 1]
    experts = [str(e) for e in range(run.model.config.n_experts)]
    log = logs.Log(run.folder / "log.csv", step, COLUMNS + sources)
    return log, logs.Log(run.folder / "load.csv", step, ["step", "layer", *experts])


def watch(row: dict, usual: float | None, settings: TrainConfig) -> float:
    """Says so if a row's loss is far above the usual one; returns the new usual: a running mean."""
    loss, usual = row["train_loss"], row["train_loss"] if usual is None else usual
    if loss > 1.5 * usual and loss > usual + 0.5:
        say(
            f"spike      the loss at step {row['step']} is {loss:.2f} and was about {usual:.2f}; "
            f"if it stays there, start anew with --lr {settings.lr / 2:.1g}"
        )
    return 0.8 * usual + 0.2 * loss


def not_finite(step: int, folder: Path, settings: TrainConfig) -> str:
    last = "nothing was saved yet"
    if (folder / "last.pt").exists():
        last = f"{folder}/last.pt holds the last good state"
    return (
        f"the loss or its gradient is not finite at step {step}; {last}; try lower rates in a new "
        f"run: --lr {settings.lr / 3:.1g} --muon_lr {settings.muon_lr / 3:.1g}"
    )


def is_out_of_memory(error: Exception) -> bool:
    """torch has a class for a GPU's memory, and words for that of a CPU or a Mac."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in ("allocate memory", "out of memory"))


def out_of_memory(settings: TrainConfig) -> str:
    if settings.batch_size == 1:
        return "out of memory; halve --seq_len, or train a smaller model"
    return (
        f"out of memory; half the memory and the same steps in a new run: --batch_size "
        f"{settings.batch_size // 2} --grad_accum {2 * settings.grad_accum}"
    )


def save(run: Run, name: str, tables: tuple | None = None) -> None:
    """last.pt: everything a run goes on from; best.pt: what sampling needs. Rank 0 writes.

    The rows of the logs are on the disk before the checkpoint of their step is.
    """
    checkpoint = {
        "config": dataclasses.asdict(run.model.config),
        "train_config": dataclasses.asdict(run.settings),
        "given": {k: v for k, v in run.given.items() if k not in PLACES},
        "tokenizer": run.data.tokenizer.state(),
        "text": run.data.corpus.key,  # what it trains on: a resume notices another text
        "model": whole(run.model.state_dict()),
        "done": run.done,
    }
    if name == "last.pt":
        checkpoint["optimizers"] = [whole(o.state_dict()) for o in run.optimizers]
        checkpoint["meter"] = [run.meter.scalars, run.meter.load]
        checkpoint["rng"] = torch.get_rng_state()
        if run.settings.device == "cuda":
            checkpoint["cuda_rng"] = torch.cuda.get_rng_state()
    if RANKS.rank == 0:
        for log in tables or ():
            log.flush()
        lamoe.save(run.folder / name, checkpoint)


def restore(saved: dict, optimizers, meter: Meter, folder: Path) -> dict:
    """Everything as it was; returns `done`. Batches need no state: the step says which is next."""
    try:
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            for weight, mine in optimizer.state.items():
                for name, value in mine.items():
                    if value.shape not in ((), weight.shape):
                        raise ValueError(f"{name} of shape {[*value.shape]}")
                    if is_shard(weight) and value.shape == weight.shape:  # was whole in the file
                        mesh = weight.device_mesh, weight.placements
                        mine[name] = distribute_tensor(value, *mesh)
        for mine, theirs in zip((meter.scalars, meter.load), saved["meter"], strict=True):
            mine.copy_(theirs)
        torch.set_rng_state(saved["rng"])
        if "cuda_rng" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda_rng"])
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{folder}/last.pt does not fit this version of train.py ({first_line(error)}); start "
            f"a new run from its weights: --init {folder}/last.pt"
        ) from None
    return saved["done"]


@contextlib.contextmanager
def stop_on_signals():
    """A list that Ctrl-C fills: the step in hand is finished, then saved. Twice: at once.

    So does SIGTERM, with which schedulers end a job, of a single process: torchrun has its own way.
    """
    numbers = [signal.SIGINT, signal.SIGTERM] if RANKS.world == 1 else [signal.SIGINT]
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


# --- 8. What a person sees ------------------------------------------------------------------------


def introduce(model, settings: TrainConfig, data: Data, folder: Path) -> None:
    c, parts = model.config, lamoe.count_parameters(model)
    total, active = parts["all"]
    shape = f"{c.n_layers} layers, dim {c.dim}, {c.n_heads} heads"
    if c.n_experts > 1:
        shape += f", {c.n_experts} experts of {c.hidden_dim} (top {c.n_active}, {c.router})"
    tokens = settings.batch_size * c.seq_len
    # weight, gradient and two moments; logits three times over; some 30 activations a layer
    memory = 16 * total + 12 * tokens * c.vocab_size + 120 * tokens * c.dim * c.n_layers
    say(f"model      {shape}: {total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active a token")
    say(
        f"training   {settings.steps} steps of {tokens * settings.grad_accum:,} tokens on "
        f"{settings.device} in {settings.dtype}, preset {settings.preset}; about "
        f"{memory / 1e9 + 0.4:.1f} GB"
    )
    say(f"run        {folder}: log.csv, last.pt, best.pt; Ctrl-C saves, --resume goes on")
    know_nothing = math.log(c.vocab_size)
    say(f"           a model that knows nothing has loss ln({c.vocab_size}) = {know_nothing:.2f}")


def show(row: dict, settings: TrainConfig, floor: float | None) -> None:
    left = (settings.steps - row["step"]) * row["seconds"] / row["step"]
    line = f"step {row['step']:5}/{settings.steps}  loss {row['train_loss']:.3f}"
    if "load_max_over_mean" in row:
        line += f"  load {row['load_max_over_mean']:.2f}"
    line += f"  {row['tokens_per_s']:,.0f} tokens/s  {int(left // 60)}:{int(left % 60):02} left"
    if "val_bits_per_byte" not in row:
        return say_in_place(line)
    line += f"  validation {row['val_bits_per_byte']:.3f} bits/byte"
    say(line + (f" (floor {floor:.3f})" if floor else ""))
    if sources := [f"{k[8:]} {v:.3f}" for k, v in row.items() if k.startswith("val_bpb_")]:
        say("           " + "  ".join(sources))


def close(folder: Path, settings: TrainConfig, data: Data, done: dict) -> None:
    """The best model's score, a sample, and where everything is."""
    model, tokenizer = lamoe.load(folder / "best.pt", settings.device)
    kinds, floor = data.corpus.kind_of_byte, data.floor
    labels = data.source_of_byte if kinds is None else kinds
    alone, ids = Ranks(), data.val_ids
    score = evaluate(model, ids, data.spans, tokenizer, settings, labels, alone)
    edges = np.append(np.arange(0, len(ids) - 1, data.batches.length), len(ids) - 1)
    cut = np.stack([edges[:-1], edges[1:]], axis=1)
    anywhere = evaluate(model, ids, cut, tokenizer, settings, None, alone).bits_per_byte
    say("")
    say(
        f"best       {score.bits_per_byte:.4f} bits/byte of validation, at step {done['best_step']}"
    )
    say(f"           ({anywhere:.4f} when windows are cut anywhere, not at documents)")
    if shares := by_source(score, data):
        say("by source  " + "  ".join(f"{k[8:]} {v:.4f}" for k, v in shares.items()))
    if floor:
        gap = (score.bits_of_label - data.corpus.floor_bits) / data.corpus.floor_bits.sum()
        rest, choice, recall = 100 * gap
        above = 100 * (score.bits_per_byte / floor - 1)
        say(
            f"floor      {floor:.4f}: {above:.2f}% above it, of which choices {choice:.2f}, "
            f"recall {recall:.2f}, the rest {rest:.2f}"
        )
        at = datasets.KINDS.index("recall")
        mentions = np.count_nonzero(np.diff((kinds == at).astype(int)) == 1)
        bits = score.bits_of_label[at] / mentions
        say(f"           a name or thing to be recalled costs {bits:.3f} bits")
    opening = "Once, upon a time" if settings.data == "stories" else "\n"
    if model.config.eval_capacity_factor is None:  # else there is no generating: see lamoe.forward
        ids = [*tokenizer.start, *tokenizer.encode(opening)]
        ids = torch.tensor([ids], device=settings.device)
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        new = model.generate(ids, 150, 0.8, min_p=0.02, stop=tokenizer.eot, generator=generator)
        text = tokenizer.decode([token.item() for token in new])
        say(f"sample     {opening}{text.partition('<|endoftext|>')[0]}")
    bits = []
    try:
        _, bits, _, _ = logs.bits_per_byte(logs.read_csv(folder / "log.csv"))
        say(f"picture    {logs.draw(folder, floor)}")
    except ValueError as error:  # no matplotlib, or a log that lost its rows
        if bits:
            line = logs.sparkline(bits)
            say(f"loss       {line} {bits[0]:.2f} to {bits[-1]:.2f} bits/byte in training")
        say(f"picture    none: {error}")
    say(f"log        {folder}/log.csv")
    prompt = f'"{opening}" ' if opening.strip() else ""
    say(f"next       python sample.py {prompt}--model {folder}/best.pt")


GO_ON = "then the same command goes on, with --resume once it has trained"
REMEDIES = {  # what the system says, and what to do
    errno.ENOSPC: f"; make room, {GO_ON}",
    errno.EDQUOT: f"; make room, {GO_ON}",
    errno.EROFS: f"; make it writable, {GO_ON}, or choose another --out",
    errno.EACCES: f"; close it elsewhere and see that it can be written, {GO_ON}",
    errno.ENOENT: "; was it taken away? start again, or choose another --out",
    errno.EIO: "; the disk fails: copy what is there, and choose another --out",
}


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a character the terminal can't show
    try:
        given = vars(parse())
        resume, runs = given.pop("resume"), given.pop("plot")
        for name in ("steps", "draw_mb"):  # 0: by preset, as if not given
            if given.get(name) == 0:
                del given[name]
        if runs:
            return say(f"picture    {logs.plot(runs, given.get('out', ''))}")
        train(given, resume)
    except (ValueError, OSError) as error:
        if RANKS.rank == 0:
            hint = REMEDIES.get(getattr(error, "errno", None), "")
            print(f"error: {first_line(error)}{hint}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if RANKS.world == 1:
            raise
        print(f"error: rank {RANKS.rank}: {first_line(error)}", file=sys.stderr)
        print("       if another rank died, see its line; go on: add --resume", file=sys.stderr)
        os._exit(3)  # at once: a clean end would wait for the rank that is gone
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
