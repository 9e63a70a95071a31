"""Tables of benchmarks.md and learning curves, from raw results: `python -m benchmark table` and `plot`.

A result is a folder with a run's result.json and its evaluations. Runs are averaged only if they differ in the seed
alone: same task, data (sha256), algorithm and training flags. If their lengths differ, each length has a row with all
seeds that reached it. Every mean comes with its individual scores.
"""

import difflib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

from utils import UserError, normalized_score, parse_task

HERE = Path(__file__).resolve().parent
RESULTS, FIGURES, PAGE = HERE / "results", HERE / "figures", HERE.parent / "benchmarks.md"
PUBLISHED = json.loads((RESULTS / "published.json").read_text())

# Our name -> name in published tables, in the order of our rows.
PRINTED = {
    "bc": "BC", "cql": "CQL", "romi_cql": "ROMI-CQL", "bcq": "BCQ", "fomi_bcq": "FOMI-BCQ", "romi_bcq": "ROMI-BCQ",
    "romi_bcq_first": "ROMI-BCQ", "romi_bcq_rbc": "ROMI-RBC-BCQ", "romi_bcq_cvae": "", "sac": "SAC", "mbpo": "MBPO",
    "mopo": "MOPO", "combo_cql": "CQL", "combo": "COMBO", "atac": "ATAC", "armor": "ARMOR", "bc_expert": "BC-exp",
    "uds_iql": "UDS", "sra_iql": "SRA", "uds_td3bc": "TD3BC", "sra_td3bc": "SRA+TD3BC", "uds_awac": "AWAC",
    "sra_awac": "SRA+AWAC", "uds_sacn": "SAC-N", "sra_sacn": "SRA+SAC-N",
}  # fmt: skip
# Flags that affect neither training nor evaluation, or have their own column.
UNSEEN = "env env-id exp-name seed dataset expert-dataset total-updates run-dir checkpoint-every log-every num-threads"
UNSEEN += " eval-every eval-episodes device dynamics-from warm-start-from track no-track"
UNSEEN += " wandb-project-name wandb-entity wandb-group"
ASIDE = {"on": "references", "select": "games", "diag": "games"}  # first word of a name -> its own table (ARMOR's)


# --- reading ---


def read(results):
    """A row per finished run; `curve`: update -> score, `gain`: update -> discounted return over ARMOR's reference."""
    rows = []
    for folder in sorted(file.parent for file in Path(results).glob("*/result.json")):
        result = json.loads((folder / "result.json").read_text())
        text = "".join(f.read_text() for f in (folder / "evals.jsonl", folder / "metrics.jsonl") if f.exists())
        lines = [json.loads(line) for line in text.splitlines() if '"eval/return"' in line]
        if not lines and not result["eval_episodes"]:
            continue
        if not lines or lines[-1]["eval/return"] != result["return_mean"]:
            raise UserError(f"{folder}: its evaluations do not end with that of result.json; collect the run again")
        task, data, end = result["task"], result["dataset"], folder.name.split("__")[3:]
        in_returns = result["normalized_score"] is None
        row = {k: result[k] for k in ("task", "algorithm", "seed", "updates")} | {"folder": folder.name}
        shas = [data["sha256"], data.get("expert", {}).get("sha256", ""), data.get("reference", "")]
        row |= {"sha": " ".join(shas), "data": in_words(task, end[0] if end else "")}
        row |= {"options": training_flags(result.get("command")), "episodes": result["eval_episodes"]}
        aside = ASIDE.get(row["algorithm"].split("_")[0], "") if "reference_return" in result else ""
        row["setting"] = "-".join(filter(None, [task.replace("/", "-"), aside or "imitation" * ("expert" in data)]))
        row["unit"] = "Return" if in_returns else "Score"
        row["script"] = result.get("script") or (result.get("command") or [""])[0]
        row["curve"] = {x["update"]: x["eval/return" if in_returns else "eval/normalized_score"] for x in lines}
        row["gain"] = {x["update"]: x.get("reference/discounted_improvement") for x in lines}
        if "discounted_improvement" in result:
            row["gain"][lines[-1]["update"]] = result["discounted_improvement"]
        theirs = result.get("reference_return")
        row["reference"] = theirs if theirs is None or in_returns else normalized_score(parse_task(task), theirs)
        rows.append(row)
    if not rows:
        raise UserError(f"{results}: no finished run there; see `python -m benchmark run` and `collect`")
    return pd.DataFrame(rows)


def in_words(task, source):
    """The data in words, from the end of a run's name."""
    if source == "generated" and task.startswith("maze2d"):
        return "D4RL's script"
    return "repaired data" if source.endswith("_repaired") else source or "D4RL's file"


def training_flags(command):
    """The flags of a command that affect training or evaluation, sorted."""
    if command is None:
        return ("not recorded",)  # of an old result
    flags = [flag.replace("=", " ").split() for flag in " ".join(["", *command[1:]]).split(" --")[1:]]
    flags = {k.replace("_", "-"): v for k, *v in flags}  # of repeated flags the last counts
    return tuple(sorted(" ".join([f"--{k}", *v]) for k, v in flags.items() if k not in UNSEEN.split()))


def differs(there, result, evals_there, evals):
    """How the existing result is a different run from `result`, or a longer one; "" if `result` continues it."""
    scripts = {r.get("script") or (r.get("command") or [None])[0] for r in (there, result)} - {None}
    old, new = [[(e["update"], e["eval/return"]) for e in map(json.loads, x)] for x in (evals_there, evals)]
    if there["dataset"]["sha256"] != result["dataset"]["sha256"]:
        return "other data"
    if there["seed"] != result["seed"] or len(scripts) > 1:
        return f"another seed or script ({there['seed']}, {' and '.join(sorted(scripts))})"
    if there["updates"] > result["updates"]:
        return f"more updates ({there['updates']})"
    return "" if new[: len(old)] == old else "other evaluations, so it is another run"


def cells(runs):
    """A row per number of updates for each group of runs that differ in the seed alone, with the seeds' scores."""
    rows, keys = [], ["setting", "task", "algorithm", "data", "sha", "options", "episodes", "unit"]
    for key, group in runs.groupby(keys, sort=False):
        if group.seed.duplicated().any():
            raise UserError(f"{', '.join(group.folder)}: two results of one seed that differ in nothing recorded")
        cut = not group.script.str.startswith("sra_").any()  # SRA's schedule depends on the length of a run
        for updates in sorted(group.updates.unique()):
            there = group[(group.updates >= updates) if cut else (group.updates == updates)].sort_values("seed")
            there = there[[updates in curve for curve in there.curve]]
            row = {"updates": updates, "seeds": [*there.seed], "curves": [*there.curve]}
            row["scores"] = [curve[updates] for curve in there.curve]
            row["tails"] = [last_ten(curve, updates) for curve in there.curve]
            row["over"] = [s - r for s, r in zip(row["scores"], there.reference, strict=True) if pd.notna(r)]
            row["gain"] = [g[updates] for g in there.gain if g[updates] is not None]
            rows += [dict(zip(keys, key, strict=True)) | row] if row["seeds"] else []
    table, order = pd.DataFrame(rows), {name: i for i, name in enumerate(PRINTED)}
    table["rank"] = [order.get(name, 99) for name in table.algorithm]
    return table.sort_values(["setting", "rank", "algorithm", "data", "sha", "options", "updates"], kind="stable")


def last_ten(curve, updates):
    """Mean of the last ten evaluations (of all, if fewer) up to `updates`."""
    return np.mean([y for x, y in curve.items() if x <= updates][-10:])


# --- tables ---


def interval(values):
    """95 % interval of the mean (Student's t)."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return np.mean(values) - half, np.mean(values) + half


def spread(values, each=False):
    """Mean ± standard deviation (n - 1), with the values in brackets."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    own = f" ({', '.join(f'{v:.1f}' for v in values)})" if each else ""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}{own}"


def published(task, algorithm, unit):
    """The published score, from a paper, else a reproduction, else a quotation; from the first table that has it."""
    tables, kinds = PUBLISHED["tables"], ("paper", "third_party_reproduction", "quoted_by_third_party")
    key = re.sub(r"-v\d$", "", task), PRINTED.get(algorithm), unit == "Return"
    found = [
        e for e in PUBLISHED["entries"] if (e["task"], e["algorithm"], tables[e["table"]]["unit"] == "return") == key
    ]
    if not found:
        return "-"
    e = min(found, key=lambda e: (kinds.index(tables[e["table"]]["kind"]), [*tables].index(e["table"])))
    return f"{e['mean']:.1f}" + ("" if e["std"] is None else f" ± {e['std']:.1f}") + f" ({e['table']})"


def markdown(frame):
    head, *lines = [f"| {' | '.join(line)} |\n" for line in ([*frame.columns], *frame.astype(str).values.tolist())]
    return "".join([head, "|---" * len(frame.columns) + "|\n", *lines])


def setting_table(rows):
    """Table of one setting. Flags, and the data, are below the table if all rows share them."""
    shared = set.intersection(*map(set, rows.options)) if len(rows) > 1 else set()
    hashes = rows.groupby("data").sha.nunique()
    data = [d + (f" {sha[:8]}" if hashes[d] > 1 else "") for d, sha in zip(rows.data, rows.sha, strict=True)]
    table = pd.DataFrame({"algorithm": rows.algorithm})
    if len(set(data)) > 1:
        table["data"] = data
    table["updates"] = rows.updates.map("{:,}".format).str.replace(",", " ")
    table["seeds"] = [", ".join(map(str, seeds)) for seeds in rows.seeds]
    table["last (each seed)"] = [spread(v, each=True) for v in rows.scores]
    table["95 %"] = ["{:.1f} to {:.1f}".format(*interval(v)) if len(v) > 2 else "-" for v in rows.scores]
    table["last ten (each seed)"] = [spread(v, each=True) for v in rows.tails]
    if rows.over.map(len).any():
        table["gain"] = [spread(v, each=True) for v in rows.over]
        table["discounted gain"] = [spread(v, each=True) for v in rows.gain]
    table["published"] = [published(r.task, r.algorithm, r.unit) for r in rows.itertuples()]
    own = [" ".join(flag for flag in flags if flag not in shared) for flags in rows.options]
    table["flags"] = [f"`{flags}`" if flags.startswith("--") else flags or "-" for flags in own]
    legend = f"{rows.unit.iloc[0]}, {' or '.join(map(str, sorted(rows.episodes.unique())))} episodes"
    legend += f"; {data[0]}, sha256 {rows.sha.iloc[0][:8]}" if len(set(data)) == 1 else ""
    legend += f"; all with `{' '.join(sorted(shared))}`" if shared else ""
    return f"{markdown(table)}\n{legend}.\n"


def reference_table(rows):
    """ARMOR beside given references, runs on_<reference>_b<beta>: gain in discounted return, in brackets scores."""
    table = rows.algorithm.str.extract(r"on_(?P<reference>.*)_b(?P<beta>.*)").astype({"beta": float})
    gains, scores = ([", ".join(f"{x:.1f}" for x in values) for values in rows[k]] for k in ("gain", "scores"))
    table["cell"] = [f"{g} ({s})" for g, s in zip(gains, scores, strict=True)]
    table["own"] = [np.mean(s) - np.mean(o) for s, o in zip(rows.scores, rows.over, strict=True)]
    own = table.groupby("reference").own.first().sort_values()
    wide = table.pivot(index="reference", columns="beta", values="cell").loc[own.index]
    wide.columns = [f"beta {beta:g}" for beta in wide.columns]
    wide.insert(0, "its score", own.map("{:.1f}".format))
    return markdown(wide.reset_index())


def game_table(runs):
    """Gains over the reference in ARMOR's select and diag games, means of the last three evaluations."""
    table = pd.DataFrame({"run": runs.algorithm})
    table["discounted"] = [np.mean([*gain.values()][-3:]) for gain in runs.gain]
    table["undiscounted"] = [np.mean([*c.values()][-3:]) - r for c, r in zip(runs.curve, runs.reference, strict=True)]
    table = table.sort_values("discounted")
    return markdown(table.assign(**{k: table[k].map("{:.1f}".format) for k in ("discounted", "undiscounted")}))


def claim_table(rows):
    """claims.json with our numbers: of each algorithm those of most seeds, among equals not on repaired data, then of
    the longest runs; all up to the last update at which all were evaluated."""
    order = [rows.seeds.map(len), rows.data != "repaired data", rows.updates]
    rows, lines = rows.iloc[np.lexsort(order[::-1])], []
    for claim in json.loads((HERE / "claims.json").read_text()):
        there = rows[rows.setting == claim["setting"]]
        best = [there[there.algorithm == name].iloc[-1] for name in claim["algorithms"]]
        updates = max(set.intersection(*(set(curve) for r in best for curve in r.curves))) if best else 0
        scores = [spread([last_ten(curve, updates) for curve in r.curves], each=True) for r in best]
        ours = [f"{r.algorithm} {re.sub(' ± [^ ]+', '', text)}" for r, text in zip(best, scores, strict=True)]
        ours = [f"{', '.join(ours)}; {updates // 1000}k"] if best else []
        theirs = ", ".join(published(r.task, r.algorithm, r.unit) for r in best)
        theirs = re.sub(r" (\(\S+\))(?=.*\1)", "", theirs) or "-"  # a source once, at its last number
        if claim["setting"].endswith("-references"):
            for words, gains in (("discounted", there.gain.explode()), ("in score", there.over.explode())):
                ours.append(f"ahead in {(gains > 0).sum()} of {len(gains)} runs {words}")
        lines.append([claim["claim"], ", ".join(ours), theirs, f"**{claim['verdict']}**: {claim['why']}"])
    return markdown(pd.DataFrame(lines, columns=["claim", "ours", "published", "verdict"]))


def case_study_table(results):
    lines, titles = [], "maze, run, updates, score, Eq. 5 executed, Eq. 5 imagined, model's error".split(", ")
    for file in sorted(Path(results).glob("case_study_*.json")):
        study = json.loads(file.read_text())
        maze = re.sub(r"^maze2d-|-v\d$", "", study["task"])
        maze += f", {in_words(study['task'], file.stem.split('__')[-1])}"
        for name, run in study["runs"].items():
            done, imagined = run["executed"], run.get("imagined", {"replay_error_1": None})
            row = [maze, name, f"{run['updates']:,}".replace(",", " ")]
            row += [rounded(done["score"], 1), *(rounded(x.get("discrepancy")) for x in (done, imagined))]
            lines.append([*row, rounded([imagined["replay_error_1"]])])
    return markdown(pd.DataFrame(lines, columns=titles)) if lines else ""


def rounded(mean_and_error, digits=3):
    return " ± ".join(f"{x:.{digits}f}" for x in mean_and_error or () if x is not None) or "-"


def speed_table(results):
    """Milliseconds per machine; float32, then bfloat16 if timed."""
    table = {}
    for file in sorted(Path(results).glob("speed_*.json")):
        for row in sorted(json.loads(file.read_text())["rows"], key=lambda row: row["case"]):
            ms, machine = f"{row['ms']:.{0 if row['ms'] > 99 else 1}f}", file.stem.removeprefix("speed_")
            cell = table.setdefault(row["case"].removesuffix(", bf16"), {})
            cell[machine] = f"{cell[machine]} / {ms}" if machine in cell else ms
    return markdown(pd.DataFrame(table).T.fillna("-").rename_axis("ms").reset_index()) if table else ""


def tables(results):
    """Name -> text of all tables."""
    runs = read(results)
    rows, made = cells(runs), {}
    for setting, group in rows.groupby("setting"):
        games = setting.endswith("-games")
        make = reference_table if setting.endswith("-references") else game_table if games else setting_table
        made[setting] = make(runs[runs.setting == setting] if games else group)
    quoted = {k: v["source"] for k, v in PUBLISHED["tables"].items() if any(f"({k})" in text for text in made.values())}
    made["sources"] = " ".join(f"{name}: {source}." for name, source in quoted.items()) + "\n"
    made |= {"case-study": case_study_table(results), "speed": speed_table(results)}
    made["claims"] = claim_table(rows) if Path(results).resolve() == RESULTS else ""
    return {name: text for name, text in made.items() if text}


def fill(page, made):
    """The page with the tables filled in between `<!-- table: NAME -->` and `<!-- end -->`."""
    marker = re.compile(r"<!-- table: (\S+) -->\n(?:(?!<!-- table: ).)*?<!-- end -->", re.S)
    if wrong := sorted(set(marker.findall(page)) ^ set(made)):
        what = "no place" if wrong[0] in made else "no results"
        raise UserError(f"{what} for the table {wrong[0]}; its markers: <!-- table: {wrong[0]} --> and <!-- end -->")
    return marker.sub(lambda match: f"<!-- table: {match[1]} -->\n{made[match[1]]}<!-- end -->", page)


def table(results: Path = RESULTS, page: Path = PAGE, check: bool = False):
    """Write the tables into benchmarks.md, between markers; tables of your own runs are printed.

    Args:
        results: folder of runs, or of results that `collect` copied
        page: with markers, for the results of this repository
        check: change nothing; exit with status 1 if the page does not match the results
    """
    made = tables(results)
    if results.resolve() != RESULTS and page == PAGE:
        return print("\n".join(f"## {name}\n\n{text}" for name, text in made.items()), end="")
    old = page.read_text()
    new = fill(old, made)
    if check and new != old:
        print("".join(difflib.unified_diff(*(t.splitlines(True) for t in (old, new)), str(page), "rebuilt", n=0)))
        print(f"error: {page} does not match the results; run `python -m benchmark table`", file=sys.stderr)
        sys.exit(1)
    page.write_text(new)
    print(f"{page}: {len(made)} tables {'up to date' if new == old else 'rebuilt'}")


def plot(results: Path = RESULTS, out: Path | None = None):
    """Learning curves, one figure per setting, one line per run; dashed: repaired data.

    Args:
        results: folder of runs, or of results that `collect` copied
        out: default: benchmark/figures, for other results <results>/figures
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out = out or (FIGURES if results.resolve() == RESULTS else results / "figures")
    out.mkdir(parents=True, exist_ok=True)
    runs, colors = read(results), plt.get_cmap("Dark2").colors + plt.get_cmap("Set1").colors
    for setting, group in runs[~runs.setting.str.contains("-(?:references|games)$")].groupby("setting"):
        figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
        names = [*PRINTED, *sorted(set(group.algorithm) - {*PRINTED})]
        for (name, data), kind in group.groupby(["algorithm", "data"]):
            color, line = colors[names.index(name) % len(colors)], "--" if data == "repaired data" else "-"
            label = f"{name}{f', {data}' if group.data.nunique() > 1 else ''}: {len(kind)} seed{'s' * (len(kind) > 1)}"
            for i, curve in enumerate(kind.curve):
                axes.plot(*zip(*curve.items(), strict=True), label="_" * (i > 0) + label, color=color, linestyle=line)
        axes.set(title=f"{setting}, every run", xlabel="gradient updates", ylabel=group.unit.iloc[0])
        axes.grid(alpha=0.3)
        figure.legend(fontsize=8, loc="outside right upper")
        figure.savefig(out / f"{setting}.png", dpi=100, metadata={"Software": None})
        plt.close(figure)
        print(out / f"{setting}.png")
