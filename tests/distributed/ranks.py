"""Runs a function on several processes of one gloo group."""

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import connection

import torch
import torch.distributed as dist

import fused_losses

COLLECTIVE_SECONDS = 30  # after which a rank that waits in vain says where


def run(function, world_size, *arguments, timeout=120):
    """What ``function(*arguments)`` returns on each rank, in their order; it is found by its module's name.

    Raises AssertionError with the traceback of every rank that failed or was still running after the timeout.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fused_losses", "torch.distributed.tensor"])  # imported once for all ranks
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(sender, function, rank, world_size, f"file://{folder}/store", arguments)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            outcomes = _outcomes(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(1)
                process.kill()
                process.join()
    failures = [f"rank {rank}: {failure}" for rank, (failure, _) in enumerate(outcomes) if failure]
    assert not failures, "\n".join(failures)
    return [result for _, result in outcomes]


def run_cases(cases, world_size, **options):
    """Runs functions without arguments one after the other in one group.

    Raises AssertionError with the traceback of every case on every rank that failed.
    """
    failures = run(_failures, world_size, cases, **options)
    told = [f"rank {rank}, {name}: {text}" for rank, of in enumerate(failures) for name, text in of.items()]
    assert not told, "\n".join(told)


def _failures(cases):
    """The tracebacks of the cases that fail on this rank; ranks go on together."""
    failures = {}
    for case in cases:
        fused_losses.empty_cache()
        try:
            case()
        except BaseException:  # also pytest's own failures
            failures[case.__name__] = traceback.format_exc()
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, case.__name__)
        assert set(everywhere) == {case.__name__}
    return failures


def _outcomes(pipes, end):
    outcomes = dict.fromkeys(pipes, ("did not end in time", None))
    waiting = list(pipes)
    while waiting and time.monotonic() < end:
        for pipe in connection.wait(waiting, timeout=max(0.0, end - time.monotonic())):
            waiting.remove(pipe)
            try:
                outcomes[pipe] = pipe.recv()
            except EOFError:
                outcomes[pipe] = ("ended without a word", None)
    return list(outcomes.values())


def _rank(sender, function, rank, world_size, store, arguments):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)  # by torch.compile itself
    warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)  # torch's own imports
    os.environ.update({f"{where}RANK": str(rank) for where in ("", "LOCAL_")})  # as torchrun does
    os.environ.update({f"{where}WORLD_SIZE": str(world_size) for where in ("", "LOCAL_")})
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh tensors hold NaN
    try:
        limit = timedelta(seconds=COLLECTIVE_SECONDS)
        dist.init_process_group("gloo", store, rank=rank, world_size=world_size, timeout=limit)
        assert dist.get_world_size() == world_size
        sender.send((None, function(*arguments)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # also pytest's own failures
        sender.send((traceback.format_exc(), None))
