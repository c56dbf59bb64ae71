# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in a process of its own: the first ends the command, the second ends the process wherever it hangs."""

import signal
import subprocess
import sys
import time

import pytest

STUCK = """
import sys, threading, time
from omniq.cli import command

def stuck(arguments):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        thread = threading.Thread(target=time.sleep, args=(60,))
        thread.start()
        print("joins", flush=True)
        thread.join()

command.COMMANDS["report"] = (stuck, "")
sys.exit(command.main(["report"]))
"""
FITTING = """
import sys
import threading
import time
import lightning as L
import torch
from omniq.cli import command

class Slow(L.LightningModule):
    def training_step(self, batch, number):
        print("ready", flush=True)
        time.sleep(60)

    def configure_optimizers(self):
        return None

class Hangs(L.Callback):
    def on_exception(self, trainer, module, error):
        print("joins", flush=True)
        threading.Event().wait(60)

def fit(arguments):
    options = {"logger": False, "enable_checkpointing": False,
               "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
               "callbacks": [Hangs()]}
    L.Trainer(max_epochs=1, **options).fit(Slow(), torch.utils.data.DataLoader(torch.zeros(2, 1)))

command.COMMANDS["report"] = (fit, "")
sys.exit(command.main(["report"]))
"""


def start(code: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("code", [STUCK, FITTING], ids=["thread join", "Lightning's shutdown"])
def test_second_interrupt_of_hanging_process_ends_it_with_stacks(code: str) -> None:
    process = start(code)
    try:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "joins\n"
        process.send_signal(signal.SIGINT)  # at once: from the launcher, which passes on the first one
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "omniq: interrupted again" in errors
    assert 'File "<string>", line' in errors  # the stack of the main thread


def test_first_interrupt_ends_command_in_order() -> None:
    code = STUCK.replace("args=(60,)", "args=(0,)")
    process = start(code)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors == "omniq: interrupted\n"
