"""Settings: which suit a device, a text, or the fine-tuning of a model; and what a resume keeps.

A setting comes from the command line, else from the model of --init, else from the preset, else
from `recipe`, by the text, else from its default.
"""

import dataclasses
import math

import lamoe
from data.run import machine
from data.run.flags import OneLineParser, add_flags, pick_device
from data.run.log import print_line
from data.run.routers import router_name

LAPTOP = {"qk_norm": True, "n_layers": 3}
GPU = {**LAPTOP, "steps": 1200, "batch_size": 64, "compile": True, "draw_mb": 64}
# What was ahead of dense on real text (README): small experts, a shared one, Muon on all of them.
FINE = {"n_experts": 32, "top_k": 2, "n_shared_experts": 1, "hidden_dim": 512, "muon_ffn": True}
# The preset `gpu` for 100 MB of text and more is another model, which wins there and loses below:
# five minutes of an H100, 65,536 tokens a step.
GPU_TEXT = {**FINE, "dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8}
GPU_TEXT |= {"batch_size": 128, "steps": 5000, "lr": 4e-3, "vocab_size": 8192}
# 680M parameters, 111M active, for gigabytes of text. 262,144 tokens a step. The head is not tied
# to the embedding: tied, it begins at a loss of 15, not ln(50304) = 10.8, and a small model was
# 0.06 bits per byte behind (dim 512, 2 layers, 200 steps on 16 MB of sources, two seeds).
GPU_LARGE = {**GPU, **FINE, "dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 4}
GPU_LARGE |= {"hidden_dim": 640, "seq_len": 1024, "vocab_size": 50304}
GPU_LARGE |= {"batch_size": 16, "grad_accum": 16, "steps": 4000}
PRESETS = {"laptop": LAPTOP, "gpu": GPU, "gpu-large": GPU_LARGE}

# The recipe of an embedded corpus, whatever its size. It has few words, a high weight decay harms
# the recall of names, and with muon_ffn recall comes late.
DRAWN = {"vocab_size": 2048, "seq_len": 256, "lr": 8e-3, "muon_lr": 0.02, "muon_ffn": False}
DRAWN |= {"weight_decay": 0.1}
# Rates of AdamW and of Muon for fine-tuning, where AdamW has the experts: see tuning_rates.
GENTLE = {"lr": 4e-3, "muon_lr": 0.02}
BY_RECIPE = dict.fromkeys(DRAWN, "by the text: see `recipe` in data/run/presets.py")


def recipe(n_bytes: int, given: dict) -> dict:
    """Settings for a real text of this size, where `given` has none: smooth in all they depend on.

    A larger text gets a larger vocabulary, because a model must meet a token often to learn it, up
    to what suits the width; and a longer context. Weight decay is the share of the text that a step
    reads, times a constant: so weights forget over a constant part of an epoch [Wang & Aitchison
    2024, arXiv:2405.13698], and a small text isn't learned by heart. AdamW's rate falls with the
    width from 128 on.

    One step there is: a text so large that a run reads it about once has the recipe of drawn ones.
    There a large vocabulary costs more than it brings (12 MB of prose and code, 850 steps: 2.00
    bits per byte with 2,048, 2.20 with 3,584, 2.17 with 5,120, or 2.14 with muon_ffn), perhaps
    because copying from the context is discovered later.
    """
    run = {"batch_size": 16, "grad_accum": 1, "dim": 128, **given}
    n_bytes, width = max(1, n_bytes), max(1.0, run["dim"] / 128)
    megabytes = n_bytes / 1e6
    vocab_size = 256 * round(min(2100 * megabytes**0.45, 4096 * width**0.5) / 256)
    seq_len = 2 ** round(math.log2(160 * megabytes**0.18))
    by_size = {"vocab_size": max(512, vocab_size), "seq_len": min(512, max(64, seq_len))}
    tokens = run["batch_size"] * run["grad_accum"] * {**by_size, **given}["seq_len"]
    share = 3 * tokens / n_bytes  # of the text in a step: a token has some three bytes
    decay, is_read_once = min(1.0, max(0.1, 105 * share)), share < 1 / 600
    if is_read_once:
        by_size["vocab_size"] = DRAWN["vocab_size"]
    muon_ffn = given.get("muon_ffn", not is_read_once)
    lr, muon_lr = (0.02, 0.04) if muon_ffn else (DRAWN["lr"], DRAWN["muon_lr"])
    rates = {"lr": float(f"{lr / width:.1g}"), "muon_lr": muon_lr, "muon_ffn": muon_ffn}
    return {**by_size, **rates, "weight_decay": float(f"{decay:.2g}")}


# What fields of TrainConfig may be: from, to; and one of.
MOST = 2**63 - 1
RANGES = dict.fromkeys(("eval_every", "save_every", "seed", "draw_mb"), (0, MOST))
RANGES |= dict.fromkeys(("steps", "batch_size", "grad_accum", "log_every"), (1, MOST))
RANGES |= dict.fromkeys(("lr", "muon_lr", "weight_decay"), (0, math.inf))
RANGES |= {"warmup": (0, 1), "decay": (0, 1), "clip": (1e-12, math.inf)}
CHOICES = {"tokenizer": ("bpe", "chars", "bytes"), "dtype": ("auto", "bf16", "fp32")}
CHOICES |= {"track": ("", "mlflow")}

# Where a run happens, not what it trains: free to differ on a resume.
PLACES = {"out", "data", "device", "compile", "fsdp"}
# Fields of lamoe.Config on which no weight depends: free to differ from the model of --init.
FREE = "seq_len dropout balance_weight z_weight capacity_factor eval_capacity_factor jitter".split()
FREE += ["bias_rate", "sequence_weight"]
# Fields in which a sparse model may differ from the dense one that it is made of.
SPARSE = "n_experts top_k router n_shared_experts n_dense_layers n_groups top_groups".split()
SPARSE += ["routed_scale", "hidden_dim"]


def parse(description: str, train_config, arguments: list[str] | None = None) -> dict:
    """The flags given; one that is not given is absent, so that a preset can fill it in."""
    description = description.split("\n\n")[0]
    parser = OneLineParser("train.py", description=description, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    plot = "draw the logs of runs into one picture, --out"
    parser.add_argument("--plot", nargs="+", metavar="RUN", help=plot)
    for cls in (train_config, lamoe.Config):
        routers = {"router": [*sorted(lamoe.ROUTERS), "FILE.py with one of your own"]}
        add_flags(parser, cls, LAPTOP | BY_RECIPE, routers, {"router": router_name})
    flags = vars(parser.parse_args(arguments))
    by_preset = [name for name in ("steps", "draw_mb") if flags.get(name) == 0]
    return {name: value for name, value in flags.items() if name not in by_preset}


def pick_preset(flags: dict) -> tuple[str, str]:
    """(device, name of the preset)."""
    device = pick_device(flags.get("device", "auto"))
    preset = flags.get("preset") or ("gpu" if device == "cuda" else "laptop")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; try one of {sorted(PRESETS)}")
    return device, preset


def settings_of_data(train_config, flags: dict, saved: dict | None) -> dict:
    """What is settled before the text is read: its size may decide the rest."""
    if saved:
        return {**saved["train_config"], "data": flags.get("data", saved["train_config"]["data"])}
    return {**vars(train_config()), **PRESETS[pick_preset(flags)[1]], **flags}


def resolve_config(train_config, flags: dict, corpus, init=None, tokenizer=None):
    """(TrainConfig, lamoe.Config) of a new run; train_config is the class.

    init: the model to start from, if there is one, and its tokenizer; flags can't change what its
    weights depend on.
    """
    device, preset = pick_preset(flags)
    n_bytes, is_drawn = corpus.train.n_bytes, corpus.floor is not None
    is_large = preset == "gpu" and n_bytes >= 1e8 and not is_drawn
    given = {**PRESETS[preset], **(GPU_TEXT if is_large else {}), **flags}
    chosen = {**(DRAWN if is_drawn else recipe(n_bytes, given)), **given}
    if init and not tokenizer:
        raise ValueError(f"{flags['init']} has no tokenizer; put the model's tokenizer.json there")
    if init:
        of_model = fields_of_init(init.config, chosen["seq_len"], flags)
        chosen = {**chosen, **tuning_rates(init), **of_model, **flags}
    chosen |= {"device": device, "preset": preset}
    settings, config = (
        cls(**{f.name: chosen[f.name] for f in dataclasses.fields(cls) if f.name in chosen})
        for cls in (train_config, lamoe.Config)
    )
    if settings.freeze_router and config.n_experts == 1:
        raise ValueError("--freeze_router: a dense model has no router; leave it out")
    settings.dtype = machine.pick_dtype(settings.dtype, device)
    machine.check_memory(config)
    return settings, config


def tuning_rates(init: lamoe.LaMoE) -> dict:
    """Rates for a model that has learned something: the more weights, the lower, to keep it.

    Those of a small fresh run up to 2M parameters, a fortieth of them for 1B. (2.3M from stories to
    Shakespeare, 150 steps: 2.75 bits per byte, and 4.07 with --lr 2e-4 --muon_lr 5e-4.)
    """
    n = sum(weight.numel() for weight in init.parameters())
    share = min(1.0, (2e6 / n) ** 0.6)
    rates = {name: float(f"{share * rate:.2g}") for name, rate in GENTLE.items()}
    return {**rates, "muon_ffn": False}


def fields_of_init(init: lamoe.Config, seq_len: int, flags: dict) -> dict:
    """The fields of the model to start from, its context cut to seq_len; flags may change FREE."""
    fields = {**dataclasses.asdict(init), "seq_len": min(seq_len, init.seq_len)}
    if init.n_experts == 1 and flags.get("n_experts", 1) > 1:
        fields |= fields_of_experts(init, flags)
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


def fields_of_experts(init: lamoe.Config, flags: dict) -> dict:
    """The fields of the sparse model that a dense one becomes: see data/exchange/upcycle.py."""
    defaults = {field.name: field.default for field in dataclasses.fields(lamoe.Config)}
    fields = {name: defaults[name] for name in SPARSE} | {"hidden_dim": init.hidden_dim}
    fields |= {name: flags[name] for name in SPARSE if name in flags}
    wide, slices = fields["hidden_dim"], init.hidden_dim // max(1, fields["hidden_dim"])
    if wide < 1 or init.hidden_dim % wide:
        fits = (w for w in range(max(1, init.hidden_dim // 2), 0, -1) if init.hidden_dim % w == 0)
        raise ValueError(
            f"--hidden_dim {wide} does not divide the {init.hidden_dim} hidden units of "
            f"{flags['init']}; leave it out, or try --hidden_dim {next(fits)}"
        )
    fields |= {} if "top_k" in flags else {"top_k": max(2, slices)}
    for name in ("n_experts", "top_k"):
        if value := fields[name] % slices:
            raise ValueError(
                f"--{name} {fields[name]} is no multiple of {slices}: experts of {wide} hidden "
                f"units are {slices} to a copy; try --{name} {fields[name] - value + slices}"
            )
    return fields


def resumed_config(train_config, schedule, flags: dict, saved: dict):
    """(TrainConfig, lamoe.Config) of a run that goes on: as saved, but for its PLACES and for more
    steps, of which as many as before are a rise. ValueError for another flag that differs from what
    the run began with.
    """
    settings, config = train_config(**saved["train_config"]), lamoe.Config(**saved["config"])
    known = {**dataclasses.asdict(config), **dataclasses.asdict(settings), **saved["given"]}
    known["steps"] = settings.steps  # it may have been made longer since
    steps, done = flags.get("steps", settings.steps), saved["done"]["step"]
    for name, value in flags.items():
        is_free = name in PLACES or (name == "steps" and value > settings.steps)
        if not is_free and value != known[name]:
            raise ValueError(
                f"--{name} {value} differs from the run's {known[name]}; leave it out to "
                f"resume, or start a new run with another --out"
            )
    device = pick_device(flags.get("device", settings.device))
    compiles = flags.get("compile", settings.compile and device == "cuda")
    places = {"device": device, "compile": compiles, "fsdp": flags.get("fsdp", False)}
    places["data"] = flags.get("data", settings.data)  # the same text: see storage.check_text
    if steps > settings.steps:
        warmup = settings.warmup * settings.steps / steps
        longer = dataclasses.replace(settings, steps=steps, warmup=warmup)
        before, now = (schedule(done, of) for of in (settings, longer))
        falls = schedule(steps - 1, longer) < 1  # else its decay is shorter than a step
        print_line(
            f"longer     {settings.steps} steps become {steps}: at step {done} rates were "
            f"{before:.0%} of the highest; they are {now:.0%} now"
            f"{' and fall to zero at the end' * falls}"
        )
        settings = longer
    return dataclasses.replace(settings, **places), config
