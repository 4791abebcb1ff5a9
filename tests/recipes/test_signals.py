"""Signals at every stage of the command: the promised exit code, and nothing lost."""

import atexit
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnzoo_recipes import commandline, signals
from attnzoo_recipes.checkpointing import AtomicCheckpointIO, newest_valid, read_checkpoint
from attnzoo_recipes.data import packing
from attnzoo_recipes.signals import Stop
from tests.recipes.children import before, command

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}
STEPS = 4
# Where the signal comes, and the step of the newest checkpoint afterwards; None if nothing had been trained.
MOMENTS = {
    "reading the settings": (commandline, "check_end", None),
    "tokenising": (packing, "_write", None),
    "building the model": (commandline.Pretraining, "configure_model", None),
    "before the first step": (commandline.RandomStates, "on_train_start", None),
    "in the first step": (commandline.Pretraining, "training_step", 1),
    "validating": (commandline.Pretraining, "validation_step", 2),
    "drawing a sample": (commandline.Samples, "on_validation_end", 3),
    "in the last save": (AtomicCheckpointIO, "save_checkpoint", STEPS),
    "reporting": (commandline.Report, "on_fit_end", STEPS),
    "after the run": (atexit, "_run_exitfuncs", STEPS),
}


def send(moment, number):
    def action(*arguments):
        if moment != "in the last save" or arguments[1]["global_step"] == STEPS:
            os.kill(os.getpid(), number)

    before(*MOMENTS[moment][:2], action)


@pytest.mark.parametrize(("moment", "number"), list(zip(MOMENTS, itertools.cycle(CODES), strict=False)))
def test_the_promised_code_at_every_stage(moment, number, arguments, tmp_path):
    step = MOMENTS[moment][2]
    words = arguments("mha", "--trainer.val_check_interval=2", "--checkpoints.every_n_train_steps=2", steps=STEPS)
    code, said = command(words, send, moment, number)
    assert code == CODES[number], said
    assert "Traceback" not in said
    newest = newest_valid(tmp_path)
    if step is None:
        assert newest is None
        assert f"stopped by {number.name}; nothing was lost" in said
    else:
        assert read_checkpoint(newest)["global_step"] == step
    if moment in ("reporting", "after the run"):
        assert "parameters" in said, "the report of a complete run"


def test_a_stopped_tokenisation_does_not_block_the_next_run(arguments, run, tmp_path):
    code, _ = command(arguments("mha"), send, "tokenising", signal.SIGTERM)
    assert code == 143
    run(arguments("mha"))
    assert [path.suffix for path in (tmp_path / "data").iterdir()] == [""]


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_signals_are_answered_while_the_command_imports(number):
    words = [sys.executable, "-W", "ignore", "-m", "attnzoo_recipes.pretrain", "fit"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, env=environment) as process:
        status = Path(f"/proc/{process.pid}/status")
        if not status.exists():
            pytest.skip("needs /proc")
        end = time.monotonic() + 60
        while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == CODES[number]
    assert said.startswith(f"attnzoo-pretrain: stopped by {number.name}; nothing was lost")
    assert said.count("\n") == 1


def test_handlers_in_a_process_that_does_other_things(capfd):
    """A notebook is not ended by a signal, and has its own handlers again afterwards."""
    earlier = signal.getsignal(signal.SIGTERM)

    def context(saving, number):
        with Stop() as stop:
            assert signal.getsignal(signal.SIGTERM) == stop.handle
            stop.saving = saving
            os.kill(os.getpid(), number)
            assert saving, "otherwise the signal ends the block here"
            assert stop.received == number, "noted, and left to the training"

    for saving, number in itertools.product((False, True), CODES):
        with pytest.raises(SystemExit) as stopped:
            context(saving, number)
        assert stopped.value.code == CODES[number]
        assert signal.getsignal(signal.SIGTERM) == earlier
    assert "stopped by SIGTERM" in capfd.readouterr().err


def test_the_handlers_need_no_heavy_import():
    code = "import sys, attnzoo_recipes.pretrain; print(sorted({'torch', 'numpy', 'lightning'} & set(sys.modules)))"
    root = Path(signals.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "[]\n", done.stderr
