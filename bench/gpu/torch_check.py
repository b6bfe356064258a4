#!/usr/bin/env python3
"""torch_check.py LIBRARY: PyTorch's communicator, streams and caching allocator under a device comm, in one process;
and the host time of a submit beside torch.stack + copy_. One line, as the checks of gpu_table print it.

The structs of rsbucket.h are written down here; a local comm, which needs neither PyTorch nor a GPU, shows first that
they are right.
"""
import ctypes as c
import os
import statistics
import sys
import tempfile
import time

F32, SUM = 1, 1
ALLOC = c.CFUNCTYPE(c.c_void_p, c.c_void_p, c.c_size_t, c.c_size_t, c.c_int32, c.c_void_p)
FREE = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, c.c_size_t, c.c_int32, c.c_void_p)


def struct(name, *fields):
    """A struct that begins with its size."""
    made = type(name, (c.Structure,), {"_fields_": [("struct_size", c.c_size_t), *fields]})
    return lambda **values: made(c.sizeof(made), **values)


class Error(c.Structure):
    _fields_ = [("status", c.c_int32), ("native_code", c.c_int32), ("peer", c.c_int32), ("reserved", c.c_uint32),
                ("message", c.c_char * 240)]


CommConfig = struct("CommConfig", ("timeout_ns", c.c_uint64), ("flags", c.c_uint64), ("stream", c.c_void_p),
                    ("label", c.c_char_p), ("result_stream", c.c_void_p), ("control", c.c_void_p),
                    ("staging_bytes", c.c_size_t))
Allocator = struct("Allocator", ("ctx", c.c_void_p), ("alloc", ALLOC), ("free", FREE), ("release", c.c_void_p))
Config = struct("Config", ("bucket_bytes", c.c_int64), ("flags", c.c_uint64), ("allocator", c.c_void_p))
SubmitArgs = struct("SubmitArgs", ("inputs", c.c_void_p), ("flat_input", c.c_void_p), ("output", c.c_void_p),
                    ("numel", c.c_size_t), ("dtype", c.c_uint32), ("output_dtype", c.c_uint32), ("op", c.c_uint32),
                    ("flags", c.c_uint32), ("scale", c.c_double), ("tag", c.c_uint64), ("stream", c.c_void_p),
                    ("callback", c.c_void_p), ("user_data", c.c_void_p))


def end(state, text):
    print(f"{state}: {text}", flush=True)
    os._exit(state == "FAILED")


class Library:
    """Calls that end the check where they fail."""

    def __init__(self, path):
        self.library = c.CDLL(path)

    def __getattr__(self, name):
        function = getattr(self.library, "rsb_" + name)

        def call(*args):
            error = Error()
            if function(*args, c.byref(error)) != 0:
                end("FAILED", f"rsb_{name}: {error.message.decode()}")

        return call

    def bucketer(self, allocator):
        made, config = c.c_void_p(), Config(allocator=c.addressof(allocator))
        self.bucketer_create(c.byref(config), c.byref(made))
        return made

    def submit(self, bucketer, comm, source, target, numel, stream=None, flags=0, scale=0.5):
        args = SubmitArgs(flat_input=source, output=target, numel=numel, dtype=F32, op=SUM, flags=flags, scale=scale,
                          stream=stream)
        self.bucketer_submit(bucketer, comm, c.byref(args), None)


def check_structs(rsb):
    """One rank on the host, with an allocator and every field that is used."""
    live, asked = {}, []

    def alloc(_, size, align, device, stream):
        memory = (c.c_char * (size + align))()
        at = (c.addressof(memory) + align - 1) // align * align
        live[at] = memory
        asked.append((size, device, stream))
        return at

    hooks = ALLOC(alloc), FREE(lambda _, at, *rest: live.pop(at) and None)
    allocator = Allocator(alloc=hooks[0], free=hooks[1])
    comm, config = c.c_void_p(), CommConfig(timeout_ns=10**9, label=b"one")
    rsb.comm_create_local(1, c.byref(config), c.byref(comm))
    bucketer = rsb.bucketer(allocator)
    source, target = (c.c_float * 100)(*range(100)), (c.c_float * 100)()
    rsb.submit(bucketer, comm, c.addressof(source), c.addressof(target), 100)
    rsb.submit(bucketer, comm, c.addressof(source), None, 100)
    rsb.bucketer_flush(bucketer)
    rsb.library.rsb_bucketer_free(bucketer)
    rsb.library.rsb_comm_free(comm)
    if list(target) != [i / 2 for i in range(100)] or not asked or asked[0][1] != -1 or live:
        end("FAILED", "the structs in torch_check.py are not those of rsbucket.h")


def main():
    rsb = Library(sys.argv[1])
    rsb.library.rsb_bucketer_free.argtypes = rsb.library.rsb_comm_free.argtypes = [c.c_void_p]
    check_structs(rsb)
    try:
        import torch
        import torch.distributed as dist
    except ImportError:
        end("skipped", "no PyTorch")
    if not torch.cuda.is_available():
        end("skipped", "PyTorch finds no GPU")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    dist.all_reduce(torch.ones(1, device=device))
    backend = dist.distributed_c10d._get_default_group()._get_backend(device)
    if not hasattr(backend, "_comm_ptr"):
        end("skipped", f"PyTorch {torch.__version__} does not show its communicator")

    taken = [0]

    def alloc(_, size, align, ordinal, stream):
        taken[0] += 1
        return torch.cuda.caching_allocator_alloc(size, ordinal, stream or 0)

    hooks = ALLOC(alloc), FREE(lambda _, at, *rest: torch.cuda.caching_allocator_delete(at))
    allocator = Allocator(alloc=hooks[0], free=hooks[1])
    main_stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
    comm, config = c.c_void_p(), CommConfig(stream=main_stream.cuda_stream or None)
    rsb.comm_wrap_nccl(c.c_void_p(backend._comm_ptr()), c.byref(config), c.byref(comm))
    bucketer = rsb.bucketer(allocator)
    wrong = 0
    for turn in range(20):
        side.wait_stream(main_stream)
        outputs, expected = [], []
        for t in range(50):
            stream = side if t % 2 else main_stream
            with torch.cuda.stream(stream):
                source = torch.randn(1000 + 37 * t, device=device)
                source.mul_(2 + turn)
            with torch.cuda.stream(main_stream):
                output = torch.empty_like(source)
            source.record_stream(main_stream)
            with torch.cuda.stream(stream):
                # The output's memory may still be in use in the order of the main stream.
                stream.wait_stream(main_stream)
                rsb.submit(bucketer, comm, source.data_ptr(), output.data_ptr(), source.numel(),
                           stream.cuda_stream or None)
                expected.append(source * 0.5)
                source.fill_(-1)  # comes after it was packed
            outputs.append(output)
            del source
        rsb.bucketer_flush(bucketer)  # what the main stream holds next comes after the results
        main_stream.wait_stream(side)
        wrong += sum(int((o != e).sum()) for o, e in zip(outputs, expected))
    if wrong:
        end("FAILED", f"{wrong} elements are wrong")

    # What the original does to put a tensor into its bucket, beside a submit that packs; on the host.
    pieces = [torch.randn(1024, device=device) for _ in range(8)]
    bucket, flat = torch.empty(8, 1024, device=device), torch.cat(pieces)
    output = torch.empty_like(flat)

    def host_us(call):
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(100):
                call()
            times.append((time.perf_counter() - begin) * 1e4)
            rsb.bucketer_flush(bucketer)
        return statistics.median(times)

    stacked = host_us(lambda: bucket.copy_(torch.stack(pieces)))
    submitted = host_us(lambda: rsb.submit(bucketer, comm, flat.data_ptr(), output.data_ptr(), flat.numel()))
    torch.cuda.synchronize()
    rsb.library.rsb_bucketer_free(bucketer)
    rsb.library.rsb_comm_free(comm)
    end("ok", f"1,000 ops right, {taken[0]} blocks of its allocator; {stacked:.1f} us for torch.stack + copy_, "
              f"{submitted:.1f} us for a submit by ctypes")


main()
