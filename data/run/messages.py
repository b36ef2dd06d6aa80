"""What a person reads before and after the training: the model, the end, and what went wrong."""

import math
import signal

import numpy as np
import torch

import lamoe
from data.run import ranks
from data.run.checkpoint import build, read
from data.run.log import by_source, labels_of_bytes, print_line, read_rows, recall_bits
from data.run.pictures import bits_per_byte, draw, sparkline
from data.run.routers import run_and_router


def introduce(run) -> None:
    """The ids, the model, the training and the folder, in a line each."""
    c, settings, data = run.model.config, run.settings, run.data
    n, starts, n_bytes = len(data.batches.ids), data.batches.starts, data.corpus.train.n_bytes
    print_line(
        f"tokens     {n:,} of a vocabulary of {c.vocab_size:,} ({n_bytes / n:.2f} bytes each); "
        f"{len(starts):,} windows of {c.seq_len}"
    )
    total, active = lamoe.count_parameters(run.model)["all"]
    shape = f"{c.n_layers} layers, dim {c.dim}, {c.n_heads} heads"
    if c.n_experts > 1:
        shape += f", {c.n_experts} experts of {c.hidden_dim} (top {c.n_active}, {c.router})"
    tokens = settings.batch_size * c.seq_len
    # weight, gradient and two moments; logits three times over; some 30 activations per layer
    memory = 16 * total + 12 * tokens * c.vocab_size + 120 * tokens * c.dim * c.n_layers
    size = f"{total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active per token"
    print_line(f"model      {shape}: {size}")
    print_line(
        f"training   {settings.steps} steps of {tokens * settings.grad_accum:,} tokens on "
        f"{settings.device} in {settings.dtype}, preset {settings.preset}; about "
        f"{memory / 1e9 + 0.4:.1f} GB"
    )
    if c.n_experts > 1 and c.router == "topk" and c.top_k == 1:
        print_line(
            "           the weight of one expert alone is always 1, so the loss teaches this"
        )
        print_line("           router nothing; try --router switch, or --top_k 2")
    on = "attention and experts" if settings.muon_ffn else "attention"
    corpus = data.corpus
    kind = "partly generated" if corpus.floors else "real" if corpus.floor is None else "generated"
    times = settings.steps * settings.grad_accum * tokens / n
    kind = f"{settings.init}, now on {kind}" if settings.init else kind
    frozen = ", routers frozen" if settings.freeze_router else ""
    print_line(
        f"recipe     for {kind} text of {size_of(n_bytes)}, read {times:.2g} times: Muon "
        f"{settings.muon_lr:g} on {on}, AdamW {settings.lr:g}, weight decay "
        f"{settings.weight_decay:g}{frozen}"
    )
    files = "log.csv, last.pt, best.pt"
    print_line(f"run        {run.folder}: {files}; Ctrl-C saves, --resume goes on")
    loss = f"ln({c.vocab_size}) = {math.log(c.vocab_size):.2f}"
    print_line(f"           a model that knows nothing has loss {loss}")


def size_of(n_bytes: int) -> str:
    """
    >>> size_of(27_010), size_of(335_100_000)
    ('27.0 kB', '335.1 MB')
    """
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:.1f} kB"


def not_finite(step: int, run) -> ValueError:
    """The error that ends a run whose loss or gradient is infinite or NaN."""
    saved, settings = "nothing was saved yet", run.settings
    if (run.folder / "last.pt").exists():
        saved = f"{run.folder}/last.pt holds the last good state"
    return ValueError(
        f"the loss or its gradient is not finite at step {step}; {saved}; try lower rates in a new "
        f"run: --lr {settings.lr / 3:.1g} --muon_lr {settings.muon_lr / 3:.1g}"
    )


def stopped(run, signals: list) -> int:
    """Says how a run goes on that a signal stopped, here or on another rank; the exit code."""
    print_line(f"\nstopped and saved at step {run.done['step']}; go on:")
    folder = run_and_router(run.folder, run.model.config.router)
    print_line(f"           python train.py --resume --out {folder}")
    return 128 + (signals or [signal.SIGINT])[0]  # the shell's: 130 after Ctrl-C


def summarize(run, evaluate) -> None:
    """Scores the best model once more, in two ways, and prints what there is to see."""
    folder, data, settings = run.folder, run.data, run.settings
    model, _ = build(read(folder / "best.pt"), folder / "best.pt")
    model = model.to(settings.device).eval()
    score = evaluate(model, data, settings, labels_of_bytes(data), alone=True)
    last = len(data.val_ids) - 1
    edges = np.append(np.arange(0, last, model.config.seq_len), last)
    cut = data._replace(spans=np.stack([edges[:-1], edges[1:]], axis=1))
    anywhere = evaluate(model, cut, settings, alone=True).bits_per_byte
    best = f"{score.bits_per_byte:.4f} bits/byte of validation"
    print_line("")
    print_line(f"best       {best}, at step {run.done['best_step']}")
    print_line(f"           ({anywhere:.4f} when windows are cut anywhere, not at documents)")
    if shares := by_source(score, data):
        floors = {name: f" (floor {bits:.4f})" for name, bits in data.corpus.floors.items()}
        each = (f"{name} {bits:.4f}{floors.get(name, '')}" for name, bits in shares.items())
        print_line("by source  " + "  ".join(each))
    if data.corpus.floor:
        print_floor(score, data.corpus)
    opening = "Once, upon a time" if settings.data == "stories" else "\n"
    if model.config.eval_capacity_factor is None:  # else it can't generate: see LaMoE.forward
        sample = write_sample(model, data.tokenizer, opening, settings)
        print_line(f"sample     {opening}{sample}")
    print_picture(folder, data.corpus.floor)
    print_line(f"log        {folder}/log.csv")
    prompt = f'"{opening}" ' if opening.strip() else ""
    best = run_and_router(folder / "best.pt", model.config.router)
    print_line(f"next       python sample.py {prompt}--model {best}")


def summarize_again(run, evaluate) -> None:
    """Of a run that was finished already: it may have ended before it could print this."""
    best, steps = run.folder / "best.pt", 2 * run.settings.steps
    model, out = (run_and_router(path, run.model.config.router) for path in (best, run.folder))
    print_line(f"           it is finished; try: python sample.py --model {model}")
    print_line(f"           or train on: python train.py --resume --out {out} --steps {steps}")
    if ranks.RANK == 0 and best.exists():
        summarize(run, evaluate)


def print_floor(score, corpus) -> None:
    """How far the score is above what no model can beat, and where: see datasets.KINDS."""
    gap = score.bits_of_label - corpus.floor_bits
    rest, choice, recall = 100 * gap / corpus.floor_bits.sum()
    above = 100 * (score.bits_per_byte / corpus.floor - 1)
    print_line(
        f"floor      {corpus.floor:.4f}: {above:.2f}% above it, of which choices {choice:.2f}, "
        f"recall {recall:.2f}, the rest {rest:.2f}"
    )
    bits = recall_bits(score, corpus)
    print_line(f"           a name or thing to be recalled costs {bits:.3f} bits")


def write_sample(model, tokenizer, opening: str, settings) -> str:
    """What the model writes after an opening, up to the end of its text."""
    ids = torch.tensor([[*tokenizer.start, *tokenizer.encode(opening)]], device=settings.device)
    if ids.shape[1] > model.config.seq_len:
        return ""  # a short context has no room for it
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    new = model.generate(ids, 150, 0.8, min_p=0.02, stop=tokenizer.eot, generator=generator)
    return tokenizer.decode([token.item() for token in new]).partition("<|endoftext|>")[0]


def print_picture(folder, floor) -> None:
    """Draws loss.png; without matplotlib, the training loss as a line of text."""
    bits = []
    try:
        bits, _, _ = bits_per_byte(list(read_rows(folder / "log.csv")))
        print_line(f"picture    {draw(folder, floor)}")
    except ValueError as error:  # no matplotlib, or a log that lost its rows
        if bits:
            line = sparkline(bits)
            print_line(f"loss       {line} {bits[0]:.2f} to {bits[-1]:.2f} bits/byte in training")
        print_line(f"picture    none: {error}")
