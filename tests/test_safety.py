"""Nothing is lost, nothing is executed: a little of each campaign of tests/torture.py."""

import errno
import math
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import random_model, small_config
from tiny_run import TINY, at_training_step, call, press_ctrl_c

import train
from data.run import checkpoint, files, log, machine, ranks, storage

if sys.platform != "linux":
    pytest.skip("forks, /proc and signals of Linux", allow_module_level=True)

import torture

CADENCE = "--steps 20 --log_every 3 --eval_every 4 --save_every 5".split()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What the run leaves that nobody disturbs."""
    return torture.straight_run(tmp_path_factory.mktemp("straight") / "in")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return torture.make_good(tmp_path_factory.mktemp("good") / "in")


def start(*flags):
    return call(train, "--data", "text.txt", "--out", "run", *TINY, *flags)


# ---------------------------------------------------------------------------------------------
# Kill -9, power cuts, full disks
# ---------------------------------------------------------------------------------------------


def test_a_run_killed_at_random_moments_ends_as_if_nobody_had(tmp_path, straight):
    """The patience is far below the time of a run, and grows: some kills, and an end."""
    kills = torture.random_kills(tmp_path / "run", straight, torture.FLAGS, random.Random(0), 0.1)
    assert kills > 0


def test_a_run_killed_at_any_write_flush_or_rename_goes_on(tmp_path, straight):
    n = len(torture.events(tmp_path / "events"))
    assert n > 100
    for at in range(1, n + 1, 26):
        torture.kill_at(tmp_path / f"{at}", at, straight)


def test_after_a_power_cut_what_was_saved_is_there_and_whole(tmp_path, straight):
    cuts = torture.power_cuts(tmp_path / "run")
    least = [cut for cut in cuts if "least" in cut.name]
    most = [cut for cut in cuts if "most" in cut.name]
    assert len(cuts) > 100 and {cut.name[-2:] for cut in least} == {"-0", "-3", "-6", "-9", "12"}
    for cut in [*least[::4], least[-1], *most[::25], most[-1]]:
        torture.check_cut(cut, straight)


LEFT_OUT = {
    "the flush of a folder's entries": (files, "flush_folder", lambda folder: None),
    "the flush of the run's own entry": (
        storage,
        "make_folder",
        lambda run: run.mkdir(exist_ok=True),
    ),
    "the flush of the logs": (log.Log, "flush", lambda log: None),
}


@pytest.mark.parametrize("fault", LEFT_OUT)
def test_a_flush_left_out_would_be_noticed(fault, tmp_path, straight, monkeypatch):
    """The test of the test above."""
    with monkeypatch.context() as patch:
        patch.setattr(*LEFT_OUT[fault])
        cuts = torture.power_cuts(tmp_path / "run")
    with pytest.raises(AssertionError, match="was saved and|log.csv"):
        for cut in reversed(cuts):  # the last promises the most
            torture.check_cut(cut, straight)


@pytest.mark.parametrize("careless", [False, True])
def test_a_checkpoint_that_is_not_flushed_before_its_rename_would_be_noticed(careless, tmp_path):
    """The test of the test above."""
    folder, crashes = tmp_path / "in", tmp_path / "crashes"
    folder.mkdir()
    path, new = folder / "last.pt", {"config": {}, "model": {"a": torch.arange(9.0)}}
    checkpoint.save(path, new)
    with torture.Disk(torture.Platter(folder, crashes)):
        if careless:
            with open(folder / "temporary", "wb") as file:
                file.write(path.read_bytes())
            os.replace(folder / "temporary", path)
        else:
            checkpoint.save(path, new)
        os.mkdir(folder / "more")  # one more event: what would be left after all that?
    left = [torture.verdict(checkpoint.read, crash / "last.pt") for crash in crashes.iterdir()]
    assert len(left) > 2 and any(left) == careless


def test_a_full_or_failing_disk_costs_one_line_and_no_checkpoint(tmp_path, straight):
    n = len(torture.events(tmp_path / "events"))
    tried = range(5, n + 1, 26)
    number = torture.errno.ENOSPC
    assert sum(torture.fail_at(tmp_path / f"{at}", at, number, straight) for at in tried) > 2


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def test_hostile_checkpoints_are_refused_without_running_or_allocating_anything(good):
    assert torture.confined(lambda: torture.attack(good)) > 80


def test_a_damaged_checkpoint_is_refused_or_loads_as_it_was_saved(good):
    rng = random.Random(1)
    n, refused = torture.damage_checkpoint(good / "run" / "last.pt", 300, rng)
    assert n > 300 and refused > 0.8 * n


def test_other_damaged_files_are_refused_in_one_line_or_read(good, cache):
    n, refused = torture.confined(lambda: torture.damage_others(good, 15, random.Random(1)))
    assert 20 < refused < n


# ---------------------------------------------------------------------------------------------
# Fuzzing
# ---------------------------------------------------------------------------------------------


def test_random_command_lines_end_without_a_traceback(good):
    def act():
        return torture.fuzz_commands(good, 25, random.Random(1))

    assert sum(torture.confined(act, gigabytes=4).values()) == 25


def test_random_configs_make_a_working_model_or_name_a_field():
    assert 10 < torture.fuzz_configs(100, random.Random(0)) < 90


def test_routers_choose_and_weigh_soundly_whatever_the_logits():
    assert torture.fuzz_routers(400, random.Random(0)) == 400


def test_random_strings_come_back_from_their_ids():
    assert torture.fuzz_strings(3000, random.Random(0)) > 3000


# ---------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------


def test_without_a_checkpoint_resume_asks_for_the_flags_instead_of_guessing(workplace, capsys):
    start("--steps", "2")
    Path("run/last.pt").unlink()
    before = sorted(os.listdir("run"))
    capsys.readouterr()
    assert call(train, "--resume", "--out", "run") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--resume --out run --data" in message
    assert sorted(os.listdir("run")) == before


def test_the_command_with_resume_begins_a_run_that_is_not_there(workplace):
    assert start("--steps", "2", "--resume") == 0
    assert checkpoint.read("run/last.pt")["done"]["step"] == 2


def test_a_checkpoint_that_the_system_does_not_let_us_read_is_not_set_aside(workplace, capsys):
    start("--steps", "2")
    before = Path("run/last.pt").read_bytes()
    with mock.patch("zipfile.ZipFile", side_effect=PermissionError(13, "Permission denied")):
        assert start("--steps", "2", "--resume") == 2
    assert "can't be read: Permission denied" in capsys.readouterr().err
    assert Path("run/last.pt").read_bytes() == before


def test_leftovers_of_a_killed_run_are_removed_and_others_stay(workplace):
    start("--steps", "2")
    Path("run/last.pt.123.tmp").write_bytes(b"half")
    Path("run/mine.tmp").write_bytes(b"of the user")
    Path("run/last.pt").unlink()
    assert start("--steps", "2", "--resume") == 0
    assert [path.name for path in Path("run").glob("*.tmp")] == ["mine.tmp"]


@pytest.mark.parametrize("garbage", ["\0" * 50 + "\n", "a,b,c\n", '"9\n\n'])
def test_what_a_power_cut_left_behind_the_flushed_rows_goes(garbage, workplace):
    start(*CADENCE)
    whole = Path("run/load.csv").read_text()
    with at_training_step(13, press_ctrl_c):
        call(train, "--data", "text.txt", "--out", "cut", *TINY, *CADENCE)
    with open("cut/load.csv", "a") as file:
        file.write(garbage)
    assert call(train, "--resume", "--out", "cut") == 0
    assert Path("cut/load.csv").read_text() == whole


def test_of_a_log_that_a_spreadsheet_saved_all_rows_stay_or_a_copy(workplace, capsys):
    start(*CADENCE)
    whole = Path("run/log.csv").read_bytes()
    with at_training_step(13, press_ctrl_c):
        call(train, "--data", "text.txt", "--out", "cut", *TINY, *CADENCE)
    rows = Path("cut/log.csv").read_text(encoding="utf-8").splitlines()
    quoted = "".join(",".join(f'"{cell}"' for cell in row.split(",")) + "\r\n" for row in rows)
    for name, text in {
        "quoted": quoted,
        "marked": "\ufeff" + quoted,
        "old Mac": "\r".join(rows),
        "semicolons": quoted.replace(",", ";"),
    }.items():
        shutil.copytree("cut", name)
        Path(name, "log.csv").write_bytes(text.encode())
        assert call(train, "--resume", "--out", name) == 0
        if name in ("quoted", "marked"):
            steps = [row["step"] for row in log.read_rows(Path(name, "log.csv"))]
            assert steps == [line.split(b",")[0].decode() for line in whole.splitlines()[1:]]
            assert not Path(name, "log.csv.old").exists()
        else:
            assert Path(name, "log.csv.old").read_bytes() == text.encode()
            assert f"all of it is kept as {Path(name, 'log.csv.old')}" in capsys.readouterr().out


def test_a_log_that_an_editor_replaced_or_took_away_gets_the_rows_that_follow(workplace):
    def replace():
        log = Path("run/log.csv")
        Path("copy").write_text(log.read_text())
        os.replace("copy", log)
        Path("run/load.csv").unlink()

    with at_training_step(13, replace):
        assert start(*CADENCE) == 0
    steps = [int(row["step"]) for row in log.read_rows(Path("run/log.csv"))]
    assert steps == [s for s in range(21) if s % 3 == 0 or s % 4 == 0]
    assert {int(row["step"]) for row in log.read_rows(Path("run/load.csv"))} == {15, 16, 18, 20}


def test_a_clock_that_goes_backwards_changes_nothing(workplace):
    clock = iter(range(10**6, 0, -1000))
    with mock.patch("time.time", lambda: next(clock)):
        assert start("--steps", "4", "--log_every", "1") == 0
    seconds = [float(row["seconds"]) for row in log.read_rows(Path("run/log.csv"))]
    assert seconds == sorted(seconds) and seconds[0] == 0 < seconds[1]


# ---------------------------------------------------------------------------------------------
# Training goes wrong
# ---------------------------------------------------------------------------------------------


def test_sigterm_saves_and_exits_143(workplace, capsys):
    with at_training_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert start(*CADENCE) == 143
    assert checkpoint.read("run/last.pt")["done"]["step"] == 7
    assert "--resume --out run" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_no_weight(value, workplace, capsys):
    """Of one embedding in one step: the loss stays finite, the norm of the next step too."""
    kept = {}

    def spoil(parallel, most, muon, clip=ranks.clip_gradients):
        parameters = list(parallel.parameters())
        spoil.calls += 1
        if spoil.calls == 7:
            kept["before"] = [p.detach().clone() for p in parameters]
            kept["now"] = parameters
            parameters[0].grad[-1] = value
        return clip(parallel, most, muon)

    spoil.calls = 0
    with mock.patch.object(ranks, "clip_gradients", spoil):
        assert start(*CADENCE) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "not finite at step 7" in message
    assert "last.pt holds the last good state" in message and "--lr" in message
    assert all(torch.equal(a, b) for a, b in zip(kept["before"], kept["now"], strict=True))
    assert checkpoint.read("run/last.pt")["done"]["step"] == 5


def test_on_a_gpu_it_stays_in_the_meter_until_the_row_that_reports_it(tmp_path):
    """The norm of the first step is infinite, that of the second is not; a row comes with it."""
    model, ids = random_model(small_config()).train(), torch.zeros(1, 4, dtype=torch.long)
    cadence = {"steps": 3, "log_every": 2, "eval_every": 3}
    run = SimpleNamespace(
        settings=train.TrainConfig(device="cuda", dtype="fp32", **cadence),  # never asked
        data=SimpleNamespace(batches=lambda i, device: (ids, ids), source_of_byte=None),
        meter=log.Meter(model),
        model=model,
        parallel=model,
        optimizers=train.make_optimizers(model, train.TrainConfig()),
        done=dict(storage.NOTHING_DONE),
        folder=tmp_path,
        is_compiled=False,
    )
    norms = iter([torch.tensor(math.inf), torch.tensor(1.0)])
    with (
        mock.patch.object(ranks, "clip_gradients", lambda *arguments: next(norms)),
        mock.patch.object(machine, "autocast", lambda s: torch.autocast("cpu", enabled=False)),
        mock.patch.object(train, "Log"),
        mock.patch.object(train, "evaluate"),
        pytest.raises(ValueError, match="not finite at step 2; nothing was saved yet"),
    ):
        train.train(run, [])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()], ids=type
)
def test_out_of_memory_names_the_halves(error, workplace, capsys):
    for module, place in ((machine, "compile_model"), (train, "train")):  # a GPU's, and a CPU's
        with mock.patch.object(module, place, side_effect=error):
            assert start("--steps", "2", "--grad_accum", "3", "--out", place) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "--batch_size 2 --grad_accum 6" in message
    assert start("--steps", "2", *"--batch_size 2 --grad_accum 6 --out other".split()) == 0


def test_a_folder_is_held_by_one_run_and_a_file_system_without_locks_is_no_hindrance(tmp_path):
    import fcntl

    held = files.lock_folder(tmp_path)
    with pytest.raises(ValueError, match="in use by another"):
        files.lock_folder(tmp_path)
    held.close()
    without = OSError(errno.ENOLCK, "No locks available")
    with mock.patch.object(fcntl, "flock", side_effect=without):
        files.lock_folder(tmp_path).close()
        with files.replacing(tmp_path / "file") as file:
            file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_spike_of_the_loss_is_said():
    settings, said = train.TrainConfig(), []
    with mock.patch.object(log, "print_line", said.append):
        usual = None
        for step, loss in enumerate([6.0, 5.0, 4.0, 4.1, 3.9, 9.0, 4.0, 3.8], 1):
            usual = log.warn_of_spike({"step": step, "train_loss": loss}, usual, settings)
    assert len(said) == 1 and "step 6 is 9.00" in said[0] and "--lr 0.004" in said[0]


def test_a_folder_taken_away_under_a_run_is_one_line(workplace, capsys):
    def remove():
        torture.shutil.rmtree("run")

    with at_training_step(7, remove):
        assert start(*CADENCE) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "was it taken away" in message


def test_a_checkpoint_deleted_under_a_run_is_written_again(workplace):
    with at_training_step(13, lambda: Path("run/last.pt").unlink()):
        assert start(*CADENCE) == 0
    assert checkpoint.read("run/last.pt")["done"]["step"] == 20
