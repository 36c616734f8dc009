"""The report's table of GLUE and IMDb: mean and spread over seeds."""

import statistics

from report_rows import NONE, TITLES, Results, Row, mean, missing, number, select, spread, table

Runs = dict[str, dict]


def variant(row: Row) -> str:
    """What tells the methods of a task apart: the teacher has no variant."""
    return row.get("variant") or row["method"]


def variants(runs: Runs) -> dict[str, str]:
    """The teacher and the methods of all runs, in the order of the configuration, with their titles."""
    methods = {name: method or {} for settings in runs.values() for name, method in settings["methods"].items()}
    return {"teacher": TITLES["teacher"]} | {name: title(name, method) for name, method in methods.items()}


def title(name: str, method: dict) -> str:
    """As for people: the method, and its k if it has one."""
    name, k = method.get("method", name), method.get("sea", {}).get("k")
    return TITLES.get(name, name) + (f" (k = {k})" if k else "")


def tasks(runs: Runs) -> list[str]:
    return list(dict.fromkeys(settings["task"] for settings in runs.values()))


def scores(results: Results, name: str, task: str) -> dict[int, float]:
    """Per cent by seed."""
    return {row["seed"]: 100 * row["value"] for row in select(results.rows, task=task) if variant(row) == name}


def differences(results: Results, name: str, runs: Runs) -> list[float]:
    """For every seed that has all tasks in the file, the mean over them of the score minus that of the dense model."""
    pairs = [(scores(results, name, task), scores(results, "dense", task)) for task in tasks(runs)]
    pairs = [(ours, dense) for ours, dense in pairs if dense]
    seeds = sorted({settings["seed"] for settings in runs.values()})
    complete = [seed for seed in seeds if all(seed in ours and seed in dense for ours, dense in pairs)]
    return [statistics.mean(ours[seed] - dense[seed] for ours, dense in pairs) for seed in complete if pairs]


def glue_section(results: Results, runs: Runs) -> list[str]:
    """Table 2: scores, and what SEA keeps."""
    lines, costs = [], []
    for name, label in variants(runs).items():
        rows = [row for row in results.rows if variant(row) == name]
        if rows:
            cells = [spread(list(scores(results, name, task).values()), 1) for task in tasks(runs)]
            against = NONE if name in ("dense", "teacher") else spread(differences(results, name, runs), 2)
            lines.append([label, *cells, against])
        if any("keys_per_row" in row for row in rows):
            costs.append([label, *(kept(select(rows, task=task)) for task in tasks(runs))])
    seeds = {settings["seed"] for settings in runs.values()}
    return [
        "## 2. Sentence classification",
        f"{results.rows[0]['model']}; a teacher per task and seed, then every method from it, on the same batches. In "
        "per cent: Matthews correlation for CoLA, else accuracy, on the official development sets (for IMDb on a test "
        f"split of its own); mean ± standard deviation over up to {len(seeds)} seeds. The last column is the mean over "
        "tasks of the difference to the dense model that trained for the same steps with the same seed.",
        *results.source(),
        table(["", *tasks(runs), "minus dense"], lines),
        *missing(absent(results, runs), "no row in the file"),
        "Keys that a row attends to, in parentheses their share of the item's real tokens and the share of the "
        "teacher's attention that falls on them (means over seeds). Where both are 1, sentences are shorter than k:",
        table(["", *tasks(runs)], costs),
    ]


def kept(rows: list[Row]) -> str:
    """``keys (density, kept mass)``, means of rows of one task."""
    columns = ("keys_per_row", 1), ("density", 3), ("kept_mass", 3)
    keys, *shares = (number(mean(row.get(name) for row in rows), digits) for name, digits in columns)
    return NONE if keys == NONE else f"{keys} ({', '.join(shares)})"


def absent(results: Results, runs: Runs) -> list[str]:
    """Runs without a row, and methods that a run with rows lacks."""
    names = []
    for run, settings in runs.items():
        found = {variant(row) for row in select(results.rows, run=run)}
        lacking = [label for name, label in variants({run: settings}).items() if name not in found]
        if not found:
            names.append(f"all of {run}")
        elif lacking:
            names.append(f"{run} without {', '.join(lacking)}")
    return names
