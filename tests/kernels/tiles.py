"""Tile sizes that tests pin."""

from attnzoo_kernels.tuning import Config


def tile(rows: int, columns: int) -> Config:
    """Tiles of so many rows (queries) by columns (keys)."""
    return Config({"BLOCK_T": rows, "BLOCK_S": columns}, num_warps=4, num_stages=1)


SMALL = tile(16, 16)
