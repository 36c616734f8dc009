"""The report's tables of language models: perplexity by method and length, dynamic k, cost, ablations."""

from report_rows import TITLES, Results, Row, missing, number, pick, quotient, select, table, values, with_ratio

Runs = dict[str, dict]


def trained_k(settings: dict) -> int | None:
    """The k that a run trains with; None where it has none."""
    return (settings.get("sea") or {}).get("k")


def title(run: str, settings: dict) -> str:
    k = trained_k(settings)
    return TITLES.get(run, run) + (f" (k = {k})" if k else "")


def after(results: Results, run: str, settings: dict) -> list[Row]:
    """Rows of a run after its training, at the k that it trained with."""
    return [row for row in select(results.rows, run=run, k=trained_k(settings)) if row["steps"]]


def dense_by_length(results: Results, *, trained: bool) -> dict[int, float]:
    """Perplexity of the dense model by length: continued, or as it was."""
    rows = select(results.rows, method="dense" if trained else "teacher")
    return {row["seq_len"]: row["value"] for row in rows}


def perplexity_section(results: Results, runs: Runs) -> list[str]:
    """Table 1: every method at the k that it trained with, and before its training."""
    lengths, longest = values(results.rows, "seq_len"), max(values(results.rows, "seq_len"))
    continued, teacher = (dense_by_length(results, trained=trained) for trained in (True, False))

    def line(name: str, rows: list[Row], base: dict[int, float]) -> list[str]:
        cells = [with_ratio(pick(rows, "value", seq_len=length), base.get(length)) for length in lengths]
        return [name, number(pick(rows, "keys_per_row", seq_len=longest), 1), *cells]

    header = ["", f"keys per row at {longest}", *map(str, lengths)]
    measured = [run for run in runs if after(results, run, runs[run])]
    lines = [line(TITLES["teacher"], select(results.rows, method="teacher"), continued)]
    lines += [line(title(run, runs[run]), after(results, run, runs[run]), continued) for run in measured]
    steps = " and ".join(map(str, values(select(results.rows, metric="perplexity"), "steps")[1:]))
    seeds = values(results.rows, "seed")
    paragraphs = [
        "## 1. Perplexity of a language model",
        f"{results.rows[0]['model']}; every method starts from its weights and trains for {steps or 0} steps on the "
        f"same windows of {' and '.join(map(str, values(results.rows, 'train_len')))} tokens. In parentheses the ratio "
        "to the dense model that trained for the same steps, below 1 is better than it. "
        f"{'One seed, so no spread is known' if len(seeds) == 1 else f'{len(seeds)} seeds'}; the text is the "
        f"{'/'.join(values(results.rows, 'split'))} split. Columns are lengths of the text in tokens.",
        *results.source(),
        table(header, lines),
        *missing([title(run, runs[run]) for run in runs if run not in measured], "no row in the file"),
        *perplexity_facts(results, runs, longest, continued, teacher),
    ]
    untrained = {run: select(results.rows, run=run, k=trained_k(runs[run]), steps=0) for run in runs if run != "dense"}
    lines = [line(title(run, runs[run]), rows, teacher) for run, rows in untrained.items() if rows]
    if lines:
        paragraphs += [
            "Before any training, as conversion leaves the model; in parentheses the ratio to the teacher:",
            table(header, lines),
        ]
    return paragraphs


def perplexity_facts(results: Results, runs: Runs, length: int, continued: dict, teacher: dict) -> list[str]:
    """What the table says of SEA at its longest length, and how the others compare there."""
    if "sea" not in runs or length not in continued:
        return []
    rows = select(after(results, "sea", runs["sea"]), seq_len=length)
    if not rows:
        return []
    ours, keys = rows[0]["value"], rows[0].get("keys_per_row")
    sentences = [
        f"At {length} tokens {title('sea', runs['sea'])} has perplexity {ours:.2f}: {ours / continued[length]:.3f} "
        f"times that of the dense model after the same training ({continued[length]:.2f})"
        + (f", {ours / teacher[length]:.3f} times the teacher's." if length in teacher else ".")
    ]
    if keys:
        sentences.append(
            f"A row attends exactly to {keys:.1f} keys, {rows[0]['density']:.1%} of those that it may see."
        )
    for run in runs:
        theirs = pick(after(results, run, runs[run]), "value", seq_len=length)
        if theirs and run not in ("sea", "dense"):
            sentences.append(f"The perplexity of {title(run, runs[run])} is {theirs / ours:.2f} times SEA's.")
    return [" ".join(sentences)]


def dynamic_k_section(results: Results, runs: Runs) -> list[str]:
    """Table 3: methods that were tested at several k, trained once."""
    paragraphs = ["## 3. Other k than in training", results.source_again(1)]
    continued = dense_by_length(results, trained=True)
    several = {run: rows for run in runs if len(values(rows := select(results.rows, run=run), "k")) > 1}
    for run, rows in several.items():
        trained, untrained = [row for row in rows if row["steps"]], select(rows, steps=0)
        lengths, pivot = values(trained, "seq_len"), common_length(rows)
        header = ["k", f"keys per row at {pivot}", f"kept mass at {pivot}", f"untrained at {pivot}"]
        lines = []
        for k in values(rows, "k"):
            place = {"k": k, "seq_len": pivot}
            line = [f"**{k}**" if k == trained_k(runs[run]) else str(k)]
            kept = pick(trained, "keys_per_row", **place), pick(trained, "kept_mass", **place)
            line += [number(kept[0], 1), number(kept[1], 3), number(pick(untrained, "value", **place), 2)]
            cells = [pick(trained, "value", k=k, seq_len=length) for length in lengths]
            lines.append(line + [with_ratio(cell, continued.get(n)) for cell, n in zip(cells, lengths, strict=True)])
        paragraphs += [
            f"{TITLES.get(run, run)}, trained once with the k in bold and tested with others; perplexity after "
            "training by length, in parentheses the ratio to the dense model after the same training. Kept mass is the "
            "share of the teacher's attention that falls on kept keys.",
            table([*header, *map(str, lengths)], lines),
        ]
    absent = [run for run in runs if runs[run].get("changes_k") and run not in several]
    return paragraphs + missing([TITLES.get(run, run) for run in absent], "no rows at several k in the file")


def common_length(rows: list[Row]) -> int:
    """The length at which most k were tested, the shortest of several."""
    return max(values(rows, "seq_len"), key=lambda length: (len(values(select(rows, seq_len=length), "k")), -length))


def cost_section(results: Results, runs: Runs) -> list[str]:
    """Table 5: what is read, and what training took beside the dense model."""
    dense = after(results, "dense", runs.get("dense", {}))
    longest = max(values(results.rows, "seq_len"))
    lines = []
    for run, settings in runs.items():
        rows = after(results, run, settings)
        if rows:
            at_longest = {"seq_len": longest}
            line = [title(run, settings), str(rows[0]["steps"])]
            for column, digits in (("keys_per_row", 1), ("pooled_per_row", 1), ("density", 4), ("kept_mass", 3)):
                line.append(number(pick(rows, column, **at_longest), digits))
            for column in ("train_seconds", "peak_mib"):
                own, theirs = rows[0].get(column), dense[0].get(column) if dense else None
                line.append(f"{number(own, 0)} ({quotient(own, theirs, 2)})")
            lines.append(line)
    header = [
        "",
        "steps",
        "keys per row",
        "pooled runs per row",
        "density",
        "kept mass",
        "training, seconds",
        "peak memory, MiB",
    ]
    share = results.parallel()
    together = f"up to {share} runs shared the device" if share > 1 else "one run at a time"
    return [
        "## 5. What it costs",
        "Keys per row, pooled runs that the far field reads beside them, density (kept keys over visible keys) and "
        f"kept mass at {longest} tokens; in parentheses the ratio to the dense model's training. Seconds include the "
        f"compilation of kernels, with {together}, and not always on one device: they compare roughly. Memory is what "
        "PyTorch allocated at most in training, the teacher included where there is one.",
        results.source_again(1),
        table(header, lines),
    ]


def ablation_section(results: Results, runs: Runs, base: str) -> list[str]:
    """Table 4: one change each from the run ``base``."""
    lengths = values(results.rows, "seq_len")
    rows = {run: [row for row in select(results.rows, run=run) if row["steps"]] for run in runs}
    compare = {length: pick(rows[base], "value", seq_len=length) for length in lengths}
    lines = []
    for run, settings in runs.items():
        if rows[run]:
            found = [pick(rows[run], "value", seq_len=length) for length in lengths]
            line = [settings.get("variant") or run]
            line += [with_ratio(value, compare[n]) for value, n in zip(found, lengths, strict=True)]
            for column, digits in (("keys_per_row", 1), ("kept_mass", 3)):
                line.append(number(pick(rows[run], column, seq_len=lengths[-1]), digits))
            lines.append([*line, number(rows[run][0].get("train_seconds"), 0)])
    header = ["change", *(f"perplexity at {length}" for length in lengths)]
    header += [f"keys per row at {lengths[-1]}", f"kept mass at {lengths[-1]}", "training, seconds"]
    steps = " and ".join(str(steps) for steps in values(results.rows, "steps") if steps)
    return [
        "## 4. Ablations",
        f"One change each, {steps} steps, k = {trained_k(runs[base])}; in parentheses the ratio to the first row. One "
        "seed and a short training: they say which parts matter, not how good the method gets.",
        *results.source(),
        table(header, lines),
        *missing([runs[run].get("variant") or run for run in runs if not rows[run]], "no row in the file"),
    ]
