"""How fast LaMoE is on this machine, as ratios to what the machine and other code can do.

    python tests/bench.py                      all tables; minutes on one GPU
    python tests/bench.py train layer          some of: train, equal, routers, layer, ...
    torchrun --nproc_per_node N tests/bench.py scaling largest
    python tests/bench.py --smallest           seconds: whether it runs, not how fast

Each figure is the median of several, after a warm-up. Compile times are shown and not counted.
Model FLOPs utilization (MFU) is 6 x active matrix parameters + causal attention, times tokens/s,
over the rate of a large product of matrices measured in the same run. Memory is the GPU's, at its
peak. Not collected by pytest.
"""

import argparse
import dataclasses
import gc
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import lamoe
import train
from data import one_row
from data.run import machine, ranks
from data.run.log import Meter
from data.run.machine import autocast, compile_blocks
from data.run.routers import router_name

warnings.simplefilter("ignore")  # the compiler's about softmax and tf32
GPU = torch.cuda.is_available()
SMALLEST = "--smallest" in sys.argv
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
SETTINGS = train.TrainConfig(device=DEVICE, dtype="bf16" if GPU else "fp32")
# The models measured: one active size, dense, in 8 and in 64 experts.
if SMALLEST:
    SHAPE = {"vocab_size": 256, "dim": 64, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1}
    SHAPE |= {"seq_len": 32}
    BATCH, F, ROUNDS = 2, 64, 1
elif GPU:
    SHAPE = {"vocab_size": 50304, "dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 4}
    SHAPE |= {"seq_len": 1024}
    BATCH, F, ROUNDS = 32, 1024, 5
else:
    SHAPE = {"vocab_size": 2048, "dim": 128, "n_layers": 3, "n_heads": 2, "n_kv_heads": 2}
    SHAPE |= {"seq_len": 128}
    BATCH, F, ROUNDS = 8, 256, 5
MODELS = {
    "dense": {"n_experts": 1, "hidden_dim": 2 * F},
    "8 experts, top 2": {"n_experts": 8, "top_k": 2, "hidden_dim": F},
    "64 experts, top 8": {"n_experts": 64, "top_k": 8, "hidden_dim": F // 4},
}
# Those that write text.
SMALL = {"vocab_size": 4096, "dim": 256, "n_layers": 8, "n_heads": 4, "n_kv_heads": 2}
SMALL |= {"hidden_dim": 384, "n_experts": 8, "top_k": 2, "seq_len": 1024}
LARGE = {"vocab_size": 32000, "dim": 1024, "n_layers": 16, "n_heads": 16, "n_kv_heads": 8}
LARGE |= {"hidden_dim": 2816, "n_experts": 8, "top_k": 2, "seq_len": 1024}
if SMALLEST:
    SMALL |= {"n_layers": 1, "seq_len": 256}


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds(function, times: int = ROUNDS, inner: int = 1 if SMALLEST else 4) -> float:
    """What one call takes: the median of `times` rounds of `inner` calls back to back."""
    function()
    rounds = []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        for _ in range(inner):
            function()
        wait()
        rounds.append((time.perf_counter() - start) / inner)
    return sorted(rounds)[times // 2]


def clean() -> None:
    gc.collect()
    torch._dynamo.reset()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> str:
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if GPU else "-"


def ceilings() -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s read plus written by a copy)."""
    n = 256 if SMALLEST else 8192 if GPU else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product = 2 * n**3 / seconds(lambda: a @ b)
    x = torch.randn(2**16 if SMALLEST else 2**29 if GPU else 2**24, device=DEVICE)
    y = torch.empty_like(x)
    return product, 2 * x.numel() * 4 / seconds(lambda: y.copy_(x))


def make(device=DEVICE, **changes) -> lamoe.LaMoE:
    torch.manual_seed(0)
    with torch.device(device):
        return lamoe.LaMoE(lamoe.Config(**{**SHAPE, **changes})).to(device)


def stepper(model, parallel, batch: int, settings=SETTINGS):
    """A function that does one training step, as the loop of train.py does, on random tokens."""
    optimizers, meter, c = train.make_optimizers(model, settings), Meter(model), model.config
    ids_BT = torch.randint(c.vocab_size, (batch, c.seq_len + 1), device=DEVICE)

    def take_step(micro_batch):
        inputs, targets = micro_batch
        with ranks.averaging(parallel, on=True):
            with machine.autocast(settings):
                out = parallel(inputs, targets, return_logits=False)
            (out.loss + out.aux).backward()
        meter.add(out)
        load_LE = out.load
        del out
        ranks.average_unsharded(parallel)
        meter.add_norm(ranks.clip_gradients(parallel, settings.clip, optimizers[0]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model.update_bias(load_LE)

    run = SimpleNamespace(settings=settings, optimizers=optimizers, model=model, is_compiled=GPU)
    machine.keep_masters(run)
    taken = machine.recorded(take_step, run)

    def step():
        machine.set_rates(optimizers, train.schedule(100, settings))
        taken((ids_BT[:, :-1], ids_BT[:, 1:]))

    return step


def bench_train(peak: float, batch: int = BATCH) -> None:
    print(f"\nTraining, batch {batch} x {SHAPE['seq_len']}, {'compiled' if GPU else 'eager'}")
    print("model                  total  active   tokens/s  of dense   MFU     memory  compile")
    dense = None
    for name, changes in MODELS.items():
        clean()
        model = make(**changes)
        total, active = lamoe.count_parameters(model)["all"]
        start = time.perf_counter()
        if GPU:
            compile_blocks(model)
        step = stepper(model, model, batch)
        step()
        wait()
        compiling, rate = time.perf_counter() - start, batch * SHAPE["seq_len"] / seconds(step)
        dense = dense or rate
        use = rate * lamoe.flops_per_token(model) / peak
        print(
            f"{name:20} {total / 1e6:6.1f}M {active / 1e6:6.1f}M {rate:10,.0f} {rate / dense:8.2f} "
            f"{use:6.1%} {peak_memory():>10} {compiling:6.0f} s",
            flush=True,
        )
        del model, step


# The active feed-forward width of a dense model of 1,536 hidden units, in experts.
EQUAL = {
    "dense": {"n_experts": 1, "hidden_dim": 1536},
    "8 of 768, top 2": {"n_experts": 8, "top_k": 2, "hidden_dim": 768},
    "16 of 384, top 3 + 1": {"n_experts": 16, "top_k": 3, "hidden_dim": 384, "n_shared_experts": 1},
    "16 of 512, top 2 + 1": {"n_experts": 16, "top_k": 2, "hidden_dim": 512, "n_shared_experts": 1},
    "32 of 512, top 2 + 1": {"n_experts": 32, "top_k": 2, "hidden_dim": 512, "n_shared_experts": 1},
    "32 of 384, top 3 + 1": {"n_experts": 32, "top_k": 3, "hidden_dim": 384, "n_shared_experts": 1},
    "64 of 192, top 7 + 1": {"n_experts": 64, "top_k": 7, "hidden_dim": 192, "n_shared_experts": 1},
}
MIDDLE = {"vocab_size": 8192, "dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8}
MIDDLE |= {"seq_len": 512, "qk_norm": True}


def bench_equal() -> None:
    """The step of each model over that of the dense one: rounds of both take turns."""
    shape = {**MIDDLE, **SHAPE} if SMALLEST or not GPU else MIDDLE
    settings = dataclasses.replace(SETTINGS, muon_ffn=True)
    for batch in (256, 64) if GPU else (BATCH,):
        print(f"\nTraining, dim {shape['dim']}, {batch} x {shape['seq_len']} tokens a step")
        print("model                   ms    dense's  of dense      tokens/s   memory", flush=True)
        dense = None
        for name, changes in EQUAL.items():
            clean()
            model = make(**shape, **changes)
            if GPU:
                compile_blocks(model)
            step = stepper(model, model, batch, settings)
            dense = dense or step
            for _ in range(5):
                step()
            rounds = [(seconds(dense, 1), seconds(step, 1)) for _ in range(ROUNDS)]
            slow, ours = (sorted(times)[len(times) // 2] for times in zip(*rounds, strict=True))
            ratio = sorted(a / b for a, b in rounds)[len(rounds) // 2]
            print(
                f"{name:20} {ours * 1e3:7.2f} {slow * 1e3:9.2f} {ratio:9.3f} "
                f"{batch * shape['seq_len'] / ours:13,.0f} {peak_memory():>10}",
                flush=True,
            )
            del model, step


def bench_routers(batch: int = BATCH) -> None:
    print(f"\nStep time of each router over topk's, 8 experts, batch {batch} x {SHAPE['seq_len']}")
    models, steps = {}, {}
    clean()
    own = sorted(map(str, (Path(__file__).parent / "routers").glob("*.py")))
    for router in ("topk", "noisy", "deepseek", "topk k=1", "switch", *map(router_name, own)):
        name, *k1 = router.split()
        k = {"top_k": 1, "hidden_dim": 2 * F} if k1 or name == "switch" else {"hidden_dim": F}
        models[router] = make(router=name, n_layers=3, **k)
        if GPU:
            compile_blocks(models[router])
        steps[router] = stepper(models[router], models[router], batch)
    rounds = [
        {name: seconds(step, 1, 3) for name, step in steps.items()}
        for _ in range(1 if SMALLEST else 7)
    ]
    for router in steps:
        twin = "topk k=1" if router == "switch" else "topk"
        ratios = sorted(times[router] / times[twin] for times in rounds)
        print(f"{router:13} {ratios[len(ratios) // 2]:.2f} of {twin}", flush=True)


def bench_layer(peak: float) -> None:
    N, D, wide = (32768, 1024, 5632) if GPU else (2048, 256, 1024)
    if SMALLEST:
        N, D, wide = 64, 64, 176
    print(f"\nMoE layer, forward and backward, {N} tokens, dim {D}, against a dense layer")
    dense = None
    for name, E, A, hidden in (
        ("dense", 1, 1, wide),
        ("8 experts, top 2", 8, 2, wide // 2),
        ("dense, narrower", 1, 1, wide * 8 // 11),
        ("64 experts, top 8", 64, 8, wide // 11),
    ):
        clean()
        c = lamoe.Config(
            9, dim=D, n_heads=D // 64, n_kv_heads=1, hidden_dim=hidden, n_experts=E, top_k=A
        )
        with torch.device(DEVICE):
            layer = lamoe.SwiGLU(D, hidden) if E == 1 else lamoe.MoE(c)
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        if GPU:
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
        x_BTD = torch.randn(32, N // 32, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
        grad_BTD, inputs = torch.randn_like(x_BTD), [x_BTD]
        if E > 1:
            ids_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.long, device=DEVICE)
            inputs += [ids_BT, lamoe.pick_kernels(x_BTD, c)[1]]

        def run(layer=layer, inputs=inputs, grad_BTD=grad_BTD):
            with autocast(SETTINGS):
                out = layer(*inputs)
            y_BTD = out if isinstance(out, torch.Tensor) else out[0]
            y_BTD.backward(grad_BTD)
            for tensor in (inputs[0], *layer.parameters()):
                tensor.grad = None

        run()
        took = seconds(run, inner=10 if GPU else 2)
        dense = took if E == 1 else dense
        use = 18 * N * D * hidden * A / took / peak
        print(
            f"{name:20} {took * 1e3:8.2f} ms {took / dense:6.2f} of dense {use:6.1%} of peak",
            flush=True,
        )


def bench_generate(bandwidth: float) -> None:
    print(f"\nGeneration, {DTYPE}, temperature 0.8, min_p 0.02, after 16 tokens of prompt")
    print(
        "model    batch  way                     tokens/s  active bytes/s of copy bandwidth  ready"
    )
    plain, ours = one_row.RowStep.__base__, one_row.RowStep
    ways = {"eager": (plain, False, False), "graph": (plain, True, False)}
    ways |= {"compiled, graph": (plain, True, True), "few kernels, graph": (ours, True, True)}
    for name, shape, batch, n, some in (
        ("small", SMALL, 1, 500, ways),
        ("large", LARGE, 1, 500, ways if GPU else {}),
        ("small", SMALL, 32, 200, list(ways)[1:] if GPU else {}),
        ("large", LARGE, 64, 200, list(ways)[1:] if GPU else {}),
    ):
        for way in some if GPU else list(some)[:1]:
            clean()
            model = make(**shape).to(DTYPE).eval()
            for weight in model.parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=0.02)
            total, active = lamoe.count_parameters(model)["all"]
            ids_BT = torch.randint(99, (batch, 16), device=DEVICE)
            lamoe.Step, graph, compiled = ways[way]  # generate takes the step from there
            n_new = 5 if SMALLEST else 60 if way == "eager" else n
            start = time.perf_counter()
            tokens = model.generate(
                ids_BT, n_new + 100, 0.8, min_p=0.02, graph=graph, compile=compiled
            )
            for _ in range(2 if SMALLEST else 10):
                next(tokens)
            wait()
            ready, start = time.perf_counter() - start, time.perf_counter()
            for _ in range(n_new):
                next(tokens)
            wait()
            rate = batch * n_new / (time.perf_counter() - start)
            n_bytes = rate * active * DTYPE.itemsize
            share = f"{n_bytes / bandwidth:.1%}" if batch == 1 else "-"
            print(
                f"{name} {total / 1e6:5.0f}M {batch:3}  {way:20} {rate:10,.0f} {share:>20} "
                f"{ready:18.0f} s",
                flush=True,
            )
            del model, tokens


def mixtral(shape: dict):
    """Hugging Face's Mixtral of one of our shapes, with its fastest experts."""
    import transformers

    c = lamoe.Config(**shape)
    options = {"vocab_size": c.vocab_size, "hidden_size": c.dim, "intermediate_size": c.hidden_dim}
    options |= {"num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads}
    options |= {"num_key_value_heads": c.n_kv_heads, "max_position_embeddings": c.seq_len}
    options |= {"num_local_experts": c.n_experts, "num_experts_per_tok": c.top_k}
    config = transformers.MixtralConfig(**options, bos_token_id=0, eos_token_id=None)
    config._experts_implementation = "grouped_mm"
    with torch.device(DEVICE):
        return transformers.MixtralForCausalLM(config)


def bench_peers() -> None:
    try:
        import transformers
    except ImportError:
        return print('\npeers: none here; pip install -e ".[oracle]"')
    print(f"\nHugging Face Mixtral, transformers {transformers.__version__}")
    batch, shape = min(8, BATCH), {**SHAPE, **MODELS["8 experts, top 2"]}
    ids_BT = torch.randint(shape["vocab_size"], (batch, shape["seq_len"]), device=DEVICE)
    rates = {}
    for name in ("Hugging Face", "LaMoE"):
        clean()
        model = mixtral(shape) if name == "Hugging Face" else make(**shape)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if GPU:
            compile_blocks(model)

        def step(model=model, optimizer=optimizer, name=name):
            with autocast(SETTINGS):
                if name == "LaMoE":
                    loss = model(ids_BT, ids_BT).loss
                else:
                    loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        rates[name] = ids_BT.numel() / seconds(step, min(3, ROUNDS), 2)
        print(
            f"training, {name:12} {rates[name]:10,.0f} tokens/s, memory {peak_memory()}", flush=True
        )
        del model, optimizer, step
    print(f"          LaMoE over it: {rates['LaMoE'] / rates['Hugging Face']:.2f}")
    model = mixtral(LARGE if GPU else SMALL).to(DTYPE).eval()
    for batch in (1, 64) if GPU else (1,):
        ids_BT = torch.randint(99, (batch, 16), device=DEVICE)
        options = {"do_sample": True, "temperature": 0.8, "min_p": 0.02, "pad_token_id": 0}
        options |= {"cache_implementation": "static"}
        n = 128 if GPU and not SMALLEST else 8
        model.generate(ids_BT, max_new_tokens=n, **options)
        wait()
        start = time.perf_counter()
        model.generate(ids_BT, max_new_tokens=n, **options)
        wait()
        rate = batch * n / (time.perf_counter() - start)
        print(f"generation, batch {batch:2}, static cache {rate:10,.0f} tokens/s", flush=True)


def say(text: str) -> None:
    if ranks.RANK == 0:
        print(text, flush=True)


def several(wanted: list[str]) -> None:
    if GPU:
        torch.cuda.set_device(ranks.RANK)
    if "scaling" in wanted:
        bench_scaling()
    ranks.init_distributed(DEVICE)
    if "largest" in wanted:
        bench_largest()
    ranks.end_distributed()


def bench_scaling() -> None:
    """Under torchrun: each model on one GPU first, then on all, the same batch a GPU or in all."""
    n, batch = ranks.WORLD, BATCH
    models = [name for name in MODELS if name != "dense"][: 1 if SMALLEST else None]
    alone = {}
    for name in models:  # before the ranks meet: nothing is exchanged
        clean()
        model = make(**MODELS[name])
        if GPU:
            compile_blocks(model)
        alone[name] = batch * SHAPE["seq_len"] / seconds(stepper(model, model, batch))
        del model
    ranks.init_distributed(DEVICE)
    say(f"\n{n} x {torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}")
    say("model                way   batch a GPU   tokens/s  efficiency     memory  communication")
    for name in models:
        say(f"{name:20} alone {batch:11} {alone[name]:10,.0f}")
    for size in (batch, batch // n):  # weak scaling, then strong: the same batch in all
        for name in models:
            for fsdp in (False, True):
                clean()
                rate, share = scaled(name, fsdp, size)
                say(
                    f"{name:20} {'FSDP2' if fsdp else 'DDP':5} {size:11} {rate:10,.0f} "
                    f"{rate / n / alone[name]:10.2f} {peak_memory():>10} {share:>10}"
                )


def bench_largest() -> None:
    """Under torchrun: a model that FSDP2 trains on these GPUs and that one of them can't hold."""
    shape = {"dim": 1024, "n_layers": 24, "n_heads": 16, "n_kv_heads": 8, "hidden_dim": 1408}
    shape |= {"n_experts": 32 * ranks.WORLD}
    if not GPU:
        shape |= {"dim": 128, "n_heads": 2, "n_kv_heads": 2, "n_experts": 4}
    if SMALLEST:
        shape |= {"n_layers": 1, "hidden_dim": 64}
    settings = train.TrainConfig(device=DEVICE, dtype=SETTINGS.dtype, fsdp=True)
    clean()
    model = make("meta", **shape)
    total, active = lamoe.count_parameters(model)["all"]
    model.to = lambda device: model.to_empty(device=device)
    parallel, c = ranks.parallelize(model, settings), model.config
    with torch.no_grad():
        model.cos, model.sin = (t.to(DEVICE) for t in lamoe.rope_table(64, c.seq_len, c.rope_theta))
        for weight in model.parameters():
            weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(1.0)
    step = stepper(model, parallel, 4)
    rate = 4 * c.seq_len * ranks.WORLD / seconds(step, min(3, ROUNDS), 1)
    say(
        f"largest: {total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active, batch 4 a GPU: "
        f"{rate:,.0f} tokens/s, memory {peak_memory()} a GPU; with gradients and moments it takes "
        f"{16 * total / 2**30:.3g} GiB in all"
    )


def scaled(name: str, fsdp: bool, size: int) -> tuple[float, str]:
    """(tokens/s of all ranks, time in NCCL kernels over the time of a step, overlapped or not)."""
    model = make("cpu" if fsdp else DEVICE, **MODELS[name])
    settings = train.TrainConfig(device=DEVICE, dtype=SETTINGS.dtype, fsdp=fsdp)
    parallel = ranks.parallelize(model, settings)
    if GPU:
        compile_blocks(model)
    step = stepper(model, parallel, size)
    took = seconds(step)
    rate = size * SHAPE["seq_len"] * ranks.WORLD / took
    if not GPU:
        return rate, "-"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        wait()
    kernels = [e for e in profile.key_averages() if "ncclDevKernel" in e.key]
    talking = sum(e.self_device_time_total for e in kernels) / 1e6
    return rate, f"{talking / took:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = ["train", "equal", "routers", "layer", "generate", "peers"]
    several_gpus = ["scaling", "largest"]
    parser.add_argument("tables", nargs="*", help=", ".join([*tables, *several_gpus]))
    parser.add_argument("--smallest", action="store_true", help="to see whether it runs")
    wanted = parser.parse_args().tables or tables
    if unknown := {*wanted} - {*tables, *several_gpus}:
        parser.error(f"no such table: {', '.join(unknown)}")
    if "scaling" in wanted or "largest" in wanted:
        return several(wanted)
    where = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    peak, bandwidth = ceilings()
    print(f"{where}, torch {torch.__version__}")
    print(f"matrix product {peak / 1e12:.2f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    if "train" in wanted:
        bench_train(peak)
    if "equal" in wanted:
        bench_equal()
    if "routers" in wanted:
        bench_routers()
    if "layer" in wanted:
        bench_layer(peak)
    if "generate" in wanted:
        bench_generate(bandwidth)
    if "peers" in wanted:
        bench_peers()


if __name__ == "__main__":
    main()
