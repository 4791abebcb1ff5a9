"""Runs of a command in processes of their own, which import nothing again."""

import multiprocessing
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["attnzoo_recipes.commandline", "datasets", "matplotlib.figure"])


def _child(words, output, prepare, arguments):
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    from attnzoo_recipes import pretrain

    # What a command begins with; processes that read data would otherwise start a server of their own.
    multiprocessing.set_start_method("fork", force=True)
    if prepare is not None:
        prepare(*arguments)
    sys.argv = ["attnzoo-pretrain", *words]
    pretrain.main()


def command(words, prepare=None, *arguments, timeout=150):
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


def together(words, world_size=2, prepare=None, arguments=(), timeout=150):
    """The processes of one run, as a cluster would start them; `prepare` gets the rank and the arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*words, "--trainer.accelerator=cpu", f"--trainer.devices={world_size}"]

    def one(rank):
        return command(words, _join, rank, world_size, port, prepare, arguments, timeout=timeout)

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(one, range(world_size)))


def _join(rank, world_size, port, prepare, arguments):
    place = {"LOCAL_RANK": rank, "WORLD_SIZE": world_size, "NODE_RANK": 0, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in place.items()}})
    if prepare is not None:
        prepare(rank, *arguments)


def before(owner, name, action):
    """Do something whenever a function is about to be called; the action gets the function's arguments."""
    original = getattr(owner, name)

    def called(*arguments, **keywords):
        action(*arguments)
        return original(*arguments, **keywords)

    setattr(owner, name, called)
