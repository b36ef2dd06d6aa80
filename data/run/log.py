"""The log of a run: sums over steps on the device, rows in csv files and, if asked, in mlflow.

log.csv and load.csv are plain tables that survive a crash: an incomplete line is left out, and a
run that goes on cuts off the rows after the checkpoint it goes on from.
"""

import csv
import io
import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import lamoe
from data.run import ranks
from data.run.files import first_free, write_text
from data.run.routers import run_and_router

COLUMNS = "step tokens flops train_loss val_loss val_bits_per_byte lr grad_norm".split()
COLUMNS += "aux balance z load_max_over_mean load_min_over_mean dead_experts dropped".split()
COLUMNS += ["tokens_per_s", "seconds"]


def print_line(text: str) -> None:
    """A line for a person, over what print_in_place left on it. Only rank 0 prints."""
    if ranks.RANK == 0:
        print(f"{text:79}", flush=True)


def print_in_place(text: str) -> None:
    """A line that the next one replaces; for a terminal only."""
    if ranks.RANK == 0 and sys.stdout.isatty():
        print(f"{text[:79]:79}", end="\r", flush=True)


class Meter:
    """Sums since the last row of the log, kept on the device: reading them waits for a GPU."""

    def __init__(self, model: lamoe.LaMoE):
        c, device = model.config, model.embed.weight.device
        self.layers = model.sparse_layers
        # micro-steps, loss, aux, dropped, the last gradient norm, and z, a part of aux
        self.scalars = torch.zeros(6, device=device)
        self.load = torch.zeros(len(self.layers), c.n_experts, device=device)

    @torch.no_grad()
    def add(self, out: lamoe.Output) -> None:
        """Counts a micro-step."""
        one = torch.ones_like(out.loss)
        self.scalars[:4] += torch.stack([one, out.loss, out.aux, out.dropped])
        self.scalars[5] += out.z
        self.load += out.load  # already that of all ranks

    def add_norm(self, norm: torch.Tensor) -> None:
        """Keeps the norm of a step's gradient; one that is not finite makes the next row NaN."""
        self.scalars[4] = norm
        self.scalars[1] += torch.where(norm.isfinite(), 0.0, math.nan)

    def is_finite(self) -> bool:
        """Whether all losses and gradients since the last row were finite."""
        return bool(self.scalars[1].isfinite())

    def row(self) -> dict:
        """Columns of the log; a dense model has no load."""
        n, loss, aux, dropped, norm, z = lamoe.global_mean(self.scalars).tolist()
        row = {"train_loss": loss / n, "aux": aux / n, "dropped": dropped / n, "grad_norm": norm}
        row |= {"balance": (aux - z) / n, "z": z / n}
        if self.load.numel():
            share = self.share()
            row["load_max_over_mean"] = share.max().item()
            row["load_min_over_mean"] = share.min().item()
            row["dead_experts"] = int((share < 0.01).sum())
        return row

    def share(self) -> torch.Tensor:
        """The load of each layer's experts, (layers, E); 1 is an equal share."""
        return self.load / self.scalars[0] * self.load.shape[1]

    def reset(self) -> None:
        self.scalars.zero_()
        self.load.zero_()


class Log:
    """Where rows go: log.csv, load.csv, the terminal, and the tracker. Only rank 0 writes.

    Beside them, config.json has every setting, those that nobody gave too.
    """

    def __init__(self, run):
        self.run, self.usual_loss, self.before = run, None, dict(run.done)
        self.best_speed = 0.0  # [tokens per second]
        self.labels = labels_of_bytes(run.data)
        self.flops_per_token = lamoe.flops_per_token(run.model)
        if ranks.RANK == 0:
            names, step = run.data.corpus.sources, run.done["step"]
            sources = [f"val_bpb_{name}" for name in names if len(names) > 1]
            recall = ["val_recall_bits"] if run.data.corpus.floor else []
            experts = [str(e) for e in range(run.model.config.n_experts)]
            self.rows = Table(run.folder / "log.csv", step, COLUMNS + recall + sources)
            self.loads = Table(run.folder / "load.csv", step, ["step", "layer", *experts])
            settings = {**asdict(run.settings), **asdict(run.model.config)}
            write_text(run.folder / "config.json", json.dumps(settings, indent=1) + "\n")

    def begin(self, score) -> None:
        """The row of step 0, by an evaluation alone: what the model knows before it learns.

        That is the logarithm of the vocabulary, unless the model was trained before.
        """
        nothing = {"step": 0, "tokens": 0, "flops": 0.0, "lr": 0.0, "seconds": 0.0}
        row = nothing | columns_of_score(score, self.run.data)
        if ranks.RANK == 0:
            self.rows.write(row)
            self.run.tracker.log(row)
        print_line(
            f"start      loss {score.loss:.3f}, {score.bits_per_byte:.4f} bits/byte of validation"
        )

    def add(self, row: dict) -> None:
        """Completes a row and passes it on; the meter starts again at zero."""
        run, settings, step = self.run, self.run.settings, row["step"]
        tokens = settings.batch_size * settings.grad_accum * run.model.config.seq_len
        seconds = run.done["seconds"] - self.before["seconds"]
        speed = (step - self.before["step"]) * tokens / seconds
        row |= {"tokens": step * tokens, "tokens_per_s": speed, "seconds": run.done["seconds"]}
        row["flops"] = float(step * tokens * self.flops_per_token)
        self.before = dict(run.done)
        if ranks.RANK == 0:
            self.rows.write(row)
            for layer, shares in zip(run.meter.layers, run.meter.share().tolist(), strict=True):
                of_expert = {str(e): share for e, share in enumerate(shares)}
                self.loads.write({"step": step, "layer": layer, **of_expert})
            run.tracker.log(row)
            show_row(row, settings, run.data.corpus.floor)
        self.usual_loss = warn_of_spike(row, self.usual_loss, settings)
        self.best_speed = warn_of_slowness(speed, self.best_speed, run)
        run.meter.reset()

    def flush(self) -> None:
        """To the disk: before a checkpoint, or a resume from it would leave a gap in the log."""
        if ranks.RANK == 0:
            self.rows.flush()
            self.loads.flush()


def show_row(row: dict, settings, floor: float | None) -> None:
    """A row of the log; one without an evaluation is replaced by the next."""
    left = (settings.steps - row["step"]) * row["seconds"] / row["step"]
    line = f"step {row['step']:5}/{settings.steps}  loss {row['train_loss']:.3f}"
    if "load_max_over_mean" in row:
        line += f"  load {row['load_max_over_mean']:.2f}"
    line += f"  {row['tokens_per_s']:,.0f} tokens/s  {int(left // 60)}:{int(left % 60):02} left"
    if "val_bits_per_byte" not in row:
        return print_in_place(line)
    line += f"  validation {row['val_bits_per_byte']:.3f} bits/byte"
    print_line(line + (f" (floor {floor:.3f})" if floor else ""))
    if sources := [f"{k[8:]} {v:.3f}" for k, v in row.items() if k.startswith("val_bpb_")]:
        print_line("           " + "  ".join(sources))


def warn_of_spike(row: dict, usual: float | None, settings) -> float:
    """Says so if a row's loss is far above the usual one; returns the new usual: a running mean."""
    loss, usual = row["train_loss"], row["train_loss"] if usual is None else usual
    if loss > 1.5 * usual and loss > usual + 0.5:
        print_line(
            f"spike      the loss at step {row['step']} is {loss:.2f} and was about {usual:.2f}; "
            f"if it stays there, start anew with --lr {settings.lr / 2:.1g}"
        )
    return 0.8 * usual + 0.2 * loss


def warn_of_slowness(speed: float, best: float, run) -> float:
    """Says so if tokens per second fell to a quarter of the best; returns the new best."""
    if run.settings.device != "cpu" or speed > best / 4:
        return max(speed, best)
    print_line(
        f"slow       {speed:,.0f} tokens/s, and it was {best:,.0f}: another program uses this CPU; "
        f"stop it, or leave it a core: OMP_NUM_THREADS={max(1, torch.get_num_threads() - 1)} "
        f"python train.py --resume --out {run_and_router(run.folder, run.model.config.router)}"
    )
    return speed  # said again only after another fall


def columns_of_score(score, data) -> dict:
    """What an evaluation adds to a row."""
    row = {"val_loss": score.loss, "val_bits_per_byte": score.bits_per_byte}
    if data.corpus.floor:
        row["val_recall_bits"] = recall_bits(score, data.corpus)
    return row | {f"val_bpb_{name}": bits for name, bits in by_source(score, data).items()}


def labels_of_bytes(data):
    """What `evaluate` tells apart: the kinds of a drawn corpus, else the sources of a mixture."""
    return data.source_of_byte if data.corpus.kind_of_byte is None else data.corpus.kind_of_byte


def recall_bits(score, corpus) -> float:
    """What a name or thing to be recalled costs, or a fact: the mean over a drawn corpus [bits]."""
    mentions = np.count_nonzero(np.diff((corpus.kind_of_byte == 2).astype(int)) == 1)
    return float(score.bits_of_label[2] / mentions)  # 2: "recall", see datasets.KINDS


def by_source(score, data) -> dict:
    """{source: bits per byte}, if the score has the bits of each source."""
    if data.source_of_byte is None:
        return {}
    n_bytes = np.bincount(data.source_of_byte, minlength=len(data.corpus.sources))
    names = enumerate(data.corpus.sources)  # of some, no text may be held out for validation
    return {name: score.bits_of_label[i] / n_bytes[i] for i, name in names if n_bytes[i]}


class Table:
    """A csv file; on resume, rows after `step` and an incomplete one are removed.

    It is opened for each row: an editor that saves the file puts another one in its place.
    """

    def __init__(self, path: Path, step: int, columns: list[str]):
        rows, text = rows_until(step, path) if step else [], io.StringIO(newline="")
        # A source whose file has another name by now keeps what was logged of it, too.
        columns = [*columns, *(name for name in (rows or [{}])[0] if name not in (*columns, None))]
        self.path, self.columns = path, columns
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())

    def write(self, row: dict) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if not file.tell():  # somebody deleted it
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})

    def flush(self) -> None:
        with open(self.path, "a") as file:
            os.fsync(file.fileno())


def rows_until(step: int, path: Path) -> list[dict]:
    """The rows of a log up to a step; where one can't be read, those before it, and a copy.

    After a power cut, anything may stand behind the rows that were flushed.
    """
    rows = []
    try:
        for row in read_rows(path):
            if None in row.values() or int(row["step"]) > step:  # None: it is too short
                break
            rows.append(row)
        if not rows and path.exists() and b"\n" not in path.read_bytes():
            raise ValueError("not even the names of its columns are a line")
    except (KeyError, TypeError, ValueError, csv.Error):
        copy = first_free(f"{path}.old")
        shutil.copy(path, copy)
        print_line(f"resume     {path} has a row that can't be read; all of it is kept as {copy}")
    return rows


def read_rows(path: Path):
    """Yields the rows of a csv, if it is there. The last line is left out unless it is complete."""
    if path.exists():
        # -sig: a spreadsheet may have saved it, with a mark at its head.
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            yield from csv.DictReader(io.StringIO(file.read().rpartition("\n")[0]))


class Tracker:
    """--track mlflow: configuration, log, picture and checkpoint, kept there too.

    What goes wrong before the training is an error. What goes wrong later is said, and the run goes
    on without it: log.csv has everything.
    """

    def __init__(self, name: str):
        self.mlflow = None
        if name == "mlflow" and ranks.RANK == 0:
            try:
                import mlflow
            except ImportError:
                raise ValueError('--track mlflow needs it: pip install -e ".[track]"') from None
            self.mlflow = mlflow

    def start(self, run) -> None:
        """Goes on with the run that `done` names, else begins one and names it there."""
        if not self.mlflow:
            return
        try:
            if "MLFLOW_TRACKING_URI" not in os.environ:  # a folder here: no server needed
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones ask for it
                self.mlflow.set_tracking_uri(Path("mlruns").resolve().as_uri())
            self.mlflow.set_experiment("lamoe")
            id_ = run.done.get("mlflow")
            theirs = self.mlflow.start_run(run_id=id_, run_name=run.folder.name)
            if not id_:
                self.mlflow.log_params({**asdict(run.settings), **asdict(run.model.config)})
        except Exception as error:  # each of mlflow's stores fails in its own way
            reason = " ".join(f"{error}".split())[:300]
            raise ValueError(f"mlflow: {reason}; leave out --track, or mend it") from None
        run.done["mlflow"] = theirs.info.run_id

    def log(self, row: dict) -> None:
        if self.mlflow:
            metrics = {name: float(value) for name, value in row.items() if name != "step"}
            self.attempt("log_metrics", metrics, step=row["step"])

    def end(self, folder: Path) -> None:
        for name in ("log.csv", "load.csv", "loss.png", "best.pt"):
            if (folder / name).exists():
                self.attempt("log_artifact", str(folder / name))
        self.attempt("end_run")

    def attempt(self, action: str, *arguments, **named) -> None:
        """Calls one of mlflow's functions, unless one has failed before."""
        try:
            if self.mlflow:
                getattr(self.mlflow, action)(*arguments, **named)
        except Exception as error:  # as above
            reason = " ".join(f"{error}".split())[:300]
            print_line(f"track      mlflow: {reason}; going on without it")
            self.mlflow = None
