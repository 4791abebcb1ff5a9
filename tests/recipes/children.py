"""Runs of a command in processes of their own, which import nothing again."""

import multiprocessing
import os
import sys

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["attnzoo_recipes.commandline", "datasets", "matplotlib.figure"])


def _child(words, output, prepare, arguments):
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    from attnzoo_recipes import pretrain

    prepare(*arguments)
    sys.argv = ["attnzoo-pretrain", *words]
    pretrain.main()


def command(words, prepare, *arguments, timeout=150):
    """attnzoo-pretrain as a process, after a preparation in it; returns the exit code and all that it said."""
    reader, writer = processes.Pipe(duplex=False)
    process = processes.Process(target=_child, args=(words, writer, prepare, arguments))
    process.start()
    writer.close()
    said = b""
    while part := os.read(reader.fileno(), 65536):
        said += part
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(said.decode())
    return process.exitcode, said.decode(errors="replace")


def before(owner, name, action):
    """Do something whenever a function is about to be called; the action gets the function's arguments."""
    original = getattr(owner, name)

    def called(*arguments, **keywords):
        action(*arguments)
        return original(*arguments, **keywords)

    setattr(owner, name, called)
