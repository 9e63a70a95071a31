"""Tables and pictures from raw results: `python benchmark.py table` and `plot`.

A result is a folder with a run's result.json and its evaluation lines. Runs are averaged in cells, and runs in one cell differ
in nothing but the seed: same task, data (source and sha256), algorithm, updates, evaluation, and flags that change training (one
that is the script's default is none). Commits may differ; what an older one did otherwise stands in a note.txt in the folder of
the result, one line, which sets the run apart and is printed beside its flags.
"""

import difflib
import functools
import itertools
import json
import re
import shlex
import statistics
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t
from scipy.stats import trim_mean

from suites import as_tokens, parse_flags, parsed
from utils import UserError

ROOT = Path(__file__).resolve().parent
ARMOR_BETA = 16.0  # default of algorithms/armor.py

# Flags that change neither training nor evaluation, or stand in a column of their own.
UNSEEN = {"env", "env-id", "exp-name", "seed", "dataset", "total-updates", "run-dir", "checkpoint-every", "log-every", "num-threads"}
UNSEEN |= {"track", "no-track", "device", "dynamics-from", "warm-start-from", "expert-dataset"}
UNSEEN |= {"wandb-project-name", "wandb-entity", "wandb-group"}
ALIASES = {"bellman-weight": "beta", "fit-weight": "lambda", "pairs-kept": "model-buffer-size"}  # armor.py takes both
IMITATION = "__imitation"  # ends the source of runs that get demonstrations and no rewards: they have tables of their own
# ... and that of runs with these names: they are no results, but settings are chosen by them, or a cause is looked for
ASIDE = {"select_": ("__selection", ", to choose settings by"), "diag_": ("__diagnosis", ", to find a cause by")}


@dataclass
class Cell:
    """Runs that may be averaged: they differ in nothing but the seed."""

    task: str
    source: str
    algorithm: str
    updates: int
    flags: tuple[str, ...]
    episodes: int
    data: str  # sha256
    given: str  # sha256 of the demonstrations or of the reference policy, where there are any
    normalized: bool
    runs: list  # (result, evaluations as (update, score)), by seed

    @property
    def last(self):
        return [points[-1][1] for _, points in self.runs if points]

    @property
    def setting(self):
        return {k: v for flag in self.flags if flag[:2] == "--" for k, v in parse_flags(shlex.split(flag)).items()}

    @property
    def reference(self):
        """ARMOR's reference policy, the folder of a run; None where it is the data or its clone, or was never evaluated."""
        path = self.setting.get("reference", ["bc"])[0]
        known = path not in ("bc", "data") and all("reference" in result for result, _ in self.runs)
        return path.removesuffix("/checkpoint.pt").rstrip("/") if known else None

    @property
    def besides(self):
        """Its flags but for reference and beta."""
        return tuple(flag for flag in self.flags if not flag.startswith(("--reference ", "--beta ")))

    @property
    def beta(self):
        """ARMOR's weight of the Bellman error: the smaller, the more pessimism relative to the reference."""
        return float(self.setting.get("beta", [ARMOR_BETA])[0])


@functools.cache
def is_default(script, tokens):
    """Does this one flag say what the script does without it? No, where the script or the flag is unknown today."""
    try:
        return parsed(script, tokens) == parsed(script, ())
    except (UserError, ModuleNotFoundError):
        return False


def training_flags(command):
    """The flags of a command that change training or evaluation, sorted; of an old result without a command: unknown."""
    if command is None:
        return ("not recorded",)
    flags = sorted((ALIASES.get(k, k), v) for k, v in parse_flags(command[1:]).items() if k not in UNSEEN)
    each = [tuple(as_tokens({k: v})) for k, v in flags]
    return tuple(shlex.join(tokens) for tokens in each if not is_default(Path(command[0]).stem, tokens))


def read_result(folder):
    """Its result.json."""
    try:
        return json.loads((folder / "result.json").read_text())
    except ValueError as e:
        raise UserError(f"{folder / 'result.json'}: not JSON ({e}); cut off while it was copied?") from None


def of(line, kind):
    """The values in a line of metrics whose names begin with `kind`, without it."""
    return {k.removeprefix(kind): v for k, v in line.items() if k.startswith(kind)}


def cells_of(folders):
    """The results in `folders`, in cells that share task, data, algorithm, updates and flags, ordered."""
    cells = {}
    for folder in folders:
        result = read_result(folder)
        file = next((folder / name for name in ("evals.jsonl", "metrics.jsonl") if (folder / name).exists()), None)
        if file is None:
            raise UserError(f"{folder}: no evals.jsonl beside result.json; `python benchmark.py collect` copies both")
        lines = [json.loads(line) for line in file.read_text().splitlines() if '"eval/' in line or '"reference/' in line]
        references, lines = ([line for line in lines if any(k.startswith(kind) for k in line)] for kind in ("reference/", "eval/"))
        normalized = result["normalized_score"] is not None
        points = [(line["update"], line["eval/normalized_score" if normalized else "eval/return"]) for line in lines]
        ends = (result["updates"], result["normalized_score" if normalized else "return_mean"])
        if result["eval_episodes"] and (not points or points[-1] != ends):
            raise UserError(f"{folder}: result.json and {file.name} disagree about the last evaluation; collect the run again")
        if references:  # ARMOR's, whose promise is an improvement on it
            result["reference"] = references[-1]["reference/normalized_score" if normalized else "reference/return"]
            result["improvement"] = ends[1] - result["reference"]
            result["discounted_improvement"] = references[-1].get("reference/discounted_improvement")  # None: of an older run
            result["discounted"] = tuple(x.get("discounted_return") for x in (of(lines[-1], "eval/"), of(references[-1], "reference/")))
        data, flags = result["dataset"], training_flags(result.get("command"))
        flags += ((folder / "note.txt").read_text().strip(),) if (folder / "note.txt").exists() else ()
        source = (data["source"] if data["source"] != "file" else data["id"]) + IMITATION * ("expert" in data)
        source += "".join(end for prefix, (end, _) in ASIDE.items() if result["algorithm"].startswith(prefix))
        shas = (data["sha256"][:12], data.get("expert", {"sha256": data.get("reference", "")})["sha256"][:12])
        key = (result["task"], source, result["algorithm"], result["updates"], flags, result["eval_episodes"], *shas, normalized)
        cells.setdefault(key, Cell(*key, [])).runs.append((result, points))
    for cell in cells.values():
        cell.runs.sort(key=lambda run: run[0]["seed"])
        seeds = [result["seed"] for result, _ in cell.runs]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{cell.task}, {cell.algorithm}: two results of one seed ({seeds}) in one cell")
    order = {name: i for i, name in enumerate(PRINTED)}
    return sorted(cells.values(), key=lambda c: (c.task, c.source, order.get(c.algorithm, 99), c.algorithm, c.updates, c.flags, c.data))


def of_one_kind(cells):
    """The cells of one task and source in groups that differ in the number of updates alone."""
    groups = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.algorithm, cell.flags, cell.episodes, cell.data, cell.given, cell.normalized), []).append(cell)
    return [*groups.values()]


def common_length(group):
    """The cells of one algorithm that differ in the number of updates alone, as one cell of them all at the smallest number; None
    where that is not what shorter runs would have printed: settings of SRA depend on the number of updates."""
    fewest = min(cell.updates for cell in group)
    runs = [(result, [xy for xy in points if xy[0] <= fewest]) for cell in group for result, points in cell.runs]
    longest = {result["seed"]: (result, points) for result, points in runs}  # of a seed that ran twice, the run that went on
    cuttable = all(points[-1:] and points[-1][0] == fewest for _, points in runs)
    cuttable = cuttable and all("sra_" not in (result.get("command") or ["sra_"])[0] for result, _ in runs)
    return replace(group[0], updates=fewest, runs=[longest[seed] for seed in sorted(longest)]) if len(group) > 1 and cuttable else None


# --- table ---

# Our name -> name in published tables (results/published.json), whose task names are D4RL's without the version.
PRINTED = {
    "bc": "BC", "bc_uniform": "BC", "cql": "CQL", "romi_cql": "ROMI-CQL", "bcq": "BCQ", "fomi_bcq": "FOMI-BCQ",
    "romi_bcq": "ROMI-BCQ", "romi_bcq_rbc": "ROMI-RBC-BCQ", "sac": "SAC", "mbpo": "MBPO", "mopo": "MOPO", "combo_cql": "CQL",
    "combo": "COMBO", "atac": "ATAC", "armor": "ARMOR", "bc_expert": "BC-exp", "uds_iql": "UDS", "sra_iql": "SRA",
    "uds_td3bc": "TD3BC", "sra_td3bc": "SRA+TD3BC", "uds_awac": "AWAC", "sra_awac": "SRA+AWAC", "uds_sacn": "SAC-N",
    "sra_sacn": "SRA+SAC-N",
}  # fmt: skip


@functools.cache
def published_numbers():
    return json.loads((ROOT / "results" / "published.json").read_text())


def published(task, algorithm, normalized):
    """What others printed for it, at most one entry a kind: the paper, who quotes it, who reproduced it. Of several tables of a
    kind the one that stands first in the file."""
    everything, found = published_numbers(), {}
    for name, table in everything["tables"].items():
        for entry in everything["entries"]:
            same = entry["task"] == re.sub(r"-v\d$", "", task) and entry["algorithm"] == PRINTED.get(algorithm)
            if same and entry["table"] == name and (table["unit"] == "normalized") == normalized:
                found.setdefault(table["kind"], entry | {"source": table["source"], "same_data": entry["version"] in (None, task[-2:])})
    return list(found.values())


def spread(values):
    """Mean, and the standard deviation of a sample (n - 1) where there is more than one value."""
    if not values:
        return "-"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def mean_interval(values):
    """Mean, and from three values on its 95 % interval by Student's t."""
    if len(values) < 3:
        return spread(values)
    low, high = student_t.interval(0.95, len(values) - 1, np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5 + 1e-12)
    return f"{np.mean(values):.1f} [{low:.1f}, {high:.1f}]"


GAINS = ["over its reference [95 %]", "in discounted return [95 %]"]
GAINED = "Over its reference: the last evaluation less that of ARMOR's reference policy; in discounted return: the same, in returns"


def gain_cells(results):
    """What ARMOR's runs gain over their reference: in the table's unit, and in discounted return where it was recorded."""
    discounted = [result["discounted_improvement"] for result in results]
    return [mean_interval([result["improvement"] for result in results]), mean_interval(discounted if None not in discounted else [])]


def iqm(strata, resamples=10_000):
    """Interquartile mean of all values, and its 95 % interval by the stratified bootstrap: seeds are drawn anew within each
    task (Agarwal et al. 2021, arXiv:2108.13264)."""
    rng = np.random.default_rng(0)
    drawn = np.concatenate([np.asarray(values)[rng.integers(len(values), size=(resamples, len(values)))] for values in strata], 1)
    low, high = np.percentile(trim_mean(drawn, 0.25, axis=1), [2.5, 97.5])
    return trim_mean(np.concatenate(strata), 0.25), low, high


def iqm_cell(strata):
    if min(map(len, strata)) < 3:
        return "-"
    return "{:.1f} [{:.1f}, {:.1f}]".format(*iqm(strata))


def markdown(titles, rows):
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def thousands(n):
    return f"{n:,}".replace(",", " ")


def in_words(source):
    kept, purpose = source, ""
    for end, words in ASIDE.values():
        if source.endswith(end):
            kept, purpose = source.removesuffix(end), words
    name = kept.removesuffix(IMITATION)
    return f"{name} data" + " without rewards, beside demonstrations" * (name != kept) + purpose


def code(flags):
    """Flags as code, a note as text."""
    given, notes = [flag for flag in flags if flag[:2] == "--"], [flag for flag in flags if flag[:2] != "--"]
    return ", ".join([f"`{' '.join(given)}`"] * bool(given) + notes) or "-"


def unit_of(cells):
    """What the numbers of a table are."""
    unit = "D4RL's normalised score" if any(cell.normalized for cell in cells) else "Return"
    return f"{unit}, {' or '.join(str(n) for n in sorted({cell.episodes for cell in cells}))} episodes an evaluation"


def task_table(cells):
    """One task on data from one source."""
    fewest = min(cell.updates for cell in cells)
    differ = any(cell.updates != fewest for cell in cells)
    shared = [flag for flag in cells[0].flags if len(cells) > 1 and flag[:2] == "--" and all(flag in cell.flags for cell in cells)]
    referred = any("reference" in result for cell in cells for result, _ in cell.runs)
    words = {"data": "data", "given": "experts or reference"}
    several = {name: len({getattr(cell, name) for cell in cells} - {""}) > 1 for name in words}
    rows = []
    for group in of_one_kind(cells):
        together = common_length(group)
        for cell in group + [together] * bool(together):
            tails = [np.mean([y for _, y in points[-10:]]) for _, points in cell.runs if points]
            row = [cell.algorithm, "after " * (cell is together) + thousands(cell.updates)]
            row += [", ".join(str(result["seed"]) for result, _ in cell.runs), spread(cell.last), iqm_cell([cell.last]), spread(tails)]
            row += [spread([dict(points)[fewest] for _, points in cell.runs if fewest in dict(points)])] if differ else []
            gains = [result for result, _ in cell.runs if "reference" in result and cell is not together]
            row += gain_cells(gains) if referred else []
            row += [", ".join(quotation(entry) for entry in published(cell.task, cell.algorithm, cell.normalized)) or "-"]
            hours = statistics.median(result["wall_time_s"] for result, _ in cell.runs) / 3600
            row += ["-" if cell is together else f"{hours:.1f} h"]
            apart = [f" ({words[name]} {getattr(cell, name)})" for name in words if several[name] and getattr(cell, name)]
            rows.append([*row, code(tuple(flag for flag in cell.flags if flag not in shared)) + "".join(apart)])
    titles = ["algorithm", "updates", "seeds", "last evaluation", "IQM [95 %]", "mean of the last 10"]
    titles += [f"at {thousands(fewest)}"] if differ else []
    titles += GAINS if referred else []
    legend = f"{unit_of(cells)}, mean ± standard deviation over seeds, on {in_words(cells[0].source)}"
    if not several["data"]:
        legend += f", {thousands(cells[0].runs[0][0]['dataset']['transitions'])} transitions, sha256 {cells[0].data}"
    legend += f". {GAINED}" if referred else ""
    legend += f". Flags of all: {code(shared)}" if shared else ""
    return markdown([*titles, "published", "wall time", "flags"], rows) + f"\n{legend}.\n"


def reference_table(cells):
    """ARMOR beside reference policies that are other runs."""
    rows, shared = [], [flag for flag in cells[0].besides if len(cells) > 1 and all(flag in cell.besides for cell in cells)]
    quality = {cell.reference: [] for cell in cells}
    for cell in cells:
        quality[cell.reference] += [result["reference"] for result, _ in cell.runs]
    for cell in sorted(cells, key=lambda cell: (np.mean(quality[cell.reference]), cell.reference, cell.beta)):
        gains, own = ([result for result, _ in cell.runs], [result["reference"] for result, _ in cell.runs])
        row = [cell.algorithm, f"`{cell.reference}`", spread(own), f"{cell.beta:g}", thousands(cell.updates)]
        row += [", ".join(str(result["seed"]) for result, _ in cell.runs), spread(cell.last)]
        rows.append([*row, *gain_cells(gains), code(tuple(flag for flag in cell.besides if flag not in shared))])
    titles = ["algorithm", "reference policy", "its score", "beta", "updates", "seeds", "last evaluation"]
    legend = f"{unit_of(cells)}, {GAINED[0].lower() + GAINED[1:]}"
    legend += f". Flags of all: {code(shared)}" if shared else ""
    return markdown([*titles, *GAINS, "flags"], rows) + f"\n{legend}.\n"


def quotation(entry):
    std, version = ("" if entry["std"] is None else f" ± {entry['std']:.1f}"), ("" if entry["same_data"] else f", {entry['version']} data")
    return f"{entry['mean']:.1f}{std} ({entry['table']}{version})"


def aggregate_table(cells):
    """Rows over all tasks on which an algorithm was run alike; '' if there is none with several. Data sources stay apart."""
    alike = {}
    for cell in cells:
        if cell.normalized and cell.last:
            alike.setdefault((cell.algorithm, cell.updates, cell.flags, cell.episodes), []).append(cell)
    rows = []
    for (algorithm, updates, flags, _), group in alike.items():
        tasks = [cell.task for cell in group]
        if 1 < len(set(tasks)) == len(tasks):
            entries = [published(task, algorithm, True) for task in tasks]
            names = [{entry["table"]: entry["mean"] for entry in found} for found in entries]
            known = [name for name in names[0] if all(name in other for other in names)]
            theirs = ", ".join(f"{np.mean([other[name] for other in names]):.1f} ({name})" for name in known)
            values = [cell.last for cell in group]
            row = [algorithm, thousands(updates), str(len(tasks)), str(sum(map(len, values))), iqm_cell(values)]
            rows.append([*row, f"{np.mean([np.mean(v) for v in values]):.1f}", theirs or "-", code(flags), ", ".join(tasks)])
    titles = ["algorithm", "updates", "tasks", "runs", "IQM [95 %]", "mean over tasks", "published mean", "flags", "which tasks"]
    return markdown(titles, rows) if rows else ""


def speed_table(file):
    facts = json.loads(file.read_text())
    rows = []
    for row in facts["rows"]:
        cells = [row["case"], f"{row['ms']:.2f}", f"{row['gflop']:.2f}", f"{row['gflop'] / row['ms'] * 1e3:.0f}"]
        cells += [f"{row['matrix_gflop_s']:.0f}", f"{row['share']:.0%}"]
        rows.append([*cells, *(f"{row[k]:g}" if row.get(k) else "-" for k in ("known_ms", "target_ms"))])
    legend = f"{facts['machine']}, {facts['device']}, {facts['threads']} threads{', compiled' * facts['compile']}, torch {facts['torch']}"
    legend += f", {facts['date']}" + (f" ({facts['note']})" if "note" in facts else "")
    return markdown(["case", "ms", "GFLOP", "GFLOP/s", "matrix rate", "share", "known ms", "target ms"], rows) + f"\n{legend}.\n"


def case_study_table(result):
    """Three tables of what case_study.py measured. A list is a mean and its standard error."""

    def cell(x):
        if isinstance(x, list):
            return cell(x[0]) + (f" ± {x[1]:.2g}" if x[1] is not None else "")
        return "-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)

    runs, data, parts = result["runs"].items(), result["data"], []
    head = ["run", "updates", "trajectories", "number", "score", "discrepancy (Eq. 5)", "of positions only, m"]
    numbers = [(n, r["updates"], what, r[what]) for what in ("imagined", "executed") for n, r in runs if what in r]
    rows = [[*name, x["trajectories"], x.get("score"), x["discrepancy"], x["discrepancy_positions"]] for *name, x in numbers]
    parts.append(("Average trajectory discrepancy, mean over trajectories ± standard error:", head, rows))
    head = ["run", "model", "steps", "chains", "RMSE of state", "of position, m", "of reward", "unexplained variance"]
    numbers = [([n, r["direction"], steps], a.values()) for n, r in runs for steps, a in r.get("held_out", {}).items()]
    rows = [[*name, *errors, None if explained is None else 1 - explained] for name, (*errors, explained) in numbers]
    parts.append(("Models on held-out rows (of a chain, the row it starts from is held out):", head, rows))
    head = ["run", "model", "chains", "h", "error after 1 step", "after h steps", "overlap a wall", "enter a wall"]
    keys = ("trajectories", "horizon", "replay_error_1", "replay_error_h", "overlaps_wall", "enters_wall")
    rows = [[n, r["direction"], *(r["imagined"][k] for k in keys)] for n, r in runs if "imagined" in r]
    rows.append(["data", None, data["wall_sample"], 1, None, None, data["overlaps_wall"], data["enters_wall"]])
    parts.append(("Imagined transitions in the true simulator, and shares of them at walls:", head, rows))
    return "\n".join(f"{title}\n\n{markdown(head, [[cell(x) for x in row] for row in rows])}" for title, head, rows in parts)


def tables(folders, measured=()):
    """Name -> text of every table that the results in `folders` make, and the measurements of speed and of the case study."""
    made, cells = {}, cells_of(folders)
    given, cells = ([cell for cell in cells if (cell.reference is not None) == there] for there in (True, False))
    for (task, source), group in itertools.groupby(given, lambda cell: (cell.task.replace("/", "-"), cell.source)):
        made[f"references__{task}__{source}"] = reference_table([*group])
    for (task, source), group in itertools.groupby(cells, lambda cell: (cell.task.replace("/", "-"), cell.source)):
        made[f"{task}__{source}"] = task_table([*group])
    for source in sorted({cell.source for cell in cells}):
        if text := aggregate_table([cell for cell in cells if cell.source == source]):
            made[f"aggregate__{source}"] = text
    if quoted := {entry["table"] for cell in cells for entry in published(cell.task, cell.algorithm, cell.normalized)}:
        rows = [[name, table["source"], table["kind"].replace("_", " ")] for name, table in published_numbers()["tables"].items()]
        made["published"] = markdown(["published", "where", "kind"], [row for row in rows if row[0] in quoted])
    studies = {file.stem: case_study_table(json.loads(file.read_text())) for file in measured if file.stem.startswith("case_study_")}
    return made | studies | {file.stem: speed_table(file) for file in measured if file.stem.startswith("speed_")}


def fill(page, made, name):
    """The page with each table between its markers."""
    marker = re.compile(r"<!-- table: (\S+) -->\n(?:(?!<!-- table: ).)*?<!-- end -->", re.S)
    found = marker.findall(page)
    if len(found) != page.count("<!-- table: "):
        raise UserError(f"{name}: a table begins and does not end; each needs <!-- table: NAME --> and <!-- end -->")
    if unknown := [table for table in found if table not in made]:
        raise UserError(f"{name}: no results for the table {unknown[0]}; there are {', '.join(made)}")
    if missing := [table for table in made if table not in found]:
        hint = f"write <!-- table: {missing[0]} --> and, below, <!-- end --> where it belongs; of your own runs alone: table --results runs"
        raise UserError(f"{name}: no place for a table; {hint}")
    return marker.sub(lambda match: f"<!-- table: {match[1]} -->\n{made[match[1]]}<!-- end -->", page)


def with_sections(page, made):
    """A page of one's own results with a section for every table: new ones at the end, without those of tables that are gone."""
    for name in re.findall(r"<!-- table: (\S+) -->", page):
        if name not in made:
            page = re.sub(rf"(## {re.escape(name)}\n\n)?<!-- table: {re.escape(name)} -->\n.*?<!-- end -->\n+", "", page, flags=re.S)
    missing = [name for name in made if f"<!-- table: {name} -->" not in page]
    return page + "".join(f"## {name}\n\n<!-- table: {name} -->\n<!-- end -->\n\n" for name in missing)


def results_in(results):
    folders = sorted(file.parent for file in results.glob("*/result.json"))
    if not folders:
        below = sorted({str(file.parents[1]) for file in results.glob("*/*/result.json")})
        hint = f"but in {', '.join(below)}" if below else "see `python benchmark.py run` and `collect`"
        raise UserError(f"{results}: no finished run there; {hint}")
    return folders


def table(results: Path = ROOT / "results", page: Path | None = None, check: bool = False):
    """Write the tables of all results into benchmarks.md, between markers (results elsewhere: into a page of their own there).

    Args:
        results: folder of runs, or of what `collect` copied of them
        page: None: benchmarks.md; for results elsewhere <results>/benchmarks.md, where sections come and go with the tables
        check: change nothing; end with status 1 if the page's tables are not those of the results
    """
    here = results.resolve() == ROOT / "results"
    own = not here and page is None
    page = page or (ROOT / "benchmarks.md" if here else results / "benchmarks.md")
    made = tables(results_in(results), sorted([*results.glob("case_study_*.json"), *results.glob("speed_*.json")]))
    old = page.read_text() if page.exists() else ""
    new = fill(with_sections(old, made) if own or not old else old, made, page)
    if not check:
        page.write_text(new)
        print(f"{page}: {', '.join(made)}")
    elif new != old:
        print("".join(difflib.unified_diff(*(t.splitlines(True) for t in (old, new)), str(page), "rebuilt", n=0)))
        again = "" if here else f" --results {results}"
        sys.exit(f"error: {page} is not what the results say; run `python benchmark.py table{again}`")
    else:
        print(f"{page}: as the results say, {len(made)} tables")


# --- plot ---


LINES = ("-", "--", ":", "-.")


def draw_curves(axes, cells, colours):
    """Learning curves of one task. Seeds of different length are averaged as far as all of them go; those that went on go on thinly."""
    kinds = of_one_kind(cells)
    for kind in kinds:
        together = common_length(kind)
        siblings = [other for other in kinds if other[0].algorithm == kind[0].algorithm]
        apart = [flag for flag in kind[0].flags if not all(flag in other[0].flags for other in siblings)]
        color = colours[kind[0].algorithm]
        for i, cell in enumerate([together] if together else kind):
            x = [update for update, _ in cell.runs[0][1]]
            y = np.array([[score for _, score in points] for _, points in cell.runs])
            label = f"{cell.algorithm}, {len(y)} seed{'s' * (len(y) > 1)}" + f", {thousands(cell.updates)}" * (len(kind) > 1)
            label = "\n".join(textwrap.wrap(" ".join([label, *apart]), 44, break_on_hyphens=False))
            line = LINES[(siblings.index(kind) + i) % len(LINES)]
            axes.plot(x, y.mean(0), marker="o", markersize=3, linewidth=1.5, label=label, color=color, linestyle=line)
            axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
        for result, points in itertools.chain(*(cell.runs for cell in kind)) if together else ():
            if len(rest := [(x, y) for x, y in points if x >= together.updates]) > 1:
                label, line = f"{result['algorithm']}, seed {result['seed']}", LINES[result["seed"] % len(LINES)]
                axes.plot(*zip(*rest, strict=True), linewidth=0.8, color=color, linestyle=line, label=label)


def plot(results: Path = ROOT / "results", out: Path | None = None):
    """Pictures of all results, PNG and SVG: learning curves of each task and data source (line: mean, band: smallest to largest
    over seeds), and last evaluations beside published numbers.

    Args:
        results: folder of runs, or of what `collect` copied of them
        out: None: figures/, for results elsewhere <results>/figures
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rewind"  # the same picture gives the same file
    import matplotlib.pyplot as plt

    out = out or (ROOT / "figures" if results.resolve() == ROOT / "results" else results / "figures")
    out.mkdir(parents=True, exist_ok=True)
    every_cell = cells_of(results_in(results))
    proper = [cell for cell in every_cell if not cell.source.endswith(tuple(end for end, _ in ASIDE.values()))]
    results_proper = [cell for cell in proper if cell.reference is None]
    cells = [cell for cell in every_cell if cell.reference is None and not cell.source.endswith(ASIDE["select_"][0])]  # with curves

    everything = [*PRINTED, *sorted({cell.algorithm for cell in cells} - PRINTED.keys(), key=lambda name: (name.startswith("diag_"), name))]
    palette = [colour for name in ("tab20", "Dark2", "Set2") for colour in plt.get_cmap(name).colors]
    colours = dict(zip(everything, itertools.cycle(palette), strict=False))  # the same in every picture

    def save(figure, name):
        figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
        figure.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
        print(out / f"{name}.png")

    for (task, source), group in itertools.groupby(cells, lambda cell: (cell.task, cell.source)):
        group = [cell for cell in group if cell.last]
        figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
        draw_curves(axes, group, colours)
        unit = "normalized score" if group and group[0].normalized else "return"
        axes.set(title=f"{task} ({in_words(source)})", xlabel="gradient updates", ylabel=unit)
        axes.grid(alpha=0.3)
        figure.legend(fontsize=8, title="line: mean over seeds\nband: smallest to largest", title_fontsize=8, loc="outside right upper")
        save(figure, f"{task.replace('/', '-')}__{source}")

    for (task, source), group in itertools.groupby(proper, lambda cell: (cell.task, cell.source)):
        games = {}  # what a line of the picture has in common -> [(beta, [(ARMOR's, its reference's) of every seed] of each panel)]
        for cell in group:
            results = [result for result, _ in cell.runs if "reference" in result]
            if results and float(cell.setting.get("model-ratio", ["1"])[0]):  # without a model it is ATAC
                alike = (cell.reference or "clone of the data", f"{thousands(cell.updates)} updates", *cell.besides, cell.data)
                scores = [(result["reference"] + result["improvement"], result["reference"]) for result in results]
                games.setdefault(alike, []).append((cell.beta, (scores, [result["discounted"] for result in results])))
        if any(alike[0] != "clone of the data" for alike in games):  # the clone beside the others only where it has several betas, too
            games = {alike: points for alike, points in games.items() if alike[0] != "clone of the data" or len(points) > 1}
        if len({alike[0] for alike in games}) < 2 and max(map(len, games.values()), default=0) < 3:
            continue  # a picture is of several references, or of several betas
        for points in games.values():
            points.sort(key=lambda point: point[0])
        ordered = sorted(games.items(), key=lambda item: np.mean([own for _, own in item[1][0][1][0]]))
        titles = ["last evaluation"]
        if all(None not in pair for points in games.values() for _, (_, pairs) in points for pair in pairs):
            titles.append("its discounted return")
        figure, panels = plt.subplots(1, len(titles), figsize=(6 * len(titles), 4.8), layout="constrained", squeeze=False)
        ticks = sorted({beta for points in games.values() for beta, _ in points})
        for k, (axes, title) in enumerate(zip(panels[0], titles, strict=True)):
            for i, (alike, points) in enumerate(ordered):
                apart = alike[1:] if sum(other[0] == alike[0] for other in games) > 1 else ()
                label = "\n".join(textwrap.wrap(" ".join(("ARMOR, reference:", *alike[:1], *apart)), 90, break_on_hyphens=False))
                seeds = [np.array(both[k]) for _, both in points]
                error = [np.std(pairs[:, 0], ddof=1) if len(pairs) > 1 else np.nan for pairs in seeds]  # of one seed no bar
                colour = plt.get_cmap("viridis")(i / max(1, len(games)))
                means, own = ([np.mean(pairs[:, column]) for pairs in seeds] for column in (0, 1))
                axes.errorbar([beta for beta, _ in points], means, error, color=colour, marker="o", markersize=4, capsize=3, label=label)
                axes.axhline(np.mean(own), color=colour, linestyle="--", linewidth=1)
            axes.set(xlabel="beta (the smaller, the more pessimism)", ylabel=title)
            axes.set_xscale("log" if ticks[0] else "symlog")
            axes.set_xticks(ticks, [f"{beta:g}" for beta in ticks], minor=False)
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
        figure.suptitle(f"{task} ({source} data)")
        legend = panels[0][0].get_legend_handles_labels()
        figure.legend(*legend, fontsize=8, title="dashed: the reference itself", title_fontsize=8, loc="outside lower center")
        save(figure, f"references__{task.replace('/', '-')}__{source}")

    for source in sorted({cell.source for cell in results_proper}):
        chosen, groups = {}, of_one_kind([cell for cell in results_proper if cell.source == source and cell.normalized and cell.last])
        together = [cell for cell in map(common_length, groups) if cell]
        for cell in sorted([*itertools.chain(*groups), *together], key=lambda cell: (len(cell.last), cell.updates)):
            chosen[cell.task, cell.algorithm] = cell  # the most seeds, of those the longest runs
        if not chosen:
            continue
        tasks, names = sorted({t for t, _ in chosen}), [name for name in everything if any(name == a for _, a in chosen)]
        width = 0.8 / len(names)
        size = max(7, 4 + 0.35 * len(names) * len(tasks)), 4.2 + 0.17 * len(names)
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        diamonds = []
        for i, name in enumerate(names):
            where = [(tasks.index(t) + (i - (len(names) - 1) / 2) * width, cell) for (t, a), cell in chosen.items() if a == name]
            x, means = [x for x, _ in where], [np.mean(cell.last) for _, cell in where]
            error = [np.std(cell.last, ddof=1) if len(cell.last) > 1 else 0 for _, cell in where]
            runs = sorted({(cell.updates, len(cell.last)) for _, cell in where})
            label = " or ".join(f"{thousands(n)} updates, {seeds} seed{'s' * (seeds > 1)}" for n, seeds in runs)
            axes.bar(x, means, width * 0.9, yerr=error, label=f"{name}, {label}", color=colours[name])
            diamonds += [(x, found[0]["mean"]) for x, cell in where if (found := published(cell.task, name, True))]
        if diamonds:
            axes.plot(*zip(*diamonds, strict=True), "kD", markersize=5, label="published, D4RL's data")
        names_of_tasks = [task.replace("-", "-\n", 1) for task in tasks]  # side by side they would overlap
        axes.set(title=f"last evaluation\n({in_words(source)})", ylabel="normalized score")
        axes.set_xticks(range(len(tasks)), names_of_tasks)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        figure.legend(fontsize=8, title="mean and standard deviation over seeds", title_fontsize=8, loc="outside lower center")
        save(figure, f"published__{source}")
