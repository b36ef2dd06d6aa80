"""Train LaMoE: text -> tokens -> windows -> a plain loop -> log.csv, last.pt, best.pt, loss.png.

    python train.py                              the embedded corpus, minutes on a laptop
    python train.py --data book.txt              your own text: a file, a folder, a zip, or A,B,C
    python train.py --resume                     go on where the newest run stopped
    python train.py --init FOLDER --data book.txt  fine-tune a Hugging Face model, or a checkpoint
    python train.py --plot runs/A runs/B         runs in one picture

References
 [1] AdamW                      Loshchilov & Hutter 2017   arXiv:1711.05101
 [2] Muon                       Jordan et al. 2024         kellerjordan.github.io/posts/muon
 [3] Linear decay to zero       Bergsma et al. 2025        arXiv:2502.15938
 [4] Polar Express              Amsel et al. 2025          arXiv:2505.16932
 [5] Warm-up, plateau, decay    Hägele et al. 2024         arXiv:2405.18392
"""

import dataclasses
import math
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path

from data import datasets, exchange, tokens  # isort: skip (before torch: see data/__init__.py)
import numpy as np
import torch
from torch.nn.functional import cross_entropy

import lamoe
from bpe import Tokenizer
from data.run import machine, messages, presets, ranks, storage
from data.run.flags import check_fields, one_line_errors, pick_device
from data.run.log import Log, Meter, Tracker, columns_of_score, print_in_place, print_line
from data.run.pictures import plot

# --- 1. What can be chosen: fields are flags ------------------------------------------------------


@dataclass
class TrainConfig:
    """How to train; lamoe.Config says what."""

    data: str = "stories"  # an embedded corpus, a public set, a file, folder or zip; or A,B,C
    text_column: str = ""  # the one with the text in tables, or several: A,B; empty: guessed
    suffix: str = ""  # of a folder's or zip's files only these: .py,.md; empty: all that are text
    out: str = ""  # the run's folder; empty: runs/ and the data's name
    init: str = ""  # Hugging Face folder or checkpoint: weights, config and tokenizer to start from
    device: str = "auto"  # auto, cpu, cuda or mps
    preset: str = ""  # laptop, gpu or gpu-large; empty: by device
    draw_mb: int = 0  # size of an embedded corpus, which is generated [MB]; 0: by preset
    tokenizer: str = "bpe"  # bpe (trained on the data), chars or bytes
    dtype: str = "auto"  # number format of matrix products: bf16 or fp32; auto: the faster
    seed: int = 0  # of the first weights and of the order of batches
    steps: int = 850  # optimizer steps; 0: by preset
    batch_size: int = 16  # windows per micro-step, on all GPUs together
    grad_accum: int = 1  # micro-steps per optimizer step
    lr: float = 8e-3  # highest rate of AdamW
    muon_lr: float = 0.02  # highest rate of Muon [2]
    muon_ffn: bool = False  # Muon trains the experts too, not only attention
    weight_decay: float = 0.1  # share of each matrix that a step takes off, times the rate
    warmup: float = 0.05  # share of the steps in which the rate rises
    decay: float = 1.0  # share of them, at the end, in which it falls; 1: all that follow the rise
    freeze_router: bool = False  # routers stay as they are, as suits fine-tuning
    clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 0  # steps between evaluations; 0: a fifth of the run
    save_every: int = 0  # steps between saves of last.pt; 0: with each evaluation
    log_every: int = 10  # steps between rows of the log
    compile: bool = False  # let torch.compile write the kernels: a GPU trains twice as fast
    fsdp: bool = False  # under torchrun: shard experts and embeddings, where DDP copies them
    track: str = ""  # mlflow: log there too, into ./mlruns or MLFLOW_TRACKING_URI

    def __post_init__(self):
        check_fields(self, presets.RANGES, presets.CHOICES)
        self.eval_every = self.eval_every or max(1, self.steps // 5)
        self.save_every = self.save_every or self.eval_every


# --- 2. Data: one flat array of ids -> windows -> batches -----------------------------------------
# Ids are those of <|endoftext|>, a document, <|endoftext|>, a document, ...; a document begins with
# the id `first`, the <|endoftext|> before it if nothing else: see data/tokens.py.


def windows(ids: np.ndarray, first: int, length: int, documents=None) -> np.ndarray:
    """(start, next start) of windows of `length` positions that begin at a document where they can.

    The next window begins at the last document that starts inside this one, else where it ends. A
    start in mid-story would ask the model for names it was never told. Between a window's start and
    the next one's, each token is met exactly once: the span that evaluation scores.
    """
    documents = tokens.document_starts(ids[:-1], first) if documents is None else documents
    last = len(ids) - 1
    n = -(-np.diff(documents, append=last) // length)  # windows that hold each to its end
    following = documents.searchsorted(documents + n * length, "right") - 1  # last to begin in them
    met = [0]  # documents that begin a window: the first, and then always the one following
    while (i := following.data[met[-1]]) > met[-1]:
        met.append(i)
    documents, n = documents[met], n[met]
    nth = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)  # 0, 1, ... from each document on
    starts = np.repeat(documents, n) + nth * length
    return np.stack([starts, np.append(starts[1:], last)], axis=1)


class Batches:
    """Windows in a seeded order without replacement; batch i is a function of i alone."""

    def __init__(self, ids: np.ndarray, first: int, length: int, size: int, seed: int):
        self.ids, self.length, self.size, self.seed = ids, length, size, seed
        self.rows = ranks.share_of_rows(size)
        documents = tokens.document_starts(ids[:-1], first)  # a pass over the whole text
        starts, full = windows(ids, first, length, documents)[:, 0], len(ids) - 1 - length
        self.starts = starts = np.append(starts[starts < full], full)  # the last window is full
        self.is_cut = documents[documents.searchsorted(starts, "right") - 1] != starts  # mid-story
        self.epoch, self.order = -1, None

    def __call__(self, i: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of batch i, (B, T) each: this process's share of its rows."""
        starts = [self.start(i * self.size + row) for row in self.rows]
        ids = self.ids[np.array(starts)[:, None] + np.arange(self.length + 1)]
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


class Data(typing.NamedTuple):
    tokenizer: Tokenizer
    batches: Batches
    corpus: datasets.Corpus
    val_ids: np.ndarray
    spans: np.ndarray  # windows of val_ids that begin at documents
    source_of_byte: np.ndarray | None  # of the validation text, where there is more than one


def load_data(settings: TrainConfig, config: lamoe.Config, corpus, tokenizer=None) -> Data:
    """Text -> tokenizer, unless there is one -> ids on disk -> windows -> batches."""
    size, length = messages.size_of(corpus.train.n_bytes), config.seq_len
    print_line(f"data       {settings.data}: {corpus.how}; {size} to train on")
    if tokenizer is None:
        tokenizer = tokens.make_tokenizer(settings.tokenizer, config.vocab_size, corpus)
    train_ids, val_ids = tokens.encode_corpus(corpus, tokenizer, length, settings.data)
    first = tokens.first_id(tokenizer)
    batches = Batches(train_ids, first, length, settings.batch_size, settings.seed)
    sources = tokens.source_of_byte(val_ids, tokenizer, corpus)
    return Data(tokenizer, batches, corpus, val_ids, windows(val_ids, first, length), sources)


# --- 3. Evaluation: bits per byte, and where they go ----------------------------------------------


class Score(typing.NamedTuple):
    loss: float  # nats per token
    bits_per_byte: float
    bits_of_label: np.ndarray | None  # total bits of the bytes with each label


@torch.no_grad()  # not inference_mode: FSDP would keep its tensors for training
def evaluate(model, data, settings: TrainConfig, labels=None, alone: bool = False) -> Score:
    """Scores every token of data.val_ids but the first, each once, in the window of its span.

    labels: a number for each byte of those tokens: its source, or an index into datasets.KINDS.
    Several ranks share the windows, unless this one is alone.
    """
    ids, spans, was_training = data.val_ids, data.spans, model.training
    model.eval()
    device, length = model.embed.weight.device, model.config.seq_len
    rank, world = (0, 1) if alone else (ranks.RANK, ranks.WORLD)
    rows = max(1, (2_048 if settings.device == "cpu" else 16_384) // length)
    missing = -len(spans) % (rows * world)  # empty spans, so that all blocks have one shape
    blocks = np.concatenate([spans, np.zeros((missing, 2), spans.dtype)])
    nats = np.zeros(len(ids) - 1)
    with torch.compiler.set_stance("force_eager"):  # not worth a compilation of its own
        for block in blocks.reshape(-1, world, rows, 2)[:, rank]:
            at = block[:, :1] + np.arange(length)
            counted = at < block[:, 1:]
            at = np.where(counted, at, block[:, :1])
            inputs, targets = (
                torch.from_numpy(ids[at + offset].astype(np.int64)).to(device) for offset in (0, 1)
            )
            with machine.autocast(settings):
                logits = model(inputs).logits.float()
            losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            nats[at[counted]] = losses.view(targets.shape).cpu().numpy()[counted]
    model.train(was_training)
    if world > 1:
        nats = ranks.sum_over_ranks(nats, device)
    last, bits, of_label = tokens.last_bytes(ids, data.tokenizer), nats / math.log(2), None
    if labels is not None:  # a token has the label of its last byte
        of_label = np.bincount(labels.take(last, mode="clip"), bits, len(datasets.KINDS))
    return Score(float(nats.mean()), float(bits.sum() / (last[-1] + 1)), of_label)


# --- 4. Optimizers and schedule -------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal [2]: no direction of a matrix is learned slowly.

    torch's goes matrix by matrix; here those of one shape are a batch, as a stack of experts is.
    """

    def __init__(self, matrices, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.move, self.share = move, 1.0  # share: what gradients are multiplied by, to clip them

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches, keep = {}, 1 - group["lr"] * group["weight_decay"]
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                if not (state := self.state[weight]):
                    state["momentum"] = torch.zeros_like(weight)
                # A shard of a stack is some experts, each of them whole: see ranks.is_sharded.
                parts = [ranks.local(part) for part in (weight, weight.grad, state["momentum"])]
                batches.setdefault(weight.shape if weight.dim() == 2 else weight, []).append(parts)
            for parts in batches.values():
                *_, rows, columns = parts[0][0].shape
                rate = group["lr"] * max(1, rows / columns) ** 0.5  # [2]: else tall ones move less
                self.move(*zip(*parts, strict=True), self.share, group["momentum"], rate, keep)


def move(weights, grads, momenta, share, momentum: float, rate, keep) -> None:
    """Muon's step for matrices, or stacks of them, of one shape."""
    ahead = []
    for grad, average in zip(grads, momenta, strict=True):
        grad = grad * share
        average.lerp_(grad, 1 - momentum)
        ahead.append(grad.lerp(average, momentum))  # Nesterov's
    stack = torch.stack(ahead).flatten(0, -3)
    steps = orthogonal(stack.bfloat16() if stack.is_cuda else stack).view(-1, *weights[0].shape)
    for weight, step in zip(weights, steps, strict=True):
        weight.copy_(weight * keep - rate * step)


# s -> a s + b s^3 + c s^5 brings singular values s together: five times the same (a, b, c) [2], or
# three, each the best for what those before leave of [0.004, 1] [4, algorithm 1]: as good on a GPU,
# where steps are dear, on text. The last is scaled so that a rate means the same with both.
FIVE = 5 * ((3.4445, -4.7750, 2.0315),)
THREE = ((8.1044, -22.621, 16.2588), (3.9172, -2.8251, 0.5247), (2.5086, -1.8812, 0.3842))


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """U V^T, nearly, of each matrix U S V^T of a batch: singular values within 0.3 to 1.2, by
    products alone. x is divided by the root of |x x^T|, which no singular value exceeds."""
    is_tall = x.shape[-2] > x.shape[-1]  # then from the other side, not transposed: a GPU is slow
    for i, (a, b, c) in enumerate(THREE if x.is_cuda else FIVE):
        gram, root = x.mT @ x if is_tall else x @ x.mT, 1.0
        if i == 0:  # over its largest number first: fourth powers leave the range of fp32
            most = gram.diagonal(0, -2, -1).float().amax(-1)[..., None, None].clamp(min=1e-37)
            size = most * (gram / most).norm(dim=(-2, -1), keepdim=True).clamp(min=1)
            gram, root = (gram / size).to(x.dtype), size.rsqrt()  # root: for the product below
        eye = torch.eye(gram.shape[-1], device=x.device)
        factor = (root * (a * eye + b * gram + c * (gram @ gram))).to(x.dtype)
        x = x @ factor if is_tall else factor @ x
    return x


def make_optimizers(model: lamoe.LaMoE, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon [2] on attention, with muon_ffn on experts; AdamW [1] on the rest, as [2] advises
    for embeddings and head; norms: no decay."""
    matrices, shards, others, vectors = [], [], [], []  # AdamW groups: all shards (--fsdp), or none
    for name, weight in model.named_parameters():
        of_muon = ".attn." in name or config.muon_ffn and ".ffn." in name and ".router." not in name
        kind = matrices if of_muon else shards if ranks.is_sharded(name) else others
        (vectors if weight.dim() < 2 else kind).append(weight)
    decay = config.weight_decay
    groups = [{"params": part, "weight_decay": decay} for part in (shards, others) if part]
    groups.append({"params": vectors, "weight_decay": 0.0})
    muon = Muon(matrices, config.muon_lr, decay)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)  # betas of GPT-3
    for group in (*muon.param_groups, *adamw.param_groups):
        group["highest_lr"] = group["lr"]
    return [muon, adamw]


def schedule(step: int, config: TrainConfig) -> float:
    """The share of the highest rate at a step: a linear rise, then linear to zero [3]; with decay
    below 1 a plateau between them, from which a run can go on for longer [5]."""
    rise = max(1, round(config.warmup * config.steps))
    fall = max(1, min(round(config.decay * config.steps), config.steps - rise))
    return min((step + 1) / rise, 1.0, (config.steps - step) / fall)


# --- 5. The loop ----------------------------------------------------------------------------------


@dataclass
class Run:
    """All that a run is made of."""

    folder: Path
    lock: typing.IO | None  # while it is open, no other process uses the folder
    settings: TrainConfig
    flags: dict  # those given, which a resume compares
    data: Data
    model: lamoe.LaMoE
    parallel: torch.nn.Module  # what forward and backward go through: model, or DDP around it
    optimizers: list
    meter: Meter  # sums for the next row of the log
    tracker: Tracker
    done: dict  # step, seconds, best, best_step
    is_compiled: bool = False


def train(run: Run, stop: list) -> None:
    """Steps until all are done, or until Ctrl-C has put something into `stop`.

    A GPU is waited for only where a row, an evaluation or a save is due. On a CPU, where looking
    costs nothing, a loss or gradient that is not finite ends the run before it moves a weight.
    """
    settings, batches, meter, done = run.settings, run.data.batches, run.meter, run.done
    log, stopping = Log(run), False

    def take_step(*micro_batches) -> None:
        loads = []
        for i, (inputs, targets) in enumerate(micro_batches, 1):
            with ranks.averaging(run.parallel, on=i == settings.grad_accum):
                with machine.autocast(settings):
                    out = run.parallel(inputs, targets, return_logits=False)
                ((out.loss + out.aux) / settings.grad_accum).backward()
            meter.add(out)
            loads.append(out.load)
        ranks.average_unsharded(run.parallel)
        meter.add_norm(ranks.clip_gradients(run.parallel, settings.clip, run.optimizers[0]))
        if settings.device == "cpu" and not meter.is_finite():
            raise messages.not_finite(done["step"] + 1, run)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if not settings.freeze_router:  # some balance the load by a bias
            run.model.update_bias(sum(loads))

    if not done["step"]:
        log.begin(evaluate(run.model, run.data, settings, log.labels))
    take_step = machine.recorded(take_step, run)  # a CUDA graph, where that works
    while done["step"] < settings.steps and not stopping:
        started, step = time.perf_counter(), done["step"]
        machine.set_rates(run.optimizers, schedule(step, settings))
        numbers = range(step * settings.grad_accum, (step + 1) * settings.grad_accum)
        take_step(*(batches(number, settings.device) for number in numbers))
        done["step"] = step = step + 1
        evaluating, saving, logging = (
            step % every == 0 or step == settings.steps
            for every in (settings.eval_every, settings.save_every, settings.log_every)
        )
        rate, next_rate = (schedule(n, settings) for n in (step, step + 1))
        plateau_ends = settings.decay < 1 and rate == 1 > next_rate
        saving = saving or plateau_ends
        stopping = (logging or ranks.WORLD == 1) and ranks.on_any_rank(bool(stop))
        row = meter.row() if evaluating or saving or logging or stopping else {}
        done["seconds"] += time.perf_counter() - started
        if evaluating:
            score = evaluate(run.model, run.data, settings, log.labels)
            row |= columns_of_score(score, run.data)
        if not all(map(math.isfinite, row.values())):
            raise messages.not_finite(step, run)
        if evaluating and score.bits_per_byte < done["best"]:
            done |= {"best": score.bits_per_byte, "best_step": step}
            storage.save_run(run, "best.pt")
        if evaluating or logging:
            log.add({"step": step, "lr": schedule(step - 1, settings) * settings.lr, **row})
        if saving or stopping:
            log.flush()  # first: a resume must find all rows up to its checkpoint
            for name in ["plateau.pt"] * plateau_ends + ["last.pt"]:  # which then needs no other
                storage.save_run(run, name)


# --- 6. Before the loop, and after it -------------------------------------------------------------


def set_up(flags: dict, resuming: bool) -> Run:
    """A new run, or one as its last.pt has it. Nothing is written yet but the text's ids."""
    ranks.init_distributed(pick_device(flags.get("device", "auto")))
    folder, lock, saved = storage.find_run(flags, resuming, TrainConfig)
    asked, init, tokenizer = presets.settings_of_data(TrainConfig, flags, saved), None, None
    tracker = Tracker(asked["track"])
    with ranks.rank_0_first():  # it makes the files that the others then find
        how = asked["text_column"], asked["draw_mb"] * 10**6, print_in_place, asked["suffix"]
        corpus = datasets.read(asked["data"], *how)
        if saved:
            settings, config = presets.resumed_config(TrainConfig, schedule, flags, saved)
            storage.check_text(saved, corpus, settings.data)
            flags, tokenizer = saved["given"], saved["tokenizer"]
        else:
            if flags.get("init"):
                init, tokenizer = exchange.load(flags["init"], dtype=torch.float32)
            settings, config = presets.resolve_config(TrainConfig, flags, corpus, init, tokenizer)
        data = load_data(settings, config, corpus, tokenizer)
    torch.manual_seed(settings.seed)
    model = lamoe.LaMoE(dataclasses.replace(config, vocab_size=data.tokenizer.vocab_size))
    if saved or init:
        model.load_state_dict(saved["model"] if saved else exchange.weights_from(init, model))
    for name, weight in model.named_parameters():
        weight.requires_grad_(not (settings.freeze_router and ".router." in name))
    parallel = ranks.parallelize(model, settings)
    optimizers, done = make_optimizers(model, settings), dict(storage.NOTHING_DONE)
    parts = model, parallel, optimizers, Meter(model), tracker
    run = Run(folder, lock, settings, flags, data, *parts, done)
    if saved:
        storage.restore(saved, run)
    return run


def run_training(flags: dict, resuming: bool) -> None:
    """A run from its flags to its summary."""
    run = set_up(flags, resuming)
    if run.done["step"] >= run.settings.steps:
        return messages.summarize_again(run, evaluate)
    run.tracker.start(run)
    if ranks.RANK > 0:  # random numbers of its own
        torch.manual_seed(hash((run.settings.seed, ranks.RANK, run.done["step"])))
    else:
        run.lock = storage.claim(run.folder, run.lock, keep_files=run.done["step"] > 0)
    messages.introduce(run)
    machine.keep_freed_memory()
    with machine.out_of_memory_advice(run.settings):
        run.is_compiled = machine.compile_model(run)
        with machine.stop_on_signals() as stop:
            train(run, stop)
    if run.done["step"] < run.settings.steps:
        sys.exit(messages.stopped(run, stop))
    if ranks.RANK == 0:
        messages.summarize(run, evaluate)
        run.tracker.end(run.folder)
    ranks.end_distributed()


def main() -> None:
    with one_line_errors(hint=storage.remedy, quiet=ranks.RANK > 0), ranks.explain_dead_rank():
        flags = presets.parse(__doc__, TrainConfig)
        resuming, runs = flags.pop("resume"), flags.pop("plot")
        if runs:
            print_line(f"picture    {plot(runs, flags.get('out', ''))}")
        else:
            run_training(flags, resuming)


if __name__ == "__main__":
    main()
