"""The table that bench/run prints and records: medians of rounds, ratios, and whether the goals hold."""
import statistics

FLOORS = ["staged", "own-row", "in-place", "barrier", "wide", "added"]
MAIN = "rsbucket-output"  # results in the caller's memory, as the MPIs and the floors have them
# What a hypervisor calls a CPU may be half a core, and may change: then a barrier takes 0.04 to 0.06 microseconds, since
# a line stays in the cache that both share. From core to core it takes 0.2 and more.
APART_US = 0.12
NAMES = {"rsbucket": "rsbucket", "mpich": "MPICH", "openmpi": "Open MPI", "torch": "PyTorch"}


def summarize(documents):
    """{(section, row, workload): medians of the rounds in ms a pass, us a call where calls > 1}.

    A stranger takes a core for milliseconds at a time, many passes or none: what that costs is in the mean alone.
    """
    cells = {}
    for document in documents:
        middle = statistics.mean if document["section"] == "busy" else statistics.median
        for result in document["results"]:
            key = result["contender"]
            if document["contestant"] != "rsbucket":
                key = f"{document['contestant']} {key}"
            unit = 1e3 / result["calls"] if result["calls"] > 1 else 1
            cell = cells.setdefault((document["section"], key, result["workload"]), {
                "label": result["label"].replace("MPI", NAMES[document["contestant"]]), "what": result["what"],
                "bytes": result["bytes"], "ranks": document["ranks"], "unit": "us" if result["calls"] > 1 else "ms",
                "rounds": [], "cpu": [], "fastest": float("inf")})
            for begin in range(0, len(result["pass_ms"]), result["iters"]):
                turn = slice(begin, begin + result["iters"])
                cell["rounds"].append(middle(result["pass_ms"][turn]) * unit)
                cell["cpu"].append(middle(result["cpu_ms"][turn]) * unit)
            cell["fastest"] = min(cell["fastest"], min(result["pass_ms"]) * unit)
            if "memory" in result:
                cell["memory"] = {name: max(value, cell.get("memory", {}).get(name, 0))
                                  for name, value in result["memory"].items()}
    for cell in cells.values():
        cell["median"] = statistics.median(cell["rounds"])
        cell["cpu_median"] = statistics.median(cell["cpu"])
    return cells


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(one, other, of="rounds"):
    """The median of the rounds' quotients, since the machine's state may change from one round to the next."""
    return statistics.median(a / b for a, b in zip(one[of], other[of]))


def section_rows(cells, section):
    """The lines of one section's table: [label, texts...]; a workload's title has no texts."""
    present = [(key, workload) for part, key, workload in cells if part == section]
    floors = [floor for floor in FLOORS if any(key == floor for key, _ in present)]
    heading = ["", "median", "least", "most", "CPU", "GB/s", *[f"x {floor}" for floor in floors]]
    rows = []
    for workload in dict.fromkeys(workload for _, workload in present):
        keys = [key for key, other in present if other == workload]
        keys.sort(key=lambda key: (key in FLOORS, " " in key))  # rsbucket, its peers, the floors
        first = cells[section, keys[0], workload]
        unit = "us a call" if first["unit"] == "us" else "ms a pass"
        rows.append([f"{workload}: {first['what']}, {first['bytes'] / 1e6:.4g} MB a rank, {unit}"])
        for key in dict.fromkeys(keys):
            cell = cells[section, key, workload]
            scale = 1e6 if cell["unit"] == "ms" else 1e3
            texts = [cell["label"], *(number(v) for v in (cell["median"], min(cell["rounds"]), max(cell["rounds"]),
                                                          cell["cpu_median"])),
                     f"{cell['bytes'] / cell['median'] / scale:.3g}"]
            for floor in floors:
                other = cells.get((section, floor, workload))
                texts.append(f"{ratio(cell, other):.2f}" if other else "-")
            rows.append(texts)
    return heading, rows


def memory_rows(cells):
    """What a rank's memory was, by rsb_stats and by /proc."""
    heading = ["KiB of rank 0, the most of all rounds", "staging", "resident", "results", "private growth"]
    rows = []
    for (section, _, workload), cell in cells.items():
        if section == "memory":
            seen = cell["memory"]
            rows.append([f"{workload}: {cell['what']}", *(
                f"{seen[name] / 1024:.0f}"
                for name in ("staging_bytes_peak", "staging_resident", "buffer_bytes_peak", "private_growth"))])
    return heading, rows


def goals(cells):
    """(What should hold, value, limit), for all that was measured."""
    found = []

    def goal(text, limit, value):
        if value is not None:
            found.append((text, value, limit))

    def quotient(section, one, other, workload, of="rounds"):
        pair = [cells.get((section, key, workload)) for key in (one, other)]
        return ratio(*pair, of) if all(pair) else None

    for section in ("processes", "f16", "bf16"):
        goal(f"A, {section}: time / all rows staged", 1.4, quotient(section, MAIN, "staged", "A"))
        goal(f"A, {section}, inputs lent: time / own row from the input", 1.5,
             quotient(section, "rsbucket-output-borrow", "own-row", "A"))
        goal(f"B, {section}: time / all rows staged", 1.1, quotient(section, MAIN, "staged", "B"))
        goal(f"C, {section}: time / own row from the input", 1.15, quotient(section, MAIN, "own-row", "C"))
    flush, barrier = (cells.get(("processes", key, "D")) for key in (MAIN, "barrier"))
    if flush and barrier:
        pairs = list(zip(flush["rounds"], barrier["rounds"]))
        apart = [(a, b) for a, b in pairs if b >= APART_US]
        where = f"cores of their own ({len(apart)} of {len(pairs)} rounds)" if apart else "threads of one core"
        goal(f"D, processes: time / a barrier, ranks on {where}", 3, statistics.median(a / b for a, b in apart or pairs))
    goal("C, threads: time / summed in place", 1.1, quotient("threads", MAIN, "in-place", "C"))
    for workload in "ABC":
        two, four = (cells.get((section, MAIN, workload)) for section in ("processes", "crowded"))
        if two and four:
            a_byte = [cell["cpu_median"] / cell["bytes"] / cell["ranks"] for cell in (four, two)]
            goal(f"{workload}, more ranks than cores: CPU time a byte / that of a rank a core", 1.3,
                 a_byte[0] / a_byte[1])
    shares = sorted((cell["ranks"], cell["cpu_median"]) for (section, *_), cell in cells.items() if section == "share")
    if shares:
        goal("The same bytes a core by more ranks than cores: CPU time / that of a rank a core", 1.3,
             shares[-1][1] / shares[0][1])
    for section in ("processes", "crowded", "busy"):
        for workload in "ABCD":
            own = cells.get((section, MAIN, workload))
            peers = [cell["median"] for (part, key, other), cell in cells.items()
                     if part == section and other == workload and " " in key]
            if own and peers:
                goal(f"{workload}, {section}: time / the best peer's", 1, own["median"] / min(peers))
    for workload in "ABC":
        goal(f"{workload}, bf16: time of the average added to f32 / of the sum as f32", 1.05,
             quotient("fused", "rsbucket-added", "rsbucket-wide", workload))
    for (section, _, workload), cell in cells.items():
        if section == "memory":
            goal(f"{workload}: MiB of staging in the steady state", 4, cell["memory"]["staging_bytes_peak"] / 2**20)
    return found


def goal_rows(cells):
    return ["goal", "at most", "seen", "holds"], [
        [text, f"{limit:g}", f"{value:.2f}", "yes" if value <= limit else "no"] for text, value, limit in goals(cells)]


def as_text(heading, rows):
    width = max(len(row[0]) for row in [heading, *rows] if len(row) > 1) + 4
    columns = [max(len(row[i]) for row in [heading, *rows] if len(row) > 1) + 2 for i in range(1, len(heading))]
    lines = [heading[0].ljust(width) + "".join(text.rjust(w) for text, w in zip(heading[1:], columns))]
    for row in rows:
        if len(row) == 1:
            lines.append(row[0])
        else:
            lines.append(("  " + row[0]).ljust(width) + "".join(t.rjust(w) for t, w in zip(row[1:], columns)))
    return "\n".join(lines)


def as_markdown(heading, rows):
    def line(texts):
        return "| " + " | ".join(texts) + " |"

    lines = [line(heading), line(["---"] + ["---:"] * (len(heading) - 1))]
    lines += [line([f"**{row[0]}**"] + [""] * (len(heading) - 1)) if len(row) == 1 else line(row) for row in rows]
    return "\n".join(lines)
