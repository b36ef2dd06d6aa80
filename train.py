"""Train LaMoE: text -> tokens -> windows -> a plain loop -> log.csv, last.pt, best.pt, loss.png.

    python train.py                              the embedded corpus, minutes on a laptop
    python train.py --data book.txt              your own text: a file, or a folder of .txt
    python train.py --resume                     go on where the newest run stopped
    python train.py --init FOLDER --data book.txt  fine-tune a Hugging Face model, or a checkpoint
    python train.py --device cuda

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
import csv
import ctypes
import dataclasses
import inspect
import itertools
import math
import os
import re
import signal
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import lamoe
from bpe import Tokenizer
from data import datasets

# --- 1. What can be chosen: fields are flags ------------------------------------------------------


@dataclass
class TrainConfig:
    """How to train; lamoe.Config says what."""

    data: str = "stories"  # the embedded corpus, a text file, or a folder of .txt
    out: str = ""  # the run's folder; empty: runs/ and the data's name
    init: str = ""  # Hugging Face folder or checkpoint: weights, config and tokenizer to start from
    device: str = "auto"  # auto, cpu, cuda or mps
    preset: str = ""  # laptop or gpu; empty: by device
    tokenizer: str = "bpe"  # bpe (trained on the data) or bytes
    dtype: str = "auto"  # of matrix products: bf16 or fp32; auto: bf16 where it is faster
    seed: int = 0  # of weights and of the order of batches
    steps: int = 850  # optimizer steps; 0: by preset
    batch_size: int = 16  # windows a micro-step
    grad_accum: int = 1  # micro-steps an optimizer step
    lr: float = 8e-3  # of AdamW, at its highest
    muon_lr: float = 0.02  # of Muon, at its highest [2]
    weight_decay: float = 0.1  # of matrices, times the rate
    warmup: float = 0.05  # share of the steps in which the rate rises
    clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 0  # steps; 0: five times a run
    save_every: int = 0  # steps; 0: with each evaluation
    log_every: int = 10  # steps

    def __post_init__(self):
        whole, inf = {"eval_every": 0, "save_every": 0, "seed": 0}, math.inf
        whole |= dict.fromkeys(("steps", "batch_size", "grad_accum", "log_every"), 1)
        ranges = {name: (least, 2**63 - 1) for name, least in whole.items()}
        ranges |= {"lr": (0, inf), "muon_lr": (0, inf), "weight_decay": (0, inf)}
        ranges |= {"warmup": (0, 1), "clip": (1e-12, inf)}
        for name, (least, most) in ranges.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name}={value} must be from {least} to {most}")
        for name, known in (("tokenizer", ("bpe", "bytes")), ("dtype", ("auto", "bf16", "fp32"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; try one of {known}")
        self.eval_every = self.eval_every or max(1, self.steps // 5)
        self.save_every = self.save_every or self.eval_every


LAPTOP = {"qk_norm": True}
GPU = {**LAPTOP, "steps": 1200, "batch_size": 64}
PRESETS = {"laptop": LAPTOP, "gpu": GPU}
# Text below so many bytes, and what suits it. A token must be met often to be learned, so small
# texts get few; a short context makes many windows of them; and they are read several times over,
# which weight decay keeps from being learned by heart. Where names must be recalled, it does harm.
TEXTS = (
    (4e6, {"vocab_size": 2048, "seq_len": 64, "n_layers": 4, "lr": 4e-3, "weight_decay": 0.6}),
    (1e8, {"vocab_size": 2048, "seq_len": 256, "n_layers": 3, "lr": 8e-3, "weight_decay": 0.1}),
    (math.inf, {"vocab_size": 8192, "seq_len": 512, "lr": 4e-3, "weight_decay": 0.1}),
)
TUNE = {"lr": 2e-4, "muon_lr": 5e-4}  # with --init: what is known already is not to be torn down
CLASSES = (TrainConfig, lamoe.Config)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags given; one not given is absent, so that a preset can fill it in."""

    class OneLine(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"error: {message}; see python train.py --help\n")

    parser = OneLine("train.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for cls in CLASSES:
        group = parser.add_argument_group(cls.__name__)
        meaning = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(cls), re.M))
        for field in dataclasses.fields(cls):
            default = "by the text" if field.default is dataclasses.MISSING else field.default
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


# --- 2. Data: one flat array of ids -> windows -> batches -----------------------------------------


def windows(tokens: np.ndarray, eot: int, length: int) -> np.ndarray:
    """(start, next start) of windows of `length` positions that begin at a document where they can.

    The next window begins at the last document that starts inside this one, else where it ends. A
    start in mid-story would ask the model for names it was never told. Between a window's start and
    the next one's, each token is met exactly once: the span that evaluation scores.
    """
    documents = np.flatnonzero(tokens[:-1] == eot)  # ids[documents[i]] is the token before text i
    spans, start = [], 0
    while start < len(tokens) - 1:
        last = documents[np.searchsorted(documents, start + length, side="right") - 1]
        end = min(last if last > start else start + length, len(tokens) - 1)
        spans.append((start, end))
        start = end
    return np.array(spans)


class Batches:
    """Windows in a seeded order without replacement; batch i is a function of i alone."""

    def __init__(self, tokens: np.ndarray, eot: int, length: int, size: int, seed: int):
        self.tokens, self.length, self.size, self.seed = tokens, length, size, seed
        last = len(tokens) - 1 - length  # the text's last window moves back to be full
        self.starts = np.unique(np.minimum(windows(tokens, eot, length)[:, 0], last))
        self.epoch, self.order = -1, None

    def __call__(self, i: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of batch i, (B, T) each."""
        rows = [self.start(i * self.size + row) for row in range(self.size)]
        ids = self.tokens[np.array(rows)[:, None] + np.arange(self.length + 1)]
        ids = torch.from_numpy(ids.astype(np.int64)).to(device)
        return ids[:, :-1], ids[:, 1:]

    def start(self, n: int) -> int:
        epoch, position = divmod(n, len(self.starts))
        if epoch != self.epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self.epoch, self.order = epoch, generator.permutation(self.starts)
        return self.order[position]


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """One flat array of ids: <|endoftext|> first, and after each document."""
    ids = tokenizer.encode_array(documents)
    return np.concatenate([np.array([tokenizer.eot], ids.dtype), ids])


# --- 3. Evaluation: bits per byte, and where they go ----------------------------------------------


class Score(typing.NamedTuple):
    loss: float  # nats a token
    bits_per_byte: float
    bits_of_kind: np.ndarray | None  # total bits by datasets.KINDS, on the embedded corpus


@torch.inference_mode()
def evaluate(model, ids, spans, tokenizer, settings: TrainConfig, kinds=None) -> Score:
    """Scores every token of ids but the first, each once, in the window whose span it is in."""
    was_training = model.training
    model.eval()
    device = model.embed.weight.device
    length, nats = model.config.seq_len, np.zeros(len(ids) - 1)
    for block in np.array_split(spans, math.ceil(len(spans) / 8)):
        at = block[:, :1] + np.arange(length)
        counted = at < block[:, 1:]
        at = np.where(counted, at, block[:, :1])
        inputs, targets = (
            torch.from_numpy(ids[at + offset].astype(np.int64)).to(device) for offset in (0, 1)
        )
        with autocast(settings):
            logits = model(inputs).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        nats[at[counted]] = losses.view(targets.shape).cpu().numpy()[counted]
    model.train(was_training)
    sizes = tokenizer.byte_lengths[ids[1:]]
    bits = nats / math.log(2)
    by_kind = None
    if kinds is not None:  # a token is of the kind of its last byte
        kind = kinds[np.cumsum(sizes) - 1]
        by_kind = np.bincount(kind, weights=bits, minlength=len(datasets.KINDS))
    return Score(float(nats.mean()), float(bits.sum() / sizes.sum()), by_kind)


# --- 4. Optimizers and schedule -------------------------------------------------------------------


def make_optimizers(model: lamoe.LaMoE, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon [2] on the attention matrices, AdamW [1] on the rest; norms are not decayed.

    Muon turns a matrix's momentum into the nearest orthogonal one, so that no direction is learned
    slowly. It pays on square matrices; on experts it costs more time than it gains at this size.
    """
    attention, matrices, vectors = [], [], []
    for name, weight in model.named_parameters():
        group = vectors if weight.dim() < 2 else attention if ".attn." in name else matrices
        group.append(weight)
    decay = config.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    muon = torch.optim.Muon(attention, lr=config.muon_lr, weight_decay=decay)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    for group in (*muon.param_groups, *adamw.param_groups):
        group["highest_lr"] = group["lr"]
    return [muon, adamw]


def schedule(step: int, config: TrainConfig) -> float:
    """The share of the highest rate at a step: a linear rise, then linear to zero [3]."""
    rise = max(1, round(config.warmup * config.steps))
    return min((step + 1) / rise, (config.steps - step) / max(1, config.steps - rise))


# --- 5. The log, the picture, the lock ------------------------------------------------------------

COLUMNS = [
    "step",
    "tokens",
    "train_loss",
    "val_loss",
    "val_bits_per_byte",
    "lr",
    "grad_norm",
    "aux",
]
COLUMNS += ["load_max_over_mean", "dead_experts", "dropped", "tokens_per_s", "seconds"]


class Log:
    """log.csv: one row a log step, flushed at once; rows after `step` are cut on resume."""

    def __init__(self, path: Path, step: int):
        rows = []
        if step and path.exists():
            with open(path, newline="") as file:
                whole = [row for row in csv.DictReader(file) if row["seconds"]]  # not a torn line
                rows = [row for row in whole if int(row["step"]) <= step]
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
        self.file = open(path, "a", newline="")  # noqa: SIM115 - open as long as the run
        self.writer = csv.DictWriter(self.file, COLUMNS)

    def write(self, row: dict) -> None:
        self.writer.writerow({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})
        self.file.flush()


def draw(folder: Path, floor: float | None) -> str:
    """loss.png from log.csv; returns its path, or how to get it."""
    try:
        import matplotlib
    except ImportError:
        return 'none: install matplotlib for it: pip install -e ".[plot]"'
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scored = [row for row in rows if row["val_loss"]]
    per_nat = float(scored[-1]["val_bits_per_byte"]) / float(scored[-1]["val_loss"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [int(row["step"]) for row in rows]
    train = [float(row["train_loss"]) * per_nat for row in rows]
    left.plot(steps, train, color="0.6", linewidth=1, label="training")
    val = [float(row["val_bits_per_byte"]) for row in scored]
    left.plot([int(row["step"]) for row in scored], val, "o-", color="C0", label="validation")
    top = 3 * min(val)
    if floor is not None:
        left.axhline(floor, color="C3", linestyle="--", label=f"floor {floor:.3f}")
        left.annotate(
            f"{val[-1]:.3f}", (steps[-1], val[-1]), (0, 8), textcoords="offset points", ha="right"
        )
    left.set(xlabel="step", ylabel="bits per byte", ylim=(0, top), title="Loss")
    left.legend()
    right.plot(steps, [float(row["load_max_over_mean"] or 1) for row in rows], color="C0")
    right.axhline(1, color="C3", linestyle="--", label="perfect balance")
    right.set(xlabel="step", ylim=(0, None), title="Load of the busiest expert over the mean")
    right.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
    return str(folder / "loss.png")


def lock(folder: Path):
    """An open file that holds the folder for this process; the lock dies with the process."""
    file = open(folder / "lock", "w")  # noqa: SIM115 - held as long as the run
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        raise ValueError(
            f"{folder} is in use by another training run; wait for it, or choose another --out"
        ) from None
    return file


# --- 6. Setting up: device, dtype, sizes, data ----------------------------------------------------


def pick_dtype(name: str, device: str) -> str:
    """bf16 where it pays: on a GPU, and on a CPU that wins a short race with it."""
    if name != "auto" or device != "cpu":
        return {"cuda": "bf16", "mps": "fp32"}[device] if name == "auto" else name
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


def load_data(settings: TrainConfig, known: dict, saved: dict | None, corpus, ready=None) -> Data:
    """Text -> tokenizer (the checkpoint's, or one that is ready) -> ids -> windows."""
    n_bytes = sum(len(document.encode()) for document in corpus.train)
    say(f"data       {settings.data}: {corpus.how}; {n_bytes / 1e6:.1f} MB to train on")
    if saved:
        tokenizer = Tokenizer.from_state(saved["tokenizer"])
    elif ready:
        tokenizer = ready
    elif settings.tokenizer == "bytes":
        tokenizer = Tokenizer([])
    else:
        tokenizer = Tokenizer.train(corpus.train, known["vocab_size"], say_in_place)
    train_ids, val_ids = encode(tokenizer, corpus.train), encode(tokenizer, corpus.val)
    length = known["seq_len"]
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
    corpus = corpus._replace(train=[], val=[])  # from here on ids are enough
    return Data(tokenizer, batches, corpus, val_ids, spans, floor)


def settle(given: dict, saved: dict | None, corpus, init=None) -> tuple[TrainConfig, dict]:
    """Settings, and fields of lamoe.Config: by flag, else by the text's size, else by preset.

    init: the Config of the model to start from; flags can't change what its weights depend on.
    """
    if saved:
        settled = {**saved["config"], **saved["train_config"], **saved["given"]}
        for name, value in given.items():
            if name not in ("out", "device") and value != settled[name]:
                raise ValueError(
                    f"--{name} {value} differs from the run's {settled[name]}; leave it out to "
                    f"resume, or start a new run with another --out"
                )
        settings = TrainConfig(**saved["train_config"])
        settings.device = lamoe.pick_device(given.get("device", settings.device))
        return settings, saved["config"]
    device = lamoe.pick_device(given.get("device", "auto"))
    preset = given.get("preset") or ("gpu" if device == "cuda" else "laptop")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; try one of {sorted(PRESETS)}")
    size = sum(map(len, corpus.train))
    by_text = next(suits for limit, suits in TEXTS if size < limit)
    flags = {name: value for name, value in given.items() if (name, value) != ("steps", 0)}
    known = {**PRESETS[preset], **by_text, **flags}
    if init:
        known = {**known, **TUNE, **fit(init, known["seq_len"], flags), **flags}
    settings = fill(TrainConfig, {**known, "device": device, "preset": preset})
    settings.dtype = pick_dtype(settings.dtype, device)
    fields = {f.name for f in dataclasses.fields(lamoe.Config)}
    known = {name: value for name, value in known.items() if name in fields}
    check_memory(lamoe.Config(**known))  # mistakes, before any work is done
    return settings, known


FREE = ("seq_len", "balance_weight", "z_weight", "jitter", "capacity_factor", "bias_rate")


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
    with torch.device("meta"):  # shapes without memory
        try:
            n = sum(weight.numel() for weight in lamoe.LaMoE(config).parameters())
        except RuntimeError:  # more elements than torch can count
            n = math.inf
    here = math.inf
    if os.name == "posix":
        here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 16 * n > here:
        raise ValueError(
            f"training {n / 1e9:.1f}B parameters takes {16 * n / 1e9:,.0f} GB and this machine has "
            f"{here / 1e9:,.0f} GB of memory; try a smaller --dim, --n_layers or --n_experts"
        )


def load_init(path: str | None):
    """(model with fp32 weights, tokenizer) to start from; (None, None) without a path."""
    if not path:
        return None, None
    model, tokenizer = lamoe.load(path, dtype=torch.float32)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer; put the model's tokenizer.json there")
    return model, tokenizer


RUN_FILES = ("last.pt", "best.pt", "log.csv")


def first_free(path: str | Path) -> Path:
    """path, or the first of path-2, path-3, ... that is not there yet."""
    names = itertools.chain([f"{path}"], (f"{path}-{i}" for i in itertools.count(2)))
    return next(Path(name) for name in names if not Path(name).exists())


def new_folder(given: dict) -> Path:
    """The folder of a new run, not made yet: never one in which a run already is."""
    if given.get("out"):
        folder = Path(given["out"])
    else:
        folder = first_free(Path("runs") / Path(given.get("data", "stories")).resolve().stem)
    if any((folder / name).exists() for name in RUN_FILES):
        raise ValueError(
            f"{folder} already holds a run; go on: python train.py --resume --out {folder}; "
            f"or choose another --out"
        )
    existing = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{folder}: {existing} is no folder to write in; choose another --out")
    return folder


def old_folder(given: dict) -> Path:
    """The folder to resume: --out, or the newest run."""
    if given.get("out"):
        folder = Path(given["out"])
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such run to resume; start one: python train.py --out {folder}"
            )
        return folder
    runs = sorted(Path("runs").glob("*/log.csv"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError("no run in runs/ to resume; start one: python train.py")
    return runs[-1].parent


def usable_checkpoint(folder: Path) -> dict | None:
    try:
        saved = lamoe.read(folder / "last.pt")
        needed = {"given", "train_config", "tokenizer", "optimizers", "meter", "rng", "done"}
        if missing := needed - saved.keys():
            raise ValueError(f"{folder}/last.pt lacks {sorted(missing)}")
        lamoe.build(saved, folder / "last.pt")  # config, weights and tokenizer fit this version
        if saved["train_config"].keys() != {f.name for f in dataclasses.fields(TrainConfig)}:
            raise ValueError(f"{folder}/last.pt is from another version of train.py")
        return saved
    except ValueError as error:
        say(f"resume     {error}")
        say(f"           no usable checkpoint in {folder}: starting over; what is there gets .old")
        return None


def set_aside(folder: Path) -> None:
    """Renames a run's files: a fresh start never overwrites what may still be wanted."""
    for path in [folder / name for name in RUN_FILES if (folder / name).exists()]:
        os.rename(path, first_free(f"{path}.old"))


def say(text: str) -> None:
    print(f"{text:79}", flush=True)


def say_in_place(text: str) -> None:
    if sys.stdout.isatty():
        print(f"{text[:79]:79}", end="\r", flush=True)


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
        self.load += out.load

    def row(self) -> dict:
        """Columns of the log; a dense model has no load."""
        n, loss, aux, dropped, grad_norm = self.scalars.tolist()
        row = {"train_loss": loss / n, "aux": aux / n, "dropped": dropped / n}
        row["grad_norm"] = grad_norm
        if self.load.numel():
            share = self.load / n * self.load.shape[1]  # 1 is an equal share
            row["load_max_over_mean"] = share.max().item()
            row["dead_experts"] = int((share < 0.01).sum())
        return row

    def reset(self) -> None:
        self.scalars.zero_()
        self.load.zero_()


def autocast(settings: TrainConfig):
    on = settings.dtype == "bf16"
    return torch.autocast(settings.device, torch.bfloat16, enabled=on)


def update(model, optimizers, batches: Batches, meter: Meter, settings: TrainConfig, step: int):
    """One optimizer step: rates, micro-steps, clip, step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, settings) * group["highest_lr"]
    load_LE = 0.0
    for micro in range(settings.grad_accum):
        inputs, targets = batches(step * settings.grad_accum + micro, settings.device)
        with autocast(settings):
            out = model(inputs, targets)
        ((out.loss + out.aux) / settings.grad_accum).backward()
        meter.add(out)
        load_LE = load_LE + out.load
    meter.scalars[4] = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    model.update_bias(load_LE)  # the load of the whole step, for a router that balances by bias


def train(given: dict, resume: bool) -> None:
    """The whole run: set up, go on from a checkpoint if there is one, loop, close."""
    folder = old_folder(given) if resume else new_folder(given)
    held = lock(folder) if resume else None
    saved = usable_checkpoint(folder) if resume else None
    data_name = saved["train_config"]["data"] if saved else given.get("data", TrainConfig.data)
    corpus = datasets.read(data_name)
    init, ready = load_init(given.get("init")) if not saved else (None, None)
    settings, known = settle(given, saved, corpus, init and init.config)
    data = load_data(settings, known, saved, corpus, ready)
    config = lamoe.Config(**{**known, "vocab_size": data.tokenizer.vocab_size})
    torch.manual_seed(settings.seed)
    model = lamoe.LaMoE(config)
    if init:
        model.load_state_dict(init.state_dict())
    del init
    model.to(settings.device)
    optimizers, meter = make_optimizers(model, settings), Meter(model)
    done = {"step": 0, "seconds": 0.0, "best": math.inf, "best_step": 0}
    if saved:
        done = restore(saved, model, optimizers, meter)
        say(f"resume     {folder} at step {done['step']} of {settings.steps}")
        if done["step"] >= settings.steps:
            return say(f"           it is finished; try: python sample.py --model {folder}/best.pt")
        given = saved["given"]
    folder.mkdir(parents=True, exist_ok=True)
    held = held or lock(folder)  # noqa: F841 - until the process ends
    if not saved:
        set_aside(folder)
    introduce(model, settings, data, folder)
    keep_freed_memory()
    log, stop = Log(folder / "log.csv", done["step"]), stop_on_ctrl_c()
    row_step, row_seconds = done["step"], done["seconds"]

    while done["step"] < settings.steps and not stop:
        started = time.perf_counter()
        update(model, optimizers, data.batches, meter, settings, done["step"])
        done["step"] = step = done["step"] + 1
        evaluating, saving, logging = (
            step % every == 0 or step == settings.steps
            for every in (settings.eval_every, settings.save_every, settings.log_every)
        )
        if not (evaluating or saving or logging or stop):
            done["seconds"] += time.perf_counter() - started
            continue
        row = {"step": step, **meter.row()}  # reading the meter waits for the device
        done["seconds"] += time.perf_counter() - started
        if evaluating:
            score = evaluate(model, data.val_ids, data.spans, data.tokenizer, settings)
            row |= {"val_loss": score.loss, "val_bits_per_byte": score.bits_per_byte}
        if not all(map(math.isfinite, row.values())):
            raise ValueError(not_finite(step, folder, settings))
        if evaluating and score.bits_per_byte < done["best"]:
            done |= {"best": score.bits_per_byte, "best_step": step}
            save(folder / "best.pt", model, data, settings, given, done)
        if evaluating or logging:
            tokens = settings.batch_size * settings.grad_accum * data.batches.length
            seconds, row_seconds = done["seconds"] - row_seconds, done["seconds"]
            row |= {"tokens": step * tokens, "lr": schedule(step - 1, settings) * settings.lr}
            row |= {"tokens_per_s": (step - row_step) * tokens / seconds, "seconds": row_seconds}
            row_step = step
            log.write(row)
            show(row, settings, data.floor)
            meter.reset()
        if saving:
            save(folder / "last.pt", model, data, settings, given, done, optimizers, meter)

    if done["step"] < settings.steps:
        save(folder / "last.pt", model, data, settings, given, done, optimizers, meter)
        say(f"\nstopped and saved at step {done['step']}; go on:")
        say(f"           python train.py --resume --out {folder}")
        sys.exit(130)
    close(folder, settings, data, done)


def not_finite(step: int, folder: Path, settings: TrainConfig) -> str:
    last = f"{folder}/last.pt holds the last good state" if (folder / "last.pt").exists() else ""
    return (
        f"the loss is not finite at step {step}; {last or 'nothing was saved yet'}; try lower "
        f"rates: --lr {settings.lr / 3:.1g} --muon_lr {settings.muon_lr / 3:.1g}"
    )


def save(path, model, data: Data, settings, given, done: dict, optimizers=None, meter=None) -> None:
    """With the optimizers, everything a run goes on from; without, what sampling needs."""
    checkpoint = {
        "config": dataclasses.asdict(model.config),
        "train_config": dataclasses.asdict(settings),
        "given": {k: v for k, v in given.items() if k != "out"},  # what a resume compares
        "tokenizer": data.tokenizer.state(),
        "model": model.state_dict(),
        "done": done,
    }
    if optimizers:
        checkpoint["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        checkpoint["meter"] = [meter.scalars, meter.load]
        checkpoint["rng"] = torch.get_rng_state()
        if settings.device == "cuda":
            checkpoint["cuda_rng"] = torch.cuda.get_rng_state()
    lamoe.save(path, checkpoint)


def restore(saved: dict, model, optimizers, meter: Meter) -> dict:
    """Everything as it was; returns `done`. Batches need no state: the step says which is next."""
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    for mine, theirs in zip((meter.scalars, meter.load), saved["meter"], strict=True):
        mine.copy_(theirs)
    torch.set_rng_state(saved["rng"])
    if "cuda_rng" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda_rng"])
    return saved["done"]


def stop_on_ctrl_c() -> list:
    """An empty list that Ctrl-C fills: the step in hand is finished, then saved. Twice: at once."""
    pressed = []

    def handler(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    signal.signal(signal.SIGINT, handler)
    return pressed


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


def close(folder: Path, settings: TrainConfig, data: Data, done: dict) -> None:
    """The best model's score, a sample, and where everything is."""
    model, tokenizer = lamoe.load(folder / "best.pt", settings.device)
    kinds, floor = data.corpus.kind_of_byte, data.floor
    score = evaluate(model, data.val_ids, data.spans, tokenizer, settings, kinds)
    cut = np.arange(0, len(data.val_ids) - 1, data.batches.length)
    cut = np.stack([cut, np.append(cut[1:], len(data.val_ids) - 1)], axis=1)
    anywhere = evaluate(model, data.val_ids, cut, tokenizer, settings).bits_per_byte
    say("")
    say(
        f"best       {score.bits_per_byte:.4f} bits/byte of validation, at step {done['best_step']}"
    )
    say(f"           ({anywhere:.4f} when windows are cut anywhere, not at documents)")
    if floor:
        gap = (score.bits_of_kind - data.corpus.floor_bits) / data.corpus.floor_bits.sum()
        rest, choice, recall = 100 * gap
        above = 100 * (score.bits_per_byte / floor - 1)
        say(
            f"floor      {floor:.4f}: {above:.2f}% above it, of which choices {choice:.2f}, "
            f"recall {recall:.2f}, the rest {rest:.2f}"
        )
        at = datasets.KINDS.index("recall")
        mentions = np.count_nonzero(np.diff((kinds == at).astype(int)) == 1)
        bits = score.bits_of_kind[at] / mentions
        say(f"           a name or thing to be recalled costs {bits:.3f} bits")
    opening = "Once, upon a time" if settings.data == "stories" else "\n"
    if model.config.eval_capacity_factor is None:  # else there is no generating: see lamoe.forward
        ids = [*tokenizer.start, *tokenizer.encode(opening)]
        ids = torch.tensor([ids], device=settings.device)
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        new = model.generate(ids, 150, 0.8, min_p=0.02, stop=tokenizer.eot, generator=generator)
        text = tokenizer.decode([token.item() for token in new]).removesuffix("<|endoftext|>")
        say(f"sample     {opening}{text}")
    say(f"picture    {draw(folder, floor)}")
    say(f"log        {folder}/log.csv")
    prompt = f'"{opening}" ' if opening.strip() else ""
    say(f"next       python sample.py {prompt}--model {folder}/best.pt")


def main() -> None:
    try:
        given = vars(parse())
        resume = given.pop("resume")
        train(given, resume)
    except (ValueError, OSError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
