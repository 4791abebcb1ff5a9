"""One thread, a fixed seed, no network, and Triton's interpreter where there is no GPU."""

import os
import socket

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Processes that tests start round as this one does, and do not fight for cores.
os.environ["OMP_NUM_THREADS"] = "1"
# The same examples in every run: what a drawn case finds is found where it is written, not by whoever runs next.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
# Read when a kernel is decorated, so it has to be there before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection that leaves this machine fails, so a test cannot come to depend on one."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests use no network, got a connection to {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
