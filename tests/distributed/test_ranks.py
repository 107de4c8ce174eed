"""The helper itself: a multi-process test that quietly ran on one process would prove nothing."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run


def who():
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), total.item()


def fail_on_the_second():
    if dist.get_rank() == 1:
        raise ArithmeticError("this one")


def end_at_once():
    os._exit(3)


def test_ranks_are_processes():
    ranks, processes, totals = zip(*run(who, 2))
    assert ranks == (0, 1) and len({*processes, os.getpid()}) == 3 and totals == (3, 3)


def test_a_failure_comes_with_its_traceback():
    with pytest.raises(AssertionError, match=r"rank 1: Traceback(.|\n)*fail_on_the_second(.|\n)*this one"):
        run(fail_on_the_second, 2)


def test_an_end_and_a_timeout_are_failures():
    with pytest.raises(AssertionError, match="rank 0: ended without a word"):
        run(end_at_once, 1)
    with pytest.raises(AssertionError, match="rank 0: did not end in time"):
        run(time.sleep, 1, 60, timeout=3)
