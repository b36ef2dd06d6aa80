"""Makes the tables and pictures of the README again, by running train.py as anybody would.

    python tests/results.py                                lists them, and how long each takes
    python tests/results.py facts --minutes 3 --seeds 5

A flag that isn't one of --help is for train.py: --device, --data, --dim ... Runs are kept in
runs/NAME, and one that is complete is not run again: a series that was stopped goes on with the
same command. `--only 3` makes the runs of seed 3 alone, so that several processes share a series;
the command without it makes what is missing, and prints and draws.

`facts` and `sparse` compare at equal time: short runs of both sides measure their speeds under the
conditions of the seed's own runs, which gives numbers of steps, so that a run's rates reach zero as
its time ends. The seconds it took in the end are printed.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, median

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data.run.files import write_text  # noqa: E402
from data.run.flags import OneLineParser, number, one_line_errors, quoted  # noqa: E402
from data.run.log import read_rows  # noqa: E402
from data.run.messages import print_picture  # noqa: E402
from data.run.pictures import COLOURS, import_pyplot, read_run, save  # noqa: E402

LIST = """
default   the picture at the head of the README and a row of its quick start; 4 minutes a seed on
          two cores
sparse    "Where sparse wins", the picture; with --data FOLDER, of 100 MB or more, 15 minutes a
          seed on a GPU
speed     "Where sparse wins", the table: tests/bench.py equal; minutes of a GPU
routers   "Results"; its right half with --data, tinyshakespeare there; 40 minutes a seed on two
          cores, and a quarter of an hour for the column of times
facts     facts learned by heart, dense and sparse at equal time; twice --minutes a seed

The tables of tests/README.md: python tests/bench.py, and the commands that stand above them.
"""
# What is trained on, then {side: its experts}: the same active width on both sides.
TIMED = {
    "facts": (  # the model of experiment 2: tests/exercises/README.md
        "--data facts --n_layers 2 --dim 64 --vocab_size 512",
        {
            "dense": "--n_experts 1 --hidden_dim 64",
            "sparse": "--n_experts 8 --top_k 2 --hidden_dim 32",
        },
    ),
    "sparse": (
        "--vocab_size 8192 --dim 512 --n_layers 8 --n_heads 8 --n_kv_heads 8 --seq_len 512 "
        "--batch_size 128 --lr 4e-3 --muon_lr 0.04 --muon_ffn --weight_decay 0.1",
        {
            "dense": "--n_experts 1 --hidden_dim 1536",
            "sparse": "--n_experts 32 --top_k 2 --hidden_dim 512 --n_shared_experts 1",
        },
    ),
}
ROWS = (
    "--n_experts 1 --hidden_dim 512",
    "--n_experts 4",
    "--n_experts 8",
    "--n_experts 32",
    "--n_experts 8 --router noisy",
    "--n_experts 8 --router switch --hidden_dim 512",
    "--n_experts 8 --router deepseek",
)
RECIPE = "--preset laptop --n_layers 4 --lr 4e-3 --weight_decay 0.1"


# --- Runs -----------------------------------------------------------------------------------------


def train(run: Path, *flags: str, **environment: str) -> list[dict]:
    """The log of a run of train.py: made, finished, or only read."""
    words = [word for part in flags for word in shlex.split(part)]
    command, made = shlex.join(["python", "train.py", *words]), Path(f"{run}.command")
    if run.exists() and made.exists() and (other := made.read_text("utf-8")) != command:
        raise ValueError(f"{run} is from another command: {other}; try another --out")
    made.parent.mkdir(parents=True, exist_ok=True)
    write_text(made, command)
    if not is_complete(run):
        print(f"$ {command} --resume --out {quoted(run)}", flush=True)
        script = [sys.executable, str(ROOT / "train.py")]
        words += ["--resume", "--out", str(run)]
        process = subprocess.Popen([*script, *words], env={**os.environ, **environment})
        try:
            failed = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it saves
            raise
        if failed:
            sys.exit(failed)
        if not is_complete(run):
            raise damaged(run)
    return list(read_rows(run / "log.csv"))


def is_complete(run: Path) -> bool:
    """Whether its log goes up to the last step; not if it, or config.json, is gone or damaged."""
    try:
        *_, last = (int(row["step"]) for row in read_rows(run / "log.csv"))
        return last == json.loads((run / "config.json").read_text("utf-8"))["steps"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def damaged(run: Path) -> ValueError:
    return ValueError(f"{run} has lost files, or lines; delete it, and the same command makes it")


def best(rows: list[dict]) -> dict:
    """The row with the best validation."""
    scored = [row for row in rows if row["val_bits_per_byte"]]
    return min(scored, key=lambda row: float(row["val_bits_per_byte"]))


def speed(run: Path, *flags: str, steps: int, **environment: str) -> float:
    """Steps per second, the median of the second half of a short run."""
    every = max(1, steps // 10)
    rows = train(run, *flags, f"--log_every {every} --steps {steps}", **environment)
    tokens = int(rows[-1]["tokens"]) / int(rows[-1]["step"])
    return median(float(row["tokens_per_s"]) for row in rows[len(rows) // 2 :]) / tokens


def spread(values: list[float], digits: int = 3) -> str:
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


# --- Equal time -----------------------------------------------------------------------------------


def timed(args, given: str) -> None:
    """facts, sparse: each side for so many minutes."""
    is_facts = args.case == "facts"
    if not (is_facts or args.data):
        raise ValueError("sparse needs a text of 100 MB or more: --data FOLDER")
    measure = "val_recall_bits" if is_facts else "val_bits_per_byte"
    unit = "bits that a fact still costs" if is_facts else "validation, bits per byte"
    common, sides = TIMED[args.case]
    minutes = {"dense": [args.minutes], "sparse": [args.minutes]}
    if args.sparse_minutes or not is_facts:
        two_thirds = float(f"{args.minutes * 2 / 3:.3g}")
        minutes["sparse"] = dict.fromkeys(args.sparse_minutes or [args.minutes, two_thirds])
    flags = {side: (common, experts, given, vars(args)[side]) for side, experts in sides.items()}
    curves = {}  # {(side, its minutes): [(seconds, bits)] of each seed}
    for seed in args.seeds:
        rates = {
            side: speed(args.out / f"speed-{side}-{seed}", *flags[side], steps=args.speed_steps)
            for side in sides
        }
        for side, of_side in minutes.items():
            for m in of_side:
                steps = max(20, round(60 * m * rates[side]))
                every = f"--seed {seed} --eval_every {-(-steps // 14)} --steps {steps}"
                rows = train(args.out / f"{side}-{m:g}-minutes-{seed}", *flags[side], every)
                points = [(float(r["seconds"]), float(r[measure])) for r in rows if r[measure]]
                curves.setdefault((side, m), []).append(np.array(points).T)
    if args.draws:
        compare(curves, args.minutes, unit, args.out / "results.png")


def compare(curves: dict, minutes: float, unit: str, path: Path) -> None:
    """Prints where the runs end, and when sparse was where dense ends; then the picture."""
    n_seeds = len(curves["dense", minutes])
    print(f"\n{unit}, at the end of the run; seeds: {n_seeds}, mean (lowest to highest)")
    print(f"{'':24} {'seconds':26} bits")
    for (side, m), seeds in curves.items():
        seconds, bits = ([float(curve[i][-1]) for curve in seeds] for i in (0, 1))
        print(f"{f'{side}, {m:g} minutes':24} {spread(seconds, 1):26} {spread(bits)}")
    time, target = np.mean([curve[:, -1] for curve in curves["dense", minutes]], axis=0).tolist()
    for (side, m), seeds in curves.items():
        if side == "sparse":
            reached = [x for curve in seeds if (x := first_below(target, *curve)) is not None]
            text = f"{len(reached)} of {len(seeds)} seeds reach dense's {target:.3f}"
            if reached:
                text += f", after {spread(reached, 1)} seconds, {mean(reached) / time:.2f} of its"
            print(f"sparse, {m:g} minutes: {text}")
    draw(curves, target, unit, path)


def first_below(target: float, seconds, bits) -> float | None:
    """When a curve first is at the target, on a line between its evaluations."""
    for i, value in enumerate(bits):
        if value <= target:
            before = slice(max(0, i - 1), i + 1)
            return float(np.interp(-target, -bits[before], seconds[before]))
    return None


def draw(curves: dict, target: float, unit: str, path: Path) -> None:
    """A line for the mean of a side's seeds in a band, lowest to highest; marks are ends."""
    try:
        pyplot = import_pyplot()
    except ValueError as error:
        return print(f"picture    none: {error}")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, ((side, m), seeds) in enumerate(curves.items()):
        colour, style = COLOURS[side == "sparse"], ":" if i > 1 else "-"
        at = np.linspace(max(s[0] for s, _ in seeds), min(s[-1] for s, _ in seeds), 100)
        bits = np.array([np.interp(at, *curve) for curve in seeds])
        name = f"{side}, {m:g} minutes: {spread([float(b[-1]) for _, b in seeds])}"
        axes.plot(at, bits.mean(0), style, color=colour, label=name)
        axes.fill_between(at, bits.min(0), bits.max(0), color=colour, alpha=0.15, lw=0)
        for seconds, b in seeds:
            axes.plot(seconds[-1], b[-1], "o*"[side == "sparse"], color=colour, markersize=7)
    axes.axhline(target, color=COLOURS[0], linewidth=0.8, linestyle="--")
    late = np.concatenate([b[s > s[-1] / 5] for seeds in curves.values() for s, b in seeds])
    low, high = late.min(), late.max()
    axes.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))  # room for the legend
    axes.set(xlabel="seconds of training", ylabel=unit)
    title = f"mean (lowest to highest) of {len(bits)} seeds" if len(bits) > 1 else "one seed"
    axes.legend(frameon=False, title=f"{title}, at the end")
    save(figure, path, f"{unit}, against seconds: {'; '.join(str(k) for k in curves)}")
    print(f"picture    {path}")


# --- The other cases ------------------------------------------------------------------------------


def routers(args, given: str) -> None:
    """The table "Results": rows of flags, on the stories and on a real text."""
    texts = {"stories (floor 0.386)": ("stories", "--data stories --steps 600")}
    if args.data:
        flags = f"--data {shlex.quote(args.data)} --vocab_size 512 --seq_len 64 --no-muon_ffn"
        flags += " --steps 900"
        path = Path(args.data).resolve()
        texts[path.stem] = path.name, flags
    logs, times = {}, {row: [] for row in ROWS}
    for seed in args.seeds:
        for i, row in enumerate(ROWS):
            for text, (name, flags) in texts.items():
                run = args.out / f"row-{i}-{name}-{seed}"
                log = train(run, RECIPE, row, flags, f"--seed {seed}", given)
                logs.setdefault((row, text), []).append(log)
    if not args.draws:
        return
    for n in range(args.rounds):  # in turn: what else the machine does meets all of them
        for i, row in enumerate(ROWS):
            flags = (RECIPE, row, "--data stories", given, "--device cpu")
            run = args.out / f"row-{i}-time-{n}"
            times[row].append(1 / speed(run, *flags, steps=20, OMP_NUM_THREADS="1"))
    print("\n| flags | time |", *(f"{text} | busiest |" for text in texts))
    print("|---|---|" + "---|---|" * len(texts))
    for row in ROWS:
        ratios = [a / b for a, b in zip(times[row], times[ROWS[0]], strict=True)]
        cells = [f"`{row}`", f"{median(ratios):.2f}" if ratios else ""]
        for text in texts:
            bits = [float(best(log)["val_bits_per_byte"]) for log in logs[row, text]]
            load = [log[-1]["load_max_over_mean"] for log in logs[row, text]]
            cells += [spread(bits), f"{mean(map(float, load)):.2f}" if all(load) else ""]
        print("|", " | ".join(cells), "|")


def default(args, given: str) -> None:
    """A run as the quick start has it: its picture, and what it reached."""
    for seed in args.seeds:
        run = args.out / f"seed-{seed}"
        log = train(run, f"--seed {seed}", given)
        row, floor = best(log), read_run(run).floor
        if floor is None:  # it is in best.pt
            raise damaged(run)
        bits = float(row["val_bits_per_byte"])
        print(
            f"seed {seed}: {bits:.3f} bits per byte, {100 * (bits / floor - 1):.2f}% "
            f"above the floor; a name told before costs {float(row['val_recall_bits']):.3f} bits; "
            f"{float(log[-1]['seconds']):.0f} s of training"
        )
        print_picture(run, floor)


def quoted_flags(text: str) -> str:
    """An argparse type; ValueError where a quote is not closed."""
    shlex.split(text)
    return text


def main() -> None:
    about = __doc__.splitlines()[0]
    parser = OneLineParser("tests/results.py", description=about, allow_abbrev=False)
    cases = {"default": default, "sparse": timed, "routers": routers, "facts": timed}
    parser.add_argument("case", nargs="?", choices=[*cases, "speed"])
    from_1, from_0 = (number(int, lambda n, m=m: n >= m, f"{m} or more") for m in (1, 0))
    minutes = number(float, lambda m: 0 < m < 1e6, "above 0")
    parser.add_argument("--seeds", type=from_1, default=0, help="how many (5; default: 1)")
    parser.add_argument("--only", type=from_0, help="the runs of this seed alone, and no picture")
    parser.add_argument("--minutes", type=minutes, default=5, help="for each run of facts, sparse")
    parser.add_argument("--sparse_minutes", type=minutes, nargs="+", help="for the sparse runs")
    for side in ("dense", "sparse"):
        what = f'flags of the {side} side alone: --{side}="--lr 4e-3 --muon_lr 0.02"'
        parser.add_argument(f"--{side}", default="", metavar="FLAGS", type=quoted_flags, help=what)
    parser.add_argument("--data", help="a text, for sparse and routers")
    parser.add_argument("--rounds", type=from_0, default=7, help="of the timing, for routers")
    parser.add_argument("--speed_steps", type=from_1, default=100, help="of a run to measure speed")
    parser.add_argument("--out", type=Path, help="folder of the runs (runs/NAME)")
    args, given = parser.parse_known_args()
    if not args.case:
        return print(LIST.strip())
    if args.case == "speed":
        sys.exit(subprocess.call([sys.executable, str(ROOT / "tests/bench.py"), "equal", *given]))
    if args.data and args.case not in ("sparse", "routers"):
        parser.error(f"--data is for sparse and routers; {args.case} has a text of its own")
    words = {word.partition("=")[0] for word in shlex.split(f"{args.dense} {args.sparse}") + given}
    of_time = {"--steps", "--eval_every"} if cases[args.case] is timed else set()
    if own := words & {"--seed", *of_time}:
        parser.error(f"{min(own)} is set here, by --seeds, --only or --minutes; leave it out")
    n, args.draws = args.seeds or (1 if args.case == "default" else 5), args.only is None
    args.seeds = range(n) if args.draws else [args.only]
    args.out = args.out or Path("runs") / args.case
    if args.data and args.case != "routers":
        given += ["--data", args.data]
    cases[args.case](args, shlex.join(given))


if __name__ == "__main__":
    with one_line_errors(stopped="stopped; runs go on with the same command"):
        main()
