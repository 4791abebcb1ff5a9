"""The mathematics as functions: checks, the plain PyTorch form that defines, and the choice of a backend."""
