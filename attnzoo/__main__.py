"""`python -m attnzoo`: what can run on this machine."""

import platform

import torch

import attnzoo
from attnzoo.backends import table

if __name__ == "__main__":
    print(f"attnzoo {attnzoo.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(table())
