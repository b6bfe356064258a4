#!/usr/bin/env python3
"""torch_perf.py: the workloads of rsb_perf over the original's algorithm on PyTorch's gloo.

`Bucketer` says again, in our own words, what fairscale's ReduceScatterBucketer does, so that its time can be seen beside
ours; it is not code of fairscale. gloo takes a list of shards, or one flat tensor (the original's other way, flattened,
since gloo checks the shape): both are measured. `bench/run --torch` runs this file; the JSON is that of rsb_perf.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

MOST_SECONDS = 2.0  # of the timed passes of a turn


class Bucket:
    """One (ranks, shard) buffer, and the output of its collective."""

    def __init__(self, numel, dtype, ranks):
        self.data = torch.zeros((ranks, numel), dtype=dtype)
        self.output = torch.zeros(numel, dtype=dtype)
        self.offset, self.callbacks = 0, []

    def append(self, shards, callback):
        numel = shards[0].numel()
        self.data[:, self.offset:self.offset + numel].copy_(torch.stack(shards).view(len(shards), -1))
        self.callbacks.append((callback, self.output[self.offset:self.offset + numel].view_as(shards[0])))
        self.offset += numel

    def flush(self, reduce_scatter):
        if self.offset == 0:
            return
        reduce_scatter(self.output[:self.offset], list(self.data[:, :self.offset].unbind(0)))
        for callback, result in self.callbacks:
            callback(result)
        self.data.zero_()
        self.offset = 0
        self.callbacks.clear()
        self.output = torch.zeros_like(self.output)


class Bucketer:
    """Gathers reduce-scatters in buckets of `megabytes`; a shard that is too large for one goes at once."""

    def __init__(self, reduce_scatter, ranks, megabytes=25):
        self.reduce_scatter, self.ranks, self.megabytes, self.buckets = reduce_scatter, ranks, megabytes, {}

    def reduce_scatter_async(self, shards, callback):
        first = shards[0]
        most = self.megabytes * 2**20 // (first.element_size() * self.ranks)
        if first.numel() > most:
            result = torch.zeros_like(first)
            self.reduce_scatter(result, shards)
            callback(result)
            return
        key = first.dtype
        bucket = self.buckets.get(key)
        if bucket is None:
            bucket = self.buckets[key] = Bucket(most, first.dtype, self.ranks)
        if first.numel() > most - bucket.offset:
            bucket.flush(self.reduce_scatter)
        bucket.append(shards, callback)

    def flush(self):
        for bucket in self.buckets.values():
            bucket.flush(self.reduce_scatter)


def by_list(output, rows):
    dist.reduce_scatter(output, rows)


def by_tensor(output, rows):
    dist.reduce_scatter_tensor(output, torch.cat(rows))


WAYS = [("list", "PyTorch gloo, the original, shards as a list", by_list),
        ("flat", "PyTorch gloo, the original, one flat tensor", by_tensor)]

# ---- Workloads, values: those of workload.c and values.c -----------------------------------------------------------


def workload(letter, ranks, shapes):
    """(what it is, numels of a rank's inputs, calls a pass)."""
    if letter == "A":
        return "1,000 tensors, shards of 1,024", [ranks * 1024] * 1000, 1
    if letter == "B":
        lines = (shapes / "resnet50.tsv").read_text().splitlines()
        return "ResNet-50's 161 gradients", [int(line.split("\t")[2]) for line in reversed(lines)], 1
    if letter == "C":
        return "one tensor", [(256 << 20) // 4], 1
    return "one op with a shard of 8 bytes", [ranks * 2], 100


def values(rank, tensor, numel, turn):
    """What rank gives of a tensor: small integers, so that sums are exact."""
    mask = 2**64 - 1
    seed = (tensor * 0x9e3779b97f4a7c15 + rank * 0xbf58476d1ce4e5b9 + turn * 77731) & mask
    seed = ((seed ^ seed >> 31) * 0x94d049bb133111eb & mask) >> 32
    hashes = np.arange(numel, dtype=np.uint32) * np.uint32(2654435761) + np.uint32(seed)
    return torch.from_numpy((hashes >> np.uint32(26)).astype(np.float32) - 32)


class Work:
    """The tensors of one workload on one rank, and its passes."""

    def __init__(self, numels, calls, rank, ranks):
        self.numels, self.calls, self.rank, self.ranks = numels, calls, rank, ranks
        self.results = [None] * len(numels)

    def padded(self, tensor):
        return -(-self.numels[tensor] // self.ranks) * self.ranks

    def fill(self, turn):
        self.inputs = []
        for tensor, numel in enumerate(self.numels):
            whole = torch.zeros(self.padded(tensor))
            whole[:numel] = values(self.rank, tensor, numel, turn)
            self.inputs.append(list(whole.chunk(self.ranks)))

    def note(self, tensor, result):
        self.results[tensor] = result

    def run(self, bucketer, calls):
        for _ in range(calls):
            for tensor, shards in enumerate(self.inputs):
                bucketer.reduce_scatter_async(shards, lambda result, tensor=tensor: self.note(tensor, result))
            bucketer.flush()

    def check(self, turn, who):
        for tensor, numel in enumerate(self.numels):
            want = torch.zeros(self.padded(tensor))
            for rank in range(self.ranks):
                want[:numel] += values(rank, tensor, numel, turn)
            if not torch.equal(self.results[tensor], want.chunk(self.ranks)[self.rank]):
                sys.exit(f"{who}: rank {self.rank}'s shard of tensor {tensor} is wrong")

    def sample(self, bucketer):
        """(begin, end, CPU) of a timed pass, in ns."""
        dist.barrier()
        cpu, begin = time.process_time_ns(), time.monotonic_ns()
        self.run(bucketer, self.calls)
        return begin, time.monotonic_ns(), time.process_time_ns() - cpu


def measure(work, way, opt):
    """The samples of all ranks, [pass][rank], and how many passes a round has."""
    key, label, reduce_scatter = way
    bucketer = Bucketer(reduce_scatter, opt.ranks)
    for turn in (0, 1):
        work.fill(turn)
        work.run(bucketer, 1)
        work.check(turn, label)
    begin, end, _ = work.sample(bucketer)
    bytes_of_a_pass = sum(work.numels) * 4 * work.calls
    iters = [max(1, min(50, int(MOST_SECONDS * 1e9 / (end - begin)), max(3, 2**29 // bytes_of_a_pass)))]
    dist.broadcast_object_list(iters)
    for _ in range(opt.warmup):
        work.sample(bucketer)
    samples = []
    for _ in range(opt.rounds):
        work.sample(bucketer)
        samples += [work.sample(bucketer) for _ in range(iters[0])]
    work.run(bucketer, 1)
    work.check(1, label)
    gathered = [None] * opt.ranks
    dist.all_gather_object(gathered, samples)
    return list(zip(*gathered)), iters[0]


def run_rank(rank, opt, store):
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // opt.ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=opt.ranks)
    results = []
    for letter in opt.workload.split(","):
        what, numels, calls = workload(letter, opt.ranks, Path(__file__).parent / "shapes")
        work = Work(numels, calls, rank, opt.ranks)
        for way in WAYS:
            passes, iters = measure(work, way, opt)
            results.append({
                "workload": letter, "what": what, "tensors": len(numels), "bytes": sum(numels) * 4, "calls": calls,
                "contender": way[0], "label": way[1], "floor": False, "rounds": opt.rounds, "iters": iters,
                "pass_ms": [round((max(e for _, e, _ in p) - min(b for b, _, _ in p)) / 1e6, 5) for p in passes],
                "cpu_ms": [round(sum(cpu for _, _, cpu in p) / 1e6, 5) for p in passes]})
    if rank == 0:
        document = {"program": "torch_perf", "version": f"PyTorch {torch.__version__}, gloo", "mode": "processes",
                    "ranks": opt.ranks, "dtype": "f32", "op": "sum", "results": results}
        Path(opt.json).write_text(json.dumps(document))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description="The original's algorithm on PyTorch's gloo; see rsb_perf --help.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workload", default="A,B,C")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", required=True)
    opt = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(run_rank, (opt, f"{scratch}/store"), nprocs=opt.ranks)


if __name__ == "__main__":
    main()
