"""torch's process group, joined by processes as Ray's workers join it."""

from __future__ import annotations

import errno
import multiprocessing
import socket
from multiprocessing.connection import Connection

import pytest

from ul2r.launch.ray_train.process_group import join_group, open_store


def _take_port(address: str, port: int) -> None:
    """Take a port as any other program would."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as program:
        program.bind((address, port))


def _be_rank_0(address: Connection, total: Connection) -> None:
    where = open_store(60)
    address.send(where)
    total.recv()
    join_group(*where, world_rank=0, size=2, backend="gloo", timeout_s=60)
    total.send(_sum_ranks())


def _be_rank_1(address: Connection, total: Connection) -> None:
    join_group(*address.recv(), world_rank=1, size=2, backend="gloo", timeout_s=60)
    total.send(_sum_ranks())


def _sum_ranks() -> int:
    import torch
    import torch.distributed as dist

    rank = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(rank)
    # Rank 0 holds the store: it goes last.
    dist.barrier()
    return int(rank)


def test_no_program_takes_the_port_before_the_ranks_have_joined() -> None:
    context = multiprocessing.get_context("spawn")
    address, its_address = context.Pipe()
    relay, its_relay = context.Pipe()
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=_be_rank_0, args=(its_address, pipes[0][1])),
        context.Process(target=_be_rank_1, args=(its_relay, pipes[1][1])),
    ]
    try:
        for rank in ranks:
            rank.start()
        where = address.recv()

        with pytest.raises(OSError, match="in use") as refusal:
            _take_port(*where)
        assert refusal.value.errno == errno.EADDRINUSE

        pipes[0][0].send("join")
        relay.send(where)
        assert [pipe.recv() for pipe, _ in pipes] == [3, 3]
    finally:
        for rank in ranks:
            rank.join(60)
            rank.kill()
