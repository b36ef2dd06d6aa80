"""Repeats the README's comparison of sparse and dense models, on anyone's text.

    python tests/results.py sparse --data FOLDER           on a GPU: 15 minutes for each seed
    python tests/results.py facts --minutes 2 --seeds 5    on a laptop: facts learned by heart

Each model trains for the same time: a short run measures its speed, which gives its number of
steps, so that its rates end at zero as the time ends. `sparse` then trains the sparse model once
more, for two thirds of the time, which is where the dense model's last loss should be reached.
Nothing is skipped that is there already: a run that was stopped goes on. Writes OUT/results.png.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = "--vocab_size 8192 --dim 512 --n_layers 8 --n_heads 8 --n_kv_heads 8 --seq_len 512 "
TEXT += "--batch_size 128 --lr 4e-3 --muon_lr 0.04 --muon_ffn --weight_decay 0.1"
# name: (flags of the text, {model: (its flags, shares of the time)})
CASES = {
    "sparse": (
        TEXT,
        {
            "dense": ("--n_experts 1 --hidden_dim 1536", [1]),
            "sparse": (
                "--n_experts 32 --top_k 2 --hidden_dim 512 --n_shared_experts 1",
                [1, 2 / 3],
            ),
        },
    ),
    "facts": (
        "--data facts",
        {
            "dense": ("--n_experts 1 --hidden_dim 512", [1]),
            "sparse": ("--n_experts 16 --top_k 2 --hidden_dim 256", [1]),
        },
    ),
}


def log_of(run: Path) -> list[dict]:
    """The rows of training: all but that of step 0."""
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))[1:]


def train(run: Path, flags: list[str], steps: int) -> list[dict]:
    """The log of a run, made, finished or only read."""
    resume = [] if not (run / "last.pt").exists() else ["--resume"]
    flags = [*flags, "--steps", str(steps), "--out", str(run), *resume]
    print(f"$ python train.py {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=True)
    return log_of(run)


def speed(run: Path, flags: list[str]) -> float:
    """Steps per second, by the faster half of a short run."""
    rows = train(run, [*flags, "--log_every", "20"], 200)
    tokens_per_step = int(rows[0]["tokens"]) / int(rows[0]["step"])
    speeds = sorted(float(row["tokens_per_s"]) for row in rows)
    return speeds[len(speeds) * 3 // 4] / tokens_per_step


def compare(case: str, given: list[str], minutes: float, seeds: int, out: Path) -> list[tuple]:
    """(model, seed, [(seconds, bits per byte)] of the evaluations) of each run."""
    common, models = CASES[case]
    common, results = [*common.split(), *given], []
    for model, (flags, shares) in models.items():
        flags = [*common, *flags.split()]
        rate = speed(out / f"{model}-speed", flags)
        for share in shares:
            for seed in range(seeds):
                steps = max(20, round(60 * minutes * share * rate))
                name = f"{model}-{share * minutes:.3g}-minutes-{seed}"
                every = ["--seed", str(seed), "--eval_every", str(-(-steps // 14))]
                rows = train(out / name, [*flags, *every], steps)
                curve = [
                    (float(row["seconds"]), float(row["val_bits_per_byte"]))
                    for row in rows
                    if row["val_bits_per_byte"]
                ]
                results.append((f"{model}, {share * minutes:.3g} minutes", seed, curve))
    return results


def draw(results: list[tuple], path: Path) -> None:
    """Bits per byte against seconds; a star where a run ends. Needs matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print('picture    none: install matplotlib for it: pip install -e ".[plot]"')
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours = {"dense": "tab:grey", "sparse": "tab:orange"}
    for name, seed, curve in results:
        seconds, bits = zip(*curve, strict=True)
        colour, style = (
            colours[name.split(",")[0]],
            "-" if name.endswith(results[0][0][5:]) else ":",
        )
        axes.plot(seconds, bits, style, color=colour, label=None if seed else name)
        axes.plot(seconds[-1], bits[-1], "*", color=colour, markersize=12)
    ends = [curve[-1][1] for name, _, curve in results if name == results[0][0]]
    axes.axhline(sum(ends) / len(ends), color="tab:grey", linewidth=0.8, linestyle="--")
    low = min(curve[-1][1] for *_, curve in results)
    axes.set_ylim(low - 0.02, low + 0.35)
    axes.set(xlabel="seconds of training", ylabel="validation, bits per byte")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"picture    {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=[*CASES])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args, given = parser.parse_known_args()  # the rest, --data too, is for train.py
    if args.case == "sparse" and "--data" not in given:
        parser.error("sparse needs a text: --data FOLDER, of 100 MB or more")
    out = args.out or Path("runs") / args.case
    results = compare(args.case, given, args.minutes, args.seeds, out)
    print(f"\n{'model':24} seed  seconds  bits/byte")
    for name, seed, curve in results:
        print(f"{name:24} {seed:4} {curve[-1][0]:8.1f} {curve[-1][1]:10.4f}")
    draw(results, out / "results.png")


if __name__ == "__main__":
    main()
