"""Groups of processes, each process with its shard of the keys of each case, which write their results to files.

Run by test_context_parallel.py: ``python context_parallel_ranks.py FOLDER SIZE...``. One process imports torch and
forks the others, which takes a fraction of the time.
"""

import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from context_parallel_cases import CASES, Case

from cuattn.integrations import context_parallel


def shard(case: Case, bounds: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    q, k, v = case.inputs()
    return q, *(x.narrow(2 if case.layout == "bhsd" else 1, bounds[0], bounds[1] - bounds[0]) for x in (k, v))


def result(case: Case, rank: int, size: int) -> object:
    bounds = case.cuts(size)
    options = {"mask": case.mask, "layout": case.layout, "return_lse": True, "scale": case.scale}
    if case.given:
        options["bounds"] = bounds
    try:
        return context_parallel.attention(*shard(case, bounds[rank]), **options)
    except ValueError as error:
        return str(error)


def work(rank: int, size: int, folder: Path) -> None:
    store = f"file://{folder}/store{size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    results = {name: result(case, rank, size) for name, case in CASES.items()}
    torch.save(results, folder / f"{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path, sizes: list[int]) -> None:
    torch.set_num_threads(1)  # no thread may run in a process that forks
    fork = multiprocessing.get_context("fork")
    for size in sizes:
        processes = [fork.Process(target=work, args=(rank, size, folder), daemon=True) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
        if any(process.exitcode != 0 for process in processes):
            sys.exit(f"{size} ranks ended with {[process.exitcode for process in processes]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
