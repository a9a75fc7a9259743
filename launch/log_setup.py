"""Logging, configured in one place: INFO from rank 0, warnings from every rank with the rank in the line."""

from __future__ import annotations

import logging
import sys


def set_up_logging(rank: int = 0, verbose: bool = True) -> None:
    level = logging.INFO if verbose and rank == 0 else logging.WARNING
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    for name in ("launch", "stages", "data_pipeline", "modeling", "quant", "kernels", "search"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
        logger.propagate = False
