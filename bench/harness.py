"""What bench/run, bench/curves and bench/check_cost share: building the programs, installing their peers, running them,
and describing the machine."""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "performance.md"
COMMON = ["options", "values", "workload", "report"]
PERF = ["rsb_perf", "group", "floors", "kernels", "memory", *COMMON]
PACKAGES = {"mpich": ["mpich", "libmpich-dev"], "openmpi": ["openmpi-bin", "libopenmpi-dev"]}
TORCH = "torch==2.15.0"
CORES = len(os.sched_getaffinity(0))


def target():
    return (ROOT / os.environ.get("CARGO_TARGET_DIR", "target")).resolve()


def call(command, **options):
    """Runs a command; what it says is shown if it fails, and the program ends."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          **options)
    if done.returncode:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}")
    return done.stdout.strip()


# ---- Peers -------------------------------------------------------------------------------------------------------


def install_mpis(mpis):
    """Installs the Debian packages of the MPIs that are missing; returns the MPIs that are there."""
    missing = [p for mpi in mpis if not shutil.which(f"mpicc.{mpi}") for p in PACKAGES[mpi]]
    if missing and shutil.which("apt-get") and os.geteuid() == 0:
        print("installing:", *missing, flush=True)
        env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        call(["apt-get", "update", "-qq"], env=env)
        call(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], env=env)
    elif missing:
        print("left out, since these Debian packages are missing:", *missing)
    return [mpi for mpi in mpis if shutil.which(f"mpicc.{mpi}")]


def install_torch():
    """A Python with PyTorch, in an environment of its own; it takes about 6 GB."""
    environment = target() / "torch"
    python = environment / "bin" / "python"
    if not python.exists():
        call([sys.executable, "-m", "venv", environment])
    if subprocess.run([python, "-c", "import torch, numpy"], capture_output=True).returncode:
        print(f"installing {TORCH} into {environment} (about 6 GB)", flush=True)
        call([python, "-m", "pip", "install", "--quiet", TORCH, "numpy"])
    return python


# ---- Building ----------------------------------------------------------------------------------------------------


def build_library(flags="", directory=None):
    """Builds the shared library, with more compiler flags if any; returns the directory it is in."""
    directory = directory or target()
    env = dict(os.environ, CARGO_TARGET_DIR=str(directory))
    if flags:
        env["RUSTFLAGS"] = flags
    call([os.environ.get("CARGO", "cargo"), "build", "--release", "--locked"], cwd=ROOT, env=env)
    return directory / "release"


def build_programs(mpis=()):
    """Builds the library and the programs; returns the directory of the programs."""
    library, programs = build_library(), target() / "bench"
    programs.mkdir(exist_ok=True)
    flags = ["-std=gnu11", "-O3", "-g", "-Wall", "-Wextra", f'-DBENCH_SHAPES="{BENCH / "shapes"}"']
    call([os.environ.get("CC", "cc"), *flags, f"-I{ROOT / 'include'}", *[BENCH / f"{name}.c" for name in PERF],
          "-o", programs / "rsb_perf", f"-L{library}", "-lrsbucket", "-lpthread",
          f"-Wl,--enable-new-dtags,-rpath,{library}"])
    for mpi in mpis:
        call([f"mpicc.{mpi}", *flags, *[BENCH / f"{name}.c" for name in ["mpi_perf", *COMMON]],
              "-o", programs / f"mpi_perf.{mpi}"])
    return programs


# ---- Running -----------------------------------------------------------------------------------------------------


def results_of(command, env=None):
    """Runs a benchmark program and returns the JSON document that it writes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "result.json"
        call([*command, "--json", path], env=env)
        return json.loads(path.read_text())


@contextlib.contextmanager
def strangers():
    """On each core a process that is always busy, as a trainer's data loaders are."""
    body = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    started = [subprocess.Popen([sys.executable, "-c", body, str(core)]) for core in sorted(os.sched_getaffinity(0))]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def progress(text=""):
    """Shows what is under way, on a terminal; nothing: takes it away."""
    if sys.stderr.isatty():
        print(f"\r{text:<78}", end="" if text else "\r", file=sys.stderr, flush=True)


def processor_seconds():
    """(Seconds of all cores in use by anyone, seconds used by the programs that this one ran, seconds in all)."""
    ticks = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    times = os.times()
    return ((sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"),
            times.user + times.system + times.children_user + times.children_system,
            sum(ticks) / os.sysconf("SC_CLK_TCK"))


def share_of_others(before):
    """The part of all processors that others had since `before`."""
    used, own, whole = (after - then for after, then in zip(processor_seconds(), before))
    return round(max(0.0, used - own) / whole, 3)


# ---- Instructions ------------------------------------------------------------------------------------------------


def by_perf(command, env):
    done = subprocess.run(["perf", "stat", "-x,", "-e", "instructions:u", *command], capture_output=True, text=True,
                          env=env)
    found = re.search(r"^(\d+),[^,]*,instructions", done.stderr, re.MULTILINE)
    return int(found[1]) if found else None


def by_callgrind(command, env):
    """Copies go by vector instructions: of `rep movsb`, callgrind would count each byte."""
    env = dict(env or os.environ, GLIBC_TUNABLES="glibc.cpu.x86_rep_movsb_threshold=1000000000")
    done = subprocess.run(["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--fair-sched=yes",
                           *command], capture_output=True, text=True, env=env)
    found = re.search(r"Collected : (\d+)", done.stderr)
    return int(found[1]) if found else None


def instruction_counter():
    """(Name, function) of the way to count a command's instructions that this machine has; or (None, None)."""
    for name, program, function in (("perf stat", "perf", by_perf), ("callgrind", "valgrind", by_callgrind)):
        if shutil.which(program) and function(["true"], None):
            return name, function
    return None, None


def instructions_an_op(count, perf, ranks, size, ops, env=None):
    """Instructions an op and rank of `ops` tensors a flush, waiting included; the start-up taken off by a difference."""
    seen, calls = [], 1
    for iters in (1, 5):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "result.json"
            seen.append(count([str(word) for word in [
                perf, "--ranks", ranks, "--threads", "--sizes", size, "--count", ops, "--output", "--no-floors",
                "--rounds", 1, "--warmup", 0, "--iters", iters, "--json", path]], env))
            calls = json.loads(path.read_text())["results"][0]["calls"]
    return (seen[1] - seen[0]) / (4 * ops * ranks * calls) if all(seen) else None


# ---- The machine -------------------------------------------------------------------------------------------------


def machine():
    """What the results depend on; nothing that names the host."""
    model = "unknown"
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith(("model name", "CPU part")):
            model = text.split(":", 1)[1].strip()
            break
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            caches[f"L{level}"] = size
    system = os.uname()
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {"cpu": model, "cores": CORES, "caches": caches, "memory_GiB": round(memory_bytes() / 2**30, 1),
            "kernel": f"{system.sysname} {system.release}", "architecture": system.machine,
            "load_at_start": os.getloadavg()[0],
            "transparent_hugepage": huge.read_text().strip() if huge.exists() else "none",
            "compiler": call([os.environ.get("CC", "cc"), "--version"]).splitlines()[0],
            "rustc": call([os.environ.get("RUSTC", "rustc"), "--version"]),
            "commit": call(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"])}


def memory_bytes():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sentence(description):
    """The machine in a line."""
    return (f"{description['cpu']}, {description['cores']} cores, {description['memory_GiB']} GiB, "
            f"{description['kernel']} {description['architecture']}")


def write_json(path, document, lists):
    """Writes a document with one line for each element of the named lists, so that it can be read and compared."""
    head = {key: value for key, value in document.items() if key not in lists}
    parts = [json.dumps(head, indent=1)[:-2]]
    for name in lists:
        lines = ",\n".join("  " + json.dumps(element, separators=(",", ":")) for element in document[name])
        parts.append(f' "{name}": [\n{lines}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(",\n".join(parts) + "\n}\n")
    print(f"written: {os.path.relpath(path)}")


def write_block(name, text):
    """Puts text between the marks of that name in docs/performance.md."""
    begin, end = f"<!-- {name}: begin, written by bench/{Path(sys.argv[0]).name} --record -->", f"<!-- {name}: end -->"
    page = PAGE.read_text()
    if begin not in page or end not in page:
        sys.exit(f"{PAGE.name}: expected lines '{begin}' and '{end}'")
    PAGE.write_text(re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n\n{text}\n\n{end}", page,
                           flags=re.DOTALL))
    print(f"written: {os.path.relpath(PAGE)}")
