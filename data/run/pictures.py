"""Pictures of runs, drawn from log.csv and load.csv alone: they can be drawn again at any time."""

import csv
from pathlib import Path

import numpy as np

from data.run.log import read_rows

AXES = ("step", "seconds")
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito's


def import_pyplot():
    """matplotlib's pyplot, drawing into files; ValueError says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError('install matplotlib for it: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(folder: Path, floor: float | None) -> Path:
    """loss.png of a run: the loss, the balance, and the load of each expert over time."""
    pyplot = import_pyplot()
    rows, loads = (list(read_rows(folder / name)) for name in ("log.csv", "load.csv"))
    lines = len(loads) * (len(loads[0]) - 2) // len(rows) if loads else 0  # layers x experts
    heights = [3.6, min(6.0, 1.2 + 0.12 * lines)] if loads else [3.6]
    figure = pyplot.figure(figsize=(10, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    left, right = (figure.add_subplot(grid[0, i]) for i in (0, 1))
    train, scored, val = bits_per_byte(rows)
    steps = [int(row["step"]) for row in rows]
    left.plot(steps, train, color="0.6", linewidth=1, label="training")
    left.plot([int(row["step"]) for row in scored], val, "o-", color="C0", label="validation")
    if floor is not None:
        left.axhline(floor, color="C3", linestyle="--", label=f"floor {floor:.3f}")
        left.annotate(
            f"{val[-1]:.3f}", (steps[-1], val[-1]), (0, 8), textcoords="offset points", ha="right"
        )
    left.set(xlabel="step", ylabel="bits per byte", ylim=(0, 3 * min(val)), title="Loss")
    left.legend()
    right.plot(steps, [float(row["load_max_over_mean"] or 1) for row in rows], color="C0")
    right.axhline(1, color="C3", linestyle="--", label="perfect balance")
    right.set(xlabel="step", ylim=(0, None), title="Load of the busiest expert over the mean")
    right.legend()
    if loads:
        draw_loads(figure, figure.add_subplot(grid[1, :]), loads)
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
    return folder / "loss.png"


def bits_per_byte(rows: list[dict]) -> tuple[list, list, list]:
    """Training loss of all rows, rows with a validation, and their loss; in bits per byte.

    The log has the training loss in nats per token: it is converted as that of the last validation.
    ValueError without one: a log may have lost its rows, and its run goes on.
    """
    scored = [row for row in rows if row["val_loss"]]
    if not scored:
        raise ValueError("no evaluation in the log")
    per_nat = float(scored[-1]["val_bits_per_byte"]) / float(scored[-1]["val_loss"])
    train = [float(row["train_loss"]) * per_nat for row in rows]
    return train, scored, [float(row["val_bits_per_byte"]) for row in scored]


def draw_loads(figure, axes, loads: list[dict]) -> None:
    """A line for each expert of each layer: its share of the choices over time.

    The colours grow evenly brighter: they can be told apart in grey and by colour-blind eyes.
    """
    steps = sorted({int(row["step"]) for row in loads})
    n_layers, n_experts = len(loads) // len(steps), len(loads[0]) - 2
    share = [[float(row[str(e)]) for e in range(n_experts)] for row in loads]
    share = np.array(share).reshape(len(steps), n_layers * n_experts)
    mesh = axes.pcolormesh(
        [0, *steps], range(n_layers * n_experts + 1), share.T, cmap="cividis", vmin=0, vmax=2
    )
    for layer in range(1, n_layers):
        axes.axhline(layer * n_experts, color="white", linewidth=3)
    middles = [(layer + 0.5) * n_experts for layer in range(n_layers)]
    axes.set_yticks(middles, [f"layer {row['layer']}" for row in loads[:n_layers]])
    axes.invert_yaxis()
    axes.set(xlabel="step", title=f"Load of the {n_experts} experts of each layer, a line each")
    figure.colorbar(mesh, ax=axes, extend="max", label="1 is an equal share", pad=0.01)


def plot(runs: list[str], out: str) -> Path:
    """One picture of several runs: bits per byte against steps and against seconds."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    top = 0.0
    for i, run in enumerate(runs):
        try:
            rows = list(read_rows(Path(run) / "log.csv"))
            train, scored, val = bits_per_byte(rows)
            xs = {x: [[float(r[x]) for r in of] for of in (rows, scored)] for x in AXES}
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{run}/log.csv: {error}; name the folder of a run") from None
        top = max(top, 1.6 * min(val))
        style = {"color": COLOURS[i % len(COLOURS)], "marker": "osD^vPX"[i % 7]}
        for ax, (name, (all_x, scored_x)) in zip(axes, xs.items(), strict=True):
            ax.plot(all_x, train, color=style["color"], alpha=0.3, lw=1)
            ax.plot(scored_x, val, label=f"{run}: {min(val):.3f}", **style)
            ax.set(xlabel=name, ylim=(0, top))
    axes[0].set(ylabel="bits per byte")
    axes[0].legend(title="validation, at its best (pale: training)")
    path = Path(out or "plot.png")
    path = path if path.suffix else path.with_suffix(".png")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def sparkline(values: list[float], width: int = 60) -> str:
    """The values as a line of text, first to last: means of at most `width` groups of them.

    >>> sparkline([3.0, 2.0, 1.0])
    '█▄▁'
    """
    groups = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    low, span = min(groups), max(groups) - min(groups) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (v - low) / span)] for v in groups)
