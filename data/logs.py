"""What a run leaves to look at: its log, its pictures, and the same in a tracker.

log.csv and load.csv are plain tables that survive a crash: a torn line is left out, and a run that
goes on cuts off the rows after the checkpoint it goes on from. Pictures are drawn from them alone,
so they can be drawn again at any time.
"""

import csv
import io
import os
import shutil
from itertools import chain, count
from pathlib import Path

import numpy as np

from data import tokens


def say(text: str) -> None:
    """A line for a person, over what say_in_place left on it."""
    print(f"{text:79}", flush=True)


def first_free(path: str | Path) -> Path:
    """path, or the first of path-2, path-3, ... that is not there yet."""
    names = chain([f"{path}"], (f"{path}-{i}" for i in count(2)))
    return next(Path(name) for name in names if not Path(name).exists())


class Log:
    """A csv of the run; on resume, rows after `step` and a torn one are removed.

    Opened anew for each row: an editor that saves the file puts another one in its place.
    """

    def __init__(self, path: Path, step: int, columns: list[str]):
        self.path, self.columns = path, columns
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows_until(step, path) if step else [])
        with tokens.replacing(path) as file:
            file.write(text.getvalue().encode())

    def write(self, *rows: dict) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if not file.tell():  # somebody took it away
                writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})

    def flush(self) -> None:
        """To the disk: a checkpoint is never ahead of its log, or a resume would leave a gap."""
        with open(self.path, "a") as file:
            os.fsync(file.fileno())


def rows_until(step: int, path: Path) -> list[dict]:
    """The rows of a log up to a step; where one can't be read, those before it, and a copy.

    After a power cut, anything may stand behind the rows that were flushed.
    """
    rows = []
    try:
        for row in csv_rows(path):
            if None in row.values() or int(row["step"]) > step:  # None: it is too short
                break
            rows.append(row)
    except (KeyError, TypeError, ValueError, csv.Error):
        copy = first_free(f"{path}.old")
        shutil.copy(path, copy)
        say(f"resume     {path} has a row that can't be read; all of it is kept as {copy}")
    return rows


def read_csv(path: Path) -> list[dict]:
    """The rows of a log; none if it isn't there."""
    return list(csv_rows(path))


def csv_rows(path: Path):
    """Yields the rows of a log. A line without its end was torn: left out."""
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            yield from csv.DictReader(io.StringIO(file.read().rpartition("\n")[0]))


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
    """loss.png from log.csv and load.csv."""
    pyplot = import_pyplot()
    rows, loads = read_csv(folder / "log.csv"), read_csv(folder / "load.csv")
    lines = len(loads) * (len(loads[0]) - 2) // len(rows) if loads else 0  # layers x experts
    heights = [3.6, min(6.0, 1.2 + 0.12 * lines)] if loads else [3.6]
    figure = pyplot.figure(figsize=(10, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    left, right = (figure.add_subplot(grid[0, i]) for i in (0, 1))
    steps, train, scored, val = bits_per_byte(rows)
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


def bits_per_byte(rows: list[dict]) -> tuple:
    """Steps and training loss of all rows, rows with a validation, their loss; in bits a byte.

    The log has the training loss in nats a token: it is converted as that of the last validation.
    ValueError without one: a log may have lost its rows, and its run goes on.
    """
    scored = [row for row in rows if row["val_loss"]]
    if not scored:
        raise ValueError("no evaluation in the log")
    per_nat = float(scored[-1]["val_bits_per_byte"]) / float(scored[-1]["val_loss"])
    train = [float(row["train_loss"]) * per_nat for row in rows]
    val = [float(row["val_bits_per_byte"]) for row in scored]
    return [int(row["step"]) for row in rows], train, scored, val


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
    axes.set_yticks(middles, [f"layer {layer}" for layer in range(n_layers)])
    axes.invert_yaxis()
    axes.set(xlabel="step", title=f"Load of the {n_experts} experts of each layer, a line each")
    figure.colorbar(mesh, ax=axes, extend="max", label="1 is an equal share", pad=0.01)


AXES = ("step", "seconds")
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito's


def plot(runs: list[str], out: str) -> Path:
    """One picture of several runs: bits per byte against steps and against seconds."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    top = 0.0
    for i, run in enumerate(runs):
        try:
            rows = read_csv(Path(run) / "log.csv")
            _, train, scored, val = bits_per_byte(rows)
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


class Tracker:
    """--track mlflow: configuration, log, picture and checkpoint, kept there too.

    What goes wrong before the training is an error. What goes wrong later is said, and the run goes
    on without it: log.csv has everything.
    """

    def __init__(self, name: str):
        self.mlflow = None
        if name == "mlflow":
            try:
                import mlflow
            except ImportError:
                raise ValueError('--track mlflow needs it: pip install -e ".[track]"') from None
            self.mlflow = mlflow

    def start(self, parameters: dict, folder: Path, done: dict) -> None:
        """Goes on with the run that `done` names, else begins one and names it there."""
        if not self.mlflow:
            return
        try:
            if "MLFLOW_TRACKING_URI" not in os.environ:  # a folder here: no server needed
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones ask for it
                self.mlflow.set_tracking_uri(Path("mlruns").resolve().as_uri())
            self.mlflow.set_experiment("lamoe")
            run = self.mlflow.start_run(run_id=done.get("mlflow"), run_name=folder.name)
            if "mlflow" not in done:
                self.mlflow.log_params(parameters)
        except Exception as error:  # each of mlflow's stores fails in its own way
            reason = " ".join(f"{error}".split())[:300]
            raise ValueError(f"mlflow: {reason}; leave out --track, or mend it") from None
        done["mlflow"] = run.info.run_id

    def log(self, row: dict) -> None:
        if self.mlflow:
            metrics = {name: float(value) for name, value in row.items() if name != "step"}
            self.attempt(self.mlflow.log_metrics, metrics, step=row["step"])

    def end(self, folder: Path) -> None:
        for name in ("log.csv", "load.csv", "loss.png", "best.pt"):
            if self.mlflow and (folder / name).exists():
                self.attempt(self.mlflow.log_artifact, str(folder / name))
        if self.mlflow:
            self.attempt(self.mlflow.end_run)

    def attempt(self, action, *arguments, **named) -> None:
        try:
            action(*arguments, **named)
        except Exception as error:  # as above
            reason = " ".join(f"{error}".split())[:300]
            say(f"track      mlflow: {reason}; going on without it")
            self.mlflow = None


def lock(folder: Path):
    """An open file that holds the folder for this process; the lock dies with the process.

    Some network file systems have no locks: there nothing is held.
    """
    file = open(folder / "lock", "w")  # noqa: SIM115 - held as long as the run
    try:
        if os.name == "posix":
            tokens.lock(file, wait=False)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if os.name != "posix" or isinstance(error, BlockingIOError):
            raise ValueError(
                f"{folder} is in use by another training run; wait for it, or choose another --out"
            ) from None
    return file
