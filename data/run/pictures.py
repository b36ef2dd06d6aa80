"""Pictures of runs, drawn from log.csv and load.csv alone: they can be drawn again at any time."""

import csv
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.run import checkpoint
from data.run.log import read_rows

AXES = ("step", "seconds")
RIGHT = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "color": "C3"}
RIGHT |= {"fontsize": "small"}
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
    """loss.png of a run: the loss, the balance, and the load of each expert over time.

    The file says in words what it shows (its "Description"), for those who can't see it.
    """
    pyplot = import_pyplot()
    rows, loads = (list(read_rows(folder / name)) for name in ("log.csv", "load.csv"))
    train, scored, val = bits_per_byte(rows)
    rows = trained(rows)
    lines = len(loads) * (len(loads[0]) - 2) // len(rows) if loads else 0  # layers x experts
    heights = [3.6, min(6.0, 1.2 + 0.12 * lines)] if loads else [3.6]
    figure = pyplot.figure(figsize=(10, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    left = figure.add_subplot(grid[0, 0] if loads else grid[0, :])
    steps = [int(row["step"]) for row in rows]
    left.plot(steps, above(train, floor), color="0.6", linewidth=1, label="training")
    marks = {"color": "C0", "label": f"validation, at its best {min(val):.3f}"}
    left.plot([int(row["step"]) for row in scored], above(val, floor), "o-", **marks)
    scale_loss(left, min(val), floor)
    left.set(xlabel="step", title="Loss")
    left.legend()
    alt = f"Validation loss over {steps[-1]} steps, at its best {min(val):.3f} bits per byte"
    alt += "" if floor is None else f", {min(val) - floor:.4f} above the floor"
    if loads:
        right = figure.add_subplot(grid[0, 1])
        for column, name in (("load_max", "busiest"), ("load_min", "idlest")):
            found = [row.get(f"{column}_over_mean") for row in rows]
            if all(found):  # an older log has no idlest
                right.plot(steps, [float(x) for x in found], label=f"the {name} expert")
        right.axhline(1, color="C3", linestyle="--", label="perfect balance")
        right.set(xlabel="step", ylim=(0, None), title="Load of experts over the mean")
        right.legend()
        draw_loads(figure, figure.add_subplot(grid[1, :]), loads)
        busiest = float(rows[-1]["load_max_over_mean"])
        alt += f"; load of the experts, the busiest {busiest:.2f} times the mean at the end"
    save(figure, folder / "loss.png", alt)
    return folder / "loss.png"


def save(figure, path: Path, alt: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in letters it has none of
        about = {"Description": alt} if path.suffix == ".png" else None
        figure.savefig(path, dpi=120, metadata=about)
    import_pyplot().close(figure)


def above(bits: list[float], floor: float | None) -> list[float]:
    """The loss minus its floor, where that is known; NaN, which is not drawn, at or below it."""
    return bits if floor is None else [b - floor if b > floor else math.nan for b in bits]


def scale_loss(axes, best: float, floor: float | None) -> None:
    """The axis of the loss: from 0 on, or of the distance to a floor, each tenth as high.

    From 0 on, a model 1% above the floor would touch it, and one 0.1% above it look no better.
    """
    if floor is None:
        return axes.set(ylabel="bits per byte", ylim=(0, 3 * best))
    gap = max(best - floor, 1e-5)
    axes.set(ylabel=f"bits per byte above the floor, {floor:.3f}", yscale="log")
    axes.set_ylim(gap / 2, max(3, 4 * gap))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", alpha=0.3)
    for share in (0.1, 0.01, 0.001):  # of the floor
        if gap / 2 < share * floor:
            axes.axhline(share * floor, color="C3", linestyle=":", linewidth=1)
            axes.annotate(f"{100 * share:g}% above it", (0.99, share * floor), **RIGHT)


def trained(rows: list[dict]) -> list[dict]:
    """All but that of step 0, which has a validation alone."""
    return [row for row in rows if row["train_loss"]]


def bits_per_byte(rows: list[dict]) -> tuple[list, list, list]:
    """Training loss of the rows that have one, rows with a validation, and their loss; in bits per
    byte.

    The log has the training loss in nats per token: it is converted as that of the last validation.
    ValueError without one: a log may have lost its rows, and its run goes on.
    """
    scored = [row for row in rows if row["val_loss"]]
    if not scored:
        raise ValueError("no evaluation in the log")
    per_nat = float(scored[-1]["val_bits_per_byte"]) / float(scored[-1]["val_loss"])
    train = [float(row["train_loss"]) * per_nat for row in trained(rows)]
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


class LoggedRun(NamedTuple):
    """A run as --plot sees it."""

    folder: str
    given: dict  # the flags it was started with, but its seed
    settings: dict  # all of them
    floor: float | None
    rows: list[dict]  # of its log


def read_run(folder: str) -> LoggedRun:
    """What there is of a run; ValueError if it has no log with an evaluation in it."""
    try:
        rows = list(read_rows(Path(folder) / "log.csv"))
        bits_per_byte(rows)
        for row in rows:
            row |= {x: float(row[x]) for x in AXES}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{folder}/log.csv: {error}; name the folder of a run") from None
    try:
        saved = checkpoint.read(Path(folder) / "best.pt")
        settings = {**saved["train_config"], **saved["config"]}
        given = {**saved["given"], "steps": settings["steps"]}  # it may have been made longer
        given.pop("seed", None)
        return LoggedRun(folder, given, settings, saved.get("floor"), rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # gone, or not of a run
        return LoggedRun(folder, {"run": folder}, {}, None, rows)


def group(runs: list[LoggedRun]) -> dict[str, list[LoggedRun]]:
    """{name: runs that differ in their seed alone}; the name is what differs between groups."""
    alike = {}
    for run in runs:
        alike.setdefault(repr(sorted(run.given.items())), []).append(run)
    known = [members[0] for members in alike.values() if members[0].settings]
    flags = sorted({flag for run in known for flag in run.given})
    named = {}
    for members in alike.values():
        differing = (f for f in flags if len({repr(run.settings.get(f)) for run in known}) > 1)
        values = ((flag, members[0].settings.get(flag)) for flag in differing)
        name = ", ".join(f"{flag} {'none' if value == '' else value}" for flag, value in values)
        if not members[0].settings or not name or name in named:
            name = ", ".join(run.folder for run in members)
        named[name] = members
    return named


def plot(folders: list[str], out: str) -> Path:
    """One picture of several runs: bits per byte against steps and against seconds.

    Runs that differ in their seed alone are one line, their mean, in a band from lowest to highest.
    """
    folders = dict.fromkeys(f"{Path(folder)}" for folder in folders)  # twice the same is no seed
    pyplot, runs = import_pyplot(), [read_run(folder) for folder in folders]
    floors = {run.floor for run in runs}
    floor = floors.pop() if len(floors) == 1 else None
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    lowest, highest, groups = math.inf, 0.0, group(runs)
    for i, (name, members) in enumerate(groups.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": "osD^vPX"[i % 7]}
        scored = [bits_per_byte(run.rows)[1] for run in members]
        steps = sorted(set.intersection(*({row["step"] for row in rows} for rows in scored)))
        if not steps:
            raise ValueError(f"{name}: its seeds were never evaluated at the same step")
        at = [[row for row in rows if row["step"] in steps] for rows in scored]
        bits = np.array([[float(row["val_bits_per_byte"]) for row in rows] for rows in at])
        best = [min(bits_per_byte(run.rows)[2]) for run in members]
        lowest, highest = min(lowest, *best), max(highest, *best)
        # A $ would begin a formula, and a label that begins with _ would be left out.
        shown = " " * name.startswith("_") + name.replace("$", r"\$")
        label = f"{shown}: {np.mean(best):.3f}"
        if len(members) > 1:
            label += f" ({min(best):.3f} to {max(best):.3f}, {len(members)} seeds)"
        for ax, x in zip(axes, AXES, strict=True):
            for run in members:
                train = above(bits_per_byte(run.rows)[0], floor)
                at_x = [row[x] for row in trained(run.rows)]
                ax.plot(at_x, train, color=style["color"], alpha=0.3, lw=1)
            xs = np.mean([[row[x] for row in rows] for rows in at], axis=0)
            ax.plot(xs, above(bits.mean(0), floor), label=label, **style)
            if len(members) > 1:
                band = (above(bits.min(0), floor), above(bits.max(0), floor))
                ax.fill_between(xs, *band, color=style["color"], alpha=0.15, lw=0)
            ax.set(xlabel=x)
    for ax in axes:
        scale_loss(ax, lowest, floor)
        if floor is None:
            ax.set_ylim(0, 1.6 * highest)
    axes[1].set(ylabel="")
    named, title = axes[0].get_legend_handles_labels(), "validation, at its best (pale: training)"
    figure.legend(*named, loc="outside upper left", title=title)
    path = Path(out or "plot.png")
    path = path / "plot.png" if path.is_dir() else path
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        path = path.with_name(f"{path.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path, f"Validation loss of {len(runs)} runs: {'; '.join(groups)}")
    return path


def sparkline(values: list[float], width: int = 60) -> str:
    """The values as a line of text, first to last: means of at most `width` groups of them.

    >>> sparkline([3.0, 2.0, 1.0])
    '█▄▁'
    """
    groups = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    low, span = min(groups), max(groups) - min(groups) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (v - low) / span)] for v in groups)
