"""benchmark.py, suites.py, report.py: tables by hand-worked numbers, runs that are skipped, resumed, fail and are killed."""

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import armor
import numpy as np
import pytest
import scipy.stats
import tyro
import yaml
from test_runs import data_file  # noqa: F401 - a fixture

import benchmark
import report
import suites
from suites import Job
from utils import Dataset, UserError, parse_task

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ROOT.parent / "shared" / "spec" / "paper_results.json"
SCRIPTS = sorted(p.stem for p in (ROOT / "algorithms").glob("*.py"))


# --- tables ---


def made_up(results, algorithm, seed, scores, task="hopper-medium-v2", source="d4rl", flags=(), every=1000, **more):
    """A result with an evaluation every 1000 updates; all else alike unless it is given."""
    updates = every * len(scores)
    result = {"task": task, "algorithm": algorithm, "seed": seed, "updates": updates, "normalized_score": scores[-1]}
    result |= {"return_mean": 10 * scores[-1], "eval_episodes": 10, "wall_time_s": 3600.0 * (1 + seed)}
    result |= {"dataset": {"id": task, "source": source, "sha256": "ab" * 32, "transitions": 1_234_567}}
    result |= {"command": ["x.py", "--env", task, "--seed", str(seed), *flags]} | more
    folder = results / f"{task}__{algorithm}__{seed}__{source}__{len(list(results.glob('*')))}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    rows = [{"update": every * (i + 1), "eval/normalized_score": y, "eval/return": 10 * y} for i, y in enumerate(scores)]
    if result["normalized_score"] is None:
        rows = [row | {"eval/normalized_score": None} for row in rows]
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tables(results):
    return report.tables(report.results_in(results))


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(titles, row, strict=True)) for row in rows]


def test_a_row_by_hand(tmp_path):
    for seed, last in enumerate((10.0, 20.0, 60.0)):
        made_up(tmp_path, "cql", seed, [100.0, 100.0, *[5.0] * 9, last], flags=["--gamma", "0.9", "--num-threads", str(seed)])
    (row,) = rows_of(tables(tmp_path)["hopper-medium-v2__d4rl"])
    assert row["algorithm"] == "cql" and row["updates"] == "12 000" and row["seeds"] == "0, 1, 2"
    assert row["last evaluation"] == "30.0 ± 26.5"  # sqrt((20² + 10² + 30²) / 2) = 26.46
    # of three values a quarter is none; 1 draw in 27 is three times the smallest, more than 2.5 %
    assert row["IQM [95 %]"] == "30.0 [10.0, 60.0]"
    assert row["mean of the last 10"] == "7.5 ± 2.6"  # 5.5, 6.5, 10.5
    assert row["published"] == "66.6 ± 4.1 (ROMI-T2), 86.6 (ARMOR-T1), 59.1 ± 4.1 (OfflineRL-Kit)"
    assert row["wall time"] == "2.0 h" and row["flags"] == "`--gamma 0.9`"


def test_one_seed_has_no_spread_and_two_no_interval(tmp_path):
    for seed in (0, 1):
        made_up(tmp_path, "combo", seed, [4.0, 6.0 + seed])
    made_up(tmp_path, "mopo", 0, [3.0])
    mopo, combo = rows_of(tables(tmp_path)["hopper-medium-v2__d4rl"])
    assert mopo["last evaluation"] == "3.0" and combo["last evaluation"] == "6.5 ± 0.7"
    assert mopo["IQM [95 %]"] == combo["IQM [95 %]"] == "-"
    assert mopo["at 1 000"] == "3.0" and combo["at 1 000"] == "4.0 ± 0.0"  # where the shortest ended


def test_seeds_of_different_length_meet_where_the_shortest_ends(tmp_path):
    made_up(tmp_path, "bcq", 0, [1.0, 7.0, 50.0])
    for seed in (1, 2):
        made_up(tmp_path, "bcq", seed, [2.0, 7.0 + seed])
    made_up(tmp_path, "bcq", 2, [5.0, 5.0], flags=["--gamma", "0.9"])  # no seed of theirs
    made_up(tmp_path, "sra_iql", 0, [1.0, 2.0], command=["algorithms/sra_iql.py"])
    made_up(tmp_path, "sra_iql", 1, [1.0], command=["algorithms/sra_iql.py"])
    shorter, longer, together, other, *sra = rows_of(tables(tmp_path)["hopper-medium-v2__d4rl"])
    assert (shorter["seeds"], longer["seeds"], longer["last evaluation"]) == ("1, 2", "0", "50.0") and other["flags"] == "`--gamma 0.9`"
    assert (together["updates"], together["seeds"], together["wall time"]) == ("after 2 000", "0, 1, 2", "-")
    assert together["last evaluation"] == "8.0 ± 1.0" and together["IQM [95 %]"] == "8.0 [7.0, 9.0]"
    assert together["mean of the last 10"] == "4.8 ± 0.8"  # 4, 5, 5.5
    assert [row["updates"] for row in sra] == ["1 000", "2 000"]  # its rounds are spread over the updates: not comparable


def test_collected_runs_bring_their_improvement_over_a_reference(tmp_path):
    for seed, (last, reference) in enumerate(((20.0, 10.0), (30.0, 18.0), (40.0, 20.0))):
        folder = made_up(tmp_path / "runs", "armor", seed, [15.0, last])
        ref = [{"update": u, "reference/return": 100.0, "reference/normalized_score": reference} for u in (1000, 2000)]
        ref[1]["reference/discounted_improvement"] = 1.0 + seed
        lines = [*(folder / "evals.jsonl").read_text().splitlines(), json.dumps({"update": 5, "losses/critic": 1.0}), *map(json.dumps, ref)]
        (folder / "evals.jsonl").unlink()
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    made_up(tmp_path / "runs", "cql", 0, [1.0, 2.0])
    shutil.move(next((tmp_path / "runs").glob("*cql*")), tmp_path / "results" / "cql")
    benchmark.collect(tuple((tmp_path / "runs").iterdir()), tmp_path / "results")
    copied = next((tmp_path / "results").glob("*armor__0*")) / "evals.jsonl"
    assert [json.loads(line)["update"] for line in copied.read_text().splitlines()] == [1000, 2000, 1000, 2000]
    cql, armor = rows_of(tables(tmp_path / "results")["hopper-medium-v2__d4rl"])
    # 10, 12, 20: mean 14, standard deviation 5.29, t(2 degrees) = 4.303, 14 +- 13.1
    assert armor["over its reference [95 %]"] == "14.0 [0.9, 27.1]" and cql["over its reference [95 %]"] == "-"
    assert armor["in discounted return [95 %]"] == "2.0 [-0.5, 4.5]" and cql["in discounted return [95 %]"] == "-"  # 1, 2, 3; 4.303 / 3^.5


def test_collect_replaces_a_result_by_the_same_run_only(tmp_path, capsys):
    """A toy run under the name of a published one must not take its place."""
    results = tmp_path / "results"

    def run(scores, *flags, **more):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        folder = made_up(tmp_path / "runs", "mopo", 0, scores, flags=flags, **more)
        (folder / "evals.jsonl").rename(folder / "metrics.jsonl")
        benchmark.collect((tmp_path / "runs",), results)
        return json.loads(next(results.glob("*/result.json")).read_text())["normalized_score"], "".join(capsys.readouterr())

    assert run([1.0, 2.0]) == (2.0, "hopper-medium-v2__mopo__0__d4rl__0: normalized score 2.0 (new)\n")
    assert run([1.0, 2.0])[1].endswith("(unchanged)\n")
    assert run([1.0, 2.0, 3.0, 4.0]) == (4.0, "hopper-medium-v2__mopo__0__d4rl__0: normalized score 4.0 (replaces normalized score 2.0)\n")
    (next(results.glob("*")) / "note.txt").write_text("by another code\n")
    for score, why in (
        (run([9.0]), "4000 updates"),
        (run([1.0, 2.0, 3.0, 9.0]), "other evaluations"),  # as long, but made anew
        (run([9.0] * 5), "other evaluations"),
        (run([9.0] * 5, command=None), "flags that were not recorded"),
        (run([9.0] * 5, "--horizon", "1"), "other flags (none)"),
        (run([9.0] * 5, dataset={"id": "x", "source": "d4rl", "sha256": "cd" * 32, "transitions": 4_000}), "other data"),
    ):
        assert score[0] == 4.0 and f"left out, results has one with {why}" in score[1] and "; --force" in score[1]
    assert next(results.glob("*/note.txt")).exists()
    benchmark.collect((tmp_path / "runs",), results, force=True)
    assert json.loads(next(results.glob("*/result.json")).read_text())["normalized_score"] == 9.0
    assert not [*results.glob("*/note.txt")]  # it was about the other run
    next(results.glob("*/result.json")).write_text('{"task": ')
    with pytest.raises(UserError, match=r"result\.json: not JSON"):
        benchmark.collect((tmp_path / "runs",), results)
    with pytest.raises(UserError, match="neither"):
        benchmark.collect((tmp_path,), results)
    with pytest.raises(UserError, match=f"no finished run there; but in {results}"):
        report.table(tmp_path)


def test_armor_beside_several_references_has_a_table_and_a_picture_of_its_own(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    def game(seed, last, reference, *flags):
        folder = made_up(tmp_path / "results", "armor", seed, [15.0, last], flags=flags)
        line = {"update": 2000, "reference/return": 100.0, "reference/normalized_score": reference}
        (folder / "evals.jsonl").write_text((folder / "evals.jsonl").read_text() + json.dumps(line) + "\n")

    for seed in (0, 1):
        game(seed, 30.0 + seed, 40.0, "--reference", "runs/good", "--beta", "4")
    game(0, 12.0, 10.0, "--reference=runs/bad/checkpoint.pt", "--gamma", "0.9")
    game(0, 13.0, 10.0, "--reference", "runs/bad", "--beta", "2")  # another gamma: another line
    game(0, 90.0, 10.0, "--reference", "runs/bad", "--model-ratio", "0")  # ATAC: no line
    made_up(tmp_path / "results", "armor", 3, [1.0, 2.0], flags=["--reference", "runs/bad"])  # never evaluated: in the task's table
    game(0, 20.0, 8.0)  # the clone of the data: in the table of the task
    game(0, 25.0, 8.0, "--bellman-weight", "1")
    made = tables(tmp_path / "results")
    assert [row["over its reference [95 %]"] for row in rows_of(made["hopper-medium-v2__d4rl"])] == ["12.0", "17.0", "-"]
    other, bad, _, good = rows_of(made["references__hopper-medium-v2__d4rl"])
    assert bad["reference policy"] == other["reference policy"] == "`runs/bad`" and other["beta"] == "2"
    assert bad["beta"] == "16" == f"{armor.Args.bellman_weight:g}" and bad["algorithm"] == "armor"
    assert bad["flags"] == "`--gamma 0.9`" and bad["over its reference [95 %]"] == "2.0"
    assert bad["in discounted return [95 %]"] == "-"  # of a run from before it was recorded
    assert (
        good["its score"] == "40.0 ± 0.0" and good["last evaluation"] == "30.5 ± 0.7" and good["over its reference [95 %]"] == "-9.5 ± 0.7"
    )
    drawn = []
    for name in ("errorbar", "axhline"):
        plain = getattr(Axes, name)
        monkeypatch.setattr(Axes, name, lambda self, *a, name=name, plain=plain, **k: drawn.append((name, a)) or plain(self, *a, **k))
    report.plot(tmp_path / "results", tmp_path / "pictures")
    lines = [a for name, a in drawn if name == "errorbar" and len(a) == 3]  # bar() calls it as well
    one = pytest.approx(np.nan, nan_ok=True)  # a seed alone has no bar
    own, others = [([1.0, 16.0], [25.0, 20.0], [one, one])], [([2.0], [13.0], [one]), ([16.0], [12.0], [one])]
    assert lines == [*own, *others, ([4.0], [30.5], [pytest.approx(0.5**0.5)])]
    assert [a for name, a in drawn if name == "axhline"] == [(8.0,), (10.0,), (10.0,), (40.0,)]
    assert (tmp_path / "pictures" / "references__hopper-medium-v2__d4rl.png").exists()
    for i, folder in enumerate(sorted((tmp_path / "results").glob("*armor*"))):
        lines, more = (
            (folder / "evals.jsonl").read_text().splitlines(),
            ({"eval/discounted_return": 50.0 + i}, {"reference/discounted_return": 49.0}),
        )
        if len(lines) == 3:
            lines[1:] = [json.dumps(json.loads(line) | extra) for line, extra in zip(lines[1:], more, strict=True)]
            (folder / "evals.jsonl").write_text("\n".join(lines) + "\n")
    drawn.clear()
    report.plot(tmp_path / "results", tmp_path / "pictures")
    lines = [a for name, a in drawn if name == "errorbar" and len(a) == 3]
    assert len(lines) == 8 and lines[0] == own[0] and all(50 <= y < 70 for _, ys, _ in lines[4:] for y in ys)
    assert [a for name, a in drawn if name == "axhline"] == [(8.0,), (10.0,), (10.0,), (40.0,), *[(49.0,)] * 4]
    for folder in (tmp_path / "results").glob("*"):
        if "--reference" in (folder / "result.json").read_text():
            shutil.rmtree(folder)
    report.plot(tmp_path / "results", tmp_path / "none")  # two betas of one reference are no picture
    assert not [*(tmp_path / "none").glob("references*")]


def test_interquartile_mean_and_its_interval():
    assert report.iqm([[1, 2, 3, 4, 5, 6, 7, 100]])[0] == 4.5  # 3, 4, 5, 6 are left
    a, b = [1.0, 2.0, 3.0], [10.0, 20.0, 60.0]
    middle, low, high = report.iqm([a, b])
    assert middle == pytest.approx((2 + 3 + 10 + 20) / 4)
    # every way to draw three seeds of each task anew
    exact = [np.mean(np.sort([*x, *y])[1:5]) for x in itertools.product(a, repeat=3) for y in itertools.product(b, repeat=3)]
    assert low == pytest.approx(np.percentile(exact, 2.5), abs=0.35) and high == pytest.approx(np.percentile(exact, 97.5), abs=0.35)
    values = np.random.default_rng(1).normal(50, 10, (3, 8))
    theirs = scipy.stats.bootstrap(
        list(values), lambda x, y, z, axis: scipy.stats.trim_mean(np.concatenate([x, y, z], axis), 0.25, axis), method="percentile",
        n_resamples=10_000, vectorized=True, rng=2,
    ).confidence_interval  # fmt: skip
    assert report.iqm(values)[1:] == pytest.approx(theirs, abs=0.3)
    assert report.iqm(values) == report.iqm(values)


OTHERS = [
    {"source": "bundled"}, {"scores": [2.0, 2.0]}, {"flags": ["--gamma", "0.9"]}, {"eval_episodes": 20}, {"task": "hopper-expert-v2"},
    {"dataset": {"id": "x", "source": "d4rl", "sha256": "cd" * 32, "transitions": 1}}, {"command": None},
    {"dataset": {"id": "x", "source": "d4rl", "sha256": "ab" * 32, "transitions": 1, "expert": {"sha256": "ef" * 32}}},
    {"dataset": {"id": "x", "source": "d4rl", "sha256": "ab" * 32, "transitions": 1, "reference": "ef" * 32}}, {"note": "of old"},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_runs_that_differ_are_never_averaged(tmp_path, other):
    made_up(tmp_path, "cql", 0, [1.0])
    folder = made_up(tmp_path, "cql", 1, **({"scores": [2.0]} | other))
    if "note" in other:
        (folder / "note.txt").write_text(other["note"])
        assert [row["flags"] for row in rows_of(tables(tmp_path)["hopper-medium-v2__d4rl"])] == ["-", "of old"]
    cells = report.cells_of([*report.results_in(tmp_path)])
    assert sorted(cell.last for cell in cells) == [[1.0], [2.0]]
    rows = [row for name, text in tables(tmp_path).items() if "hopper" in name for row in rows_of(text)]
    for row in (row for row in rows if not row["updates"].startswith("after ")):  # where a longer run was as short as the other
        assert row["seeds"] in "01" and "±" not in row["last evaluation"]
    (folder / "result.json").write_text((folder / "result.json").read_text().replace('"seed": 1', '"seed": 0'))
    assert len(report.cells_of(report.results_in(tmp_path))) == 2  # one seed may stand in two rows,


def test_one_seed_counts_once(tmp_path):
    made_up(tmp_path, "cql", 0, [1.0])
    made_up(tmp_path, "cql", 0, [2.0])  # but not twice in one
    with pytest.raises(UserError, match="two results of one seed"):
        tables(tmp_path)


def test_flags_that_change_no_update_do_not_divide(tmp_path):
    made_up(tmp_path, "cql", 0, [1.0], flags=["--run-dir", "a", "--bf16", "--hidden", "3", "4"])
    made_up(tmp_path, "cql", 1, [2.0], flags=["--hidden", "3", "4", "--track", "--bf16", "--dynamics_from=b", "--checkpoint-every", "7"])
    (row,) = rows_of(tables(tmp_path)["hopper-medium-v2__d4rl"])
    assert row["seeds"] == "0, 1" and row["flags"] == "`--bf16 --hidden 3 4`"
    command = "armor.py --env x --bellman-weight 2 --fit-weight 10000 --gamma 0.99 --model-ratio 0.5 --no-bf16 --hidden 7"  # rest: defaults
    assert report.training_flags(shlex.split(command)) == ("--beta 2", "--hidden 7")
    for script in SCRIPTS:
        assert {name.replace("_", "-") for name in importlib.import_module(script).BOOKKEEPING} <= report.UNSEEN


def test_tasks_without_reference_show_returns(tmp_path):
    made_up(tmp_path, "mopo", 0, [1.5, 2.5], task="halfcheetah-jump-v1", source="generated", normalized_score=None)
    text = tables(tmp_path)["halfcheetah-jump-v1__generated"]
    assert rows_of(text)[0]["last evaluation"] == "25.0" and "Return" in text and "normalised" not in text
    assert rows_of(text)[0]["published"] == "4016.6 ± 144.0 (MOPO-slides-OOD)"


def test_imitation_has_a_table_and_a_picture_of_its_own(tmp_path):
    data = {"id": "x", "source": "generated", "sha256": "ab" * 32, "transitions": 5000}
    made_up(tmp_path, "bcq", 0, [1.0], task="maze2d-umaze-v1", dataset=data)
    made_up(tmp_path, "sra_iql", 0, [2.0], task="maze2d-umaze-v1", dataset=data | {"expert": {"sha256": "ef" * 32}})
    made = tables(tmp_path)
    texts = made["maze2d-umaze-v1__generated"], made["maze2d-umaze-v1__generated__imitation"]
    assert [[row["algorithm"] for row in rows_of(text)] for text in texts] == [["bcq"], ["sra_iql"]]
    assert [rows_of(text)[0]["published"] for text in texts] == ["41.1 ± 7.6 (ROMI-T3)", "155.0 ± 6.2 (SRA-main)"]
    assert ["on generated data, 5 000 transitions" in text for text in texts] == [True, False]
    assert "on generated data without rewards, beside demonstrations, 5 000 transitions" in texts[1]
    report.plot(tmp_path, tmp_path / "pictures")
    assert (tmp_path / "pictures" / "maze2d-umaze-v1__generated__imitation.png").exists()


def test_aggregate_over_tasks(tmp_path):
    scores = {"hopper-medium-v2": (1.0, 2.0, 3.0), "walker2d-medium-v2": (10.0, 20.0, 60.0)}
    for task, lasts in scores.items():
        for seed, last in enumerate(lasts):
            made_up(tmp_path, "cql", seed, [last], task=task)
            made_up(tmp_path, "combo", seed, [last, last][: 1 + (task == "hopper-medium-v2")], task=task)  # not alike
    made_up(tmp_path, "cql", 0, [99.0], task="halfcheetah-medium-v2", source="bundled")
    made = tables(tmp_path)
    (row,) = rows_of(made["aggregate__d4rl"])
    assert row["algorithm"] == "cql" and row["tasks"] == "2" and row["runs"] == "6" and row["mean over tasks"] == "16.0"
    assert row["IQM [95 %]"] == "{:.1f} [{:.1f}, {:.1f}]".format(*report.iqm([*scores.values()])) and row["IQM [95 %]"].startswith("8.8 [")
    assert "75.2 (ROMI-T2)" in row["published mean"]  # 66.6 and 83.8
    assert "aggregate__bundled" not in made


@pytest.fixture
def page(tmp_path):
    results = tmp_path / "results"
    made_up(results, "cql", 0, [1.0, 12.5])
    report.table(results)
    return results / "benchmarks.md"


def test_check_sees_a_changed_number(page, capsys):
    good = page.read_text()
    assert "12.5" in good and "<!-- end -->" in good
    report.table(page.parent, check=True)
    page.write_text(good.replace("12.5", "13.5"))
    with pytest.raises(SystemExit) as stopped:
        report.table(page.parent, check=True)
    assert stopped.value.code not in (0, None) and "-| cql | 2 000 | 0 | 13.5" in capsys.readouterr().out
    assert "13.5" in page.read_text()  # it only looks
    page.write_text(page.read_text() + "words around the table stay\n")
    report.table(page.parent)
    assert page.read_text() == good + "words around the table stay\n"
    made_up(page.parent, "bcq", 0, [1.0], task="maze2d-umaze-v1")
    for folder in page.parent.glob("hopper*"):
        shutil.rmtree(folder)
    report.table(page.parent)  # sections come and go with the tables
    said = page.read_text()
    assert "## maze2d-umaze-v1__d4rl\n\n<!-- table" in said and "hopper" not in said and "words around the table stay" in said


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- table: hopper-medium-v2__d4rl -->", "", "no place for a table"),
        ("<!-- end -->", "", "begins and does not end"),
        ("<!-- table: hopper-medium-v2__d4rl -->", "<!-- table: hopper__d4rl -->", "no results for the table hopper__d4rl"),
    ],
)
def test_markers_have_to_fit(page, old, new, message):
    page.write_text(page.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        report.table(page.parent, page)


def test_a_result_has_to_agree_with_its_curve(tmp_path):
    folder = made_up(tmp_path, "cql", 0, [1.0, 2.0])
    (folder / "result.json").write_text((folder / "result.json").read_text().replace('"normalized_score": 2.0', '"normalized_score": 3.0'))
    with pytest.raises(UserError, match="disagree"):
        tables(tmp_path)
    (folder / "evals.jsonl").unlink()
    with pytest.raises(UserError, match=r"no evals\.jsonl"):
        tables(tmp_path)


def test_the_committed_tables_are_those_of_the_committed_results():
    report.table(check=True)


def test_published_numbers_are_the_papers():
    (found,) = report.published("hopper-medium-replay-v2", "romi_cql", True)
    assert (found["mean"], found["std"], found["table"]) == (98.1, 2.6, "ROMI-T2")
    assert {row.name for row in suites.SUITES["paper"].rows} <= report.PRINTED.keys()
    size = (ROOT / "results" / "published.json").stat().st_size
    assert size < 60_000
    if not PAPERS.exists():
        pytest.skip("their source is not here")
    theirs = {
        (e["task"].rsplit("-v", 1)[0], e["algorithm"], e["table"], e["mean"], e["std"], e["unit"], e["kind"])
        for e in json.loads(PAPERS.read_text())["entries"]
    }
    numbers = report.published_numbers()
    for e in numbers["entries"]:
        about = numbers["tables"][e["table"]]
        assert (e["task"], e["algorithm"], e["table"], e["mean"], e["std"], about["unit"], about["kind"]) in theirs


def test_pictures_show_the_cells_and_are_the_same_every_time(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    for seed in range(3):
        made_up(tmp_path / "results", "cql", seed, [1.0, 2.0 + seed, 4.0 * seed])
    drawn = []
    for name in ("plot", "fill_between", "bar"):
        plain = getattr(Axes, name)
        monkeypatch.setattr(Axes, name, lambda self, *a, name=name, plain=plain, **k: drawn.append((name, a, k)) or plain(self, *a, **k))
    report.plot(tmp_path / "results", tmp_path / "a")
    (_, (x, mean), style), (_, (_, low, high), _), (_, (_, bars, _), errors), (_, diamonds, _) = drawn
    assert x == [1000, 2000, 3000] and mean.tolist() == [1, 3, 4] and style["label"] == "cql, 3 seeds"
    assert low.tolist() == [1, 2, 0] and high.tolist() == [1, 4, 8]
    assert bars == [4.0] and errors["yerr"] == [4.0] and diamonds[1] == (66.6,)
    report.plot(tmp_path / "results", tmp_path / "b")
    pictures = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert pictures == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    assert sorted(pictures) == [f"{stem}.{kind}" for stem in ("hopper-medium-v2__d4rl", "published__d4rl") for kind in ("png", "svg")]


def test_pictures_take_all_seeds_where_the_shortest_ended(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    for seed, scores in enumerate(([1.0, 2.0, 90.0], [1.0, 4.0], [1.0, 9.0])):
        made_up(tmp_path / "results", "bcq", seed, scores)
    made_up(tmp_path / "results", "select_b1", 10, [1.0, 50.0])  # no result: a table of its own, and no picture
    made_up(tmp_path / "results", "diag_b1", 0, [1.0, 60.0])  # nor this one: a table and curves of its own, no bar
    drawn = []
    for name in ("bar", "plot"):
        plain = getattr(Axes, name)
        monkeypatch.setattr(
            Axes, name, lambda self, *a, plain=plain, **k: drawn.append((*map(list, a[:2]), k["label"])) or plain(self, *a, **k)
        )
    report.plot(tmp_path / "results", tmp_path / "pictures")
    assert drawn == [
        ([1000, 2000], [1, 5], "bcq, 3 seeds, 2 000"), ([2000, 3000], [2, 90], "bcq, seed 0"),  # the one seed that went on
        ([1000, 2000], [1, 60], "diag_b1, 1 seed"),
        ([0.0], [5.0], "bcq, 2 000 updates, 3 seeds"),
    ]  # fmt: skip
    made = tables(tmp_path / "results")
    assert "select_b1" in made["hopper-medium-v2__d4rl__selection"] and "select_b1" not in made["hopper-medium-v2__d4rl"]
    assert "on d4rl data, to choose settings by, " in made["hopper-medium-v2__d4rl__selection"]
    assert "diag_b1" in made["hopper-medium-v2__d4rl__diagnosis"] and "diag_b1" not in made["hopper-medium-v2__d4rl"]
    assert "on d4rl data, to find a cause by, " in made["hopper-medium-v2__d4rl__diagnosis"]


# --- suites ---


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_run_of_a_suite_is_one_its_script_takes(name, tmp_path):
    suite = suites.SUITES[name]
    jobs = suites.expand(name, tmp_path)  # the scripts read and check the flags
    runs = [job for job in jobs if job.updates]
    assert len({job.folder for job in jobs}) == len({job.log for job in jobs}) == len(jobs)
    assert len(runs) == sum(len(row.tasks) * len(row.seeds or suite.seeds) for row in suite.rows if row.script in SCRIPTS)
    assert {row.script for row in suite.rows} >= set(SCRIPTS) and all(job.name.count("__") in (2, 3) for job in runs)
    above = set()
    for job in jobs:
        assert set(job.after) <= above
        above.add(job.name)


def test_who_borrows_a_model_would_have_trained_the_same(tmp_path):
    data = Dataset(*[None] * 7, sha256="x")

    def key(job):
        m = importlib.import_module(job.script)
        args = m.resolve(tyro.cli(m.Args, args=job.command[2:]), parse_task("hopper-medium-replay"))
        direction = re.search(r'model_key\("(\w+)"', Path(m.__file__).read_text())[1]
        return m.model_key(direction, args, data)

    borrowed = 0
    for name in suites.SUITES:
        jobs = {job.name: job for job in suites.expand(name, tmp_path, seeds=(0,))}
        for job in jobs.values():
            if "--dynamics-from" in job.command:
                lender = jobs[Path(job.command[job.command.index("--dynamics-from") + 1]).name]
                assert key(job) == key(lender) and lender.trains_model and not job.trains_model
                borrowed += 1
    assert borrowed >= 5


def test_printed_commands_come_in_groups_that_may_run_one_after_the_other(capsys):
    jobs = suites.expand("smoke")
    benchmark.run(benchmark.RunSuite("smoke", dry_run=True))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    groups = [range(int(a) - 1, int(b)) for a, b in re.findall(r"(\d+)-(\d+)", err)]
    assert [k for group in groups for k in group] == list(range(len(lines))) and len(lines) == len(jobs)
    group_of = {lines[k]: i for i, group in enumerate(groups) for k in group}
    line_of = {job.name: shlex.join(job.command) for job in jobs}
    assert any(job.after for job in jobs)
    assert all(group_of[line_of[name]] < group_of[line_of[job.name]] for job in jobs for name in job.after)


def test_expansion(tmp_path, monkeypatch):
    rows = [suites.Row("mopo", "mopo", ("hopper-medium",), "--bf16"), suites.Row("none", "no_such_script", ("hopper-medium",))]
    rows += [suites.Row("mbpo", "mopo", ("hopper-medium",), "--penalty-coef 0", model_of="mopo")]
    monkeypatch.setitem(suites.SUITES, "paper", suites.Suite(rows, flags="--gamma 0.9", seeds=(4, 5)))
    jobs = suites.expand("paper", tmp_path, threads=3, extra=["--gamma", "0.8", "--eval-every", "7"])
    assert [job.name for job in jobs] == [f"hopper-medium-v2__{name}__{seed}" for name in ("mopo", "mbpo") for seed in (4, 5)]
    assert jobs[0].command[1:] == shlex.split(
        "algorithms/mopo.py --env hopper-medium --exp-name mopo --dataset d4rl --gamma 0.8 --bf16 --num-threads 3 --eval-every 7 "
        f"--run-dir {tmp_path} --seed 4"
    )
    assert jobs[3].command[-2:] == ["--dynamics-from", str(jobs[1].folder)] and jobs[3].after == (jobs[1].name,)
    assert jobs[0].updates == 3_000_000 and jobs[0].folder == tmp_path / "hopper-medium-v2__mopo__4"
    assert [job.name for job in suites.expand("paper", tmp_path, only="mbpo__5")] == [jobs[1].name, jobs[3].name]  # and its lender
    assert [job.name for job in suites.expand("paper", tmp_path, seeds=(7,), extra=["--total-updates", "9"])] == [
        "hopper-medium-v2__mopo__7", "hopper-medium-v2__mbpo__7"
    ]  # fmt: skip
    assert [len(suites.expand("paper", tmp_path, only=words)) for words in ("mbpo__5 *mopo__4", "*mopo__?")] == [3, 2]
    assert suites.expand("smoke", tmp_path, only="__cql__", extra=["--cql-samples", "4"])  # of another script no flag
    with pytest.raises(UserError, match=r"^romi_bcq\.py does not take its flags: Unrecognized options: --cql-samples, 4"):
        suites.expand("smoke", tmp_path, only="bcq", extra=["--cql-samples", "4"])
    wrong = {"--gama": "does not take", "--gamma": "at most 1", "--dataset": "name it", "--seed": "see --only, --seeds"}
    for bad, message in zip((["--gama", "1"], ["--gamma", "2"], ["--dataset", "auto"], ["--seed", "1"]), wrong.values(), strict=True):
        with pytest.raises(UserError, match=message):
            suites.expand("paper", tmp_path, extra=bad)
    with pytest.raises(UserError, match="--only nothing"):
        suites.expand("paper", tmp_path, only="nothing")


def test_what_is_missing_or_senseless_is_said_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suites.utils, "GENERATED", tmp_path)
    jump = benchmark.RunSuite("paper", only="jump-v1__mopo__0", run_dir=tmp_path, dry_run=True)
    benchmark.run(jump)
    note = "note: its data have to be made first, in hours: python datasets/mujoco.py --env halfcheetah --kinds jump\n"
    assert note in capsys.readouterr().err
    (tmp_path / "halfcheetah_jump.hdf5").touch()
    benchmark.run(jump)
    assert "note: its data" not in capsys.readouterr().err
    for name in ("jobs", "threads"):
        with pytest.raises(UserError, match=f"--{name} 0: at least 1"):
            benchmark.run(replace(jump, **{name: 0}))


def test_hours_by_hand():
    job = Job("x", ["python", "x.py"], Path(), Path(), 1_000_000, row="mopo", script="mopo", trains_model=True)
    ms = {"mopo update": 3.6, "mopo rollout of 250 000 rows": 1800.0, "dynamics step": 9.0}
    assert suites.hours(job, ms) == pytest.approx(1.0 + 0.5 + 0.5)  # updates, 1000 rollouts, 200 000 steps
    assert suites.hours(replace(job, trains_model=False), ms) == pytest.approx(1.5)
    assert suites.hours(replace(job, command=["--bf16"], trains_model=False), ms | {"mopo update, bf16": 1.8}) == pytest.approx(1.0)
    assert suites.hours(job, {"mopo update": 3.6}) is None
    armor, ms = replace(job, row="armor", script="armor", trains_model=False), {"armor update": 7.2, "atac update": 3.6}
    assert suites.hours(armor, ms) == pytest.approx(job.updates * 7.2 / 3.6e6 + 0.1)  # the warm start is 100 000 updates of ATAC
    assert suites.hours(replace(armor, row="atac"), ms) == pytest.approx(job.updates * 3.6 / 3.6e6 + 0.1)
    sra = replace(job, row="sra_iql", script="sra_iql", command=["python", "x.py", "--dynamics-max-epochs", "3"])
    ms = {"iql update, 512 rows": 7.2, "sra model step": 3.6}
    assert suites.hours(sra, ms) == pytest.approx(2.0 + 3 * 3900 / 1e6)  # updates, three epochs of a million rows
    assert suites.hours(replace(sra, command=sra.command[:2]), ms) == pytest.approx(2.0 + 20 * 3900 / 1e6)
    timed = (ROOT / "benchmark.py").read_text()
    named = {case for cases in suites.CASES.values() for case in cases} - {"bc update"}  # cloning is not timed
    assert all(f'"{case}' in timed for case in named)


def test_sweeps_are_the_paper_suite_as_the_agent_will_type_it(monkeypatch, tmp_path):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    files = suites.sweeps()
    assert files == {p.name: p.read_text() for p in (ROOT / "sweeps").glob("*.yaml")}
    runs = {job.name for job in suites.expand("paper", tmp_path) if not job.name.endswith("__generated")}
    for text in files.values():
        sweep = yaml.safe_load(text)
        script = Path(sweep["program"]).stem
        if script not in SCRIPTS:
            continue
        m = importlib.import_module(script)
        assert sweep["method"] == "grid" and sweep["parameters"].keys() == {"env", "seed"}
        words = create_sweep_command([*sweep["command"]])[3:]
        filled = create_sweep_command_args({"args": {k: {"value": v["values"][0]} for k, v in sweep["parameters"].items()}})["args"]
        args = tyro.cli(m.Args, args=[w for word in words for w in (filled if word == "${args}" else [word])])
        assert args.track and args.dataset == "d4rl" and args.env == sweep["parameters"]["env"]["values"][0] and args.seed == 0
        for env, seed in itertools.product(*(sweep["parameters"][k]["values"] for k in ("env", "seed"))):
            task = parse_task(env)
            runs.remove(f"{task.slug}__{m.resolve(replace(args, env=env), task).exp_name}__{seed}")  # each of them once
    assert not runs


# --- run ---

FAKE = """
import json, pathlib, sys, time
folder, updates, fail_at, pace = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "starts", "a") as f: f.write(folder.name + "\\n")
at = folder / "at"
for i in range(int(at.read_text()) if at.exists() else 0, updates):
    if i == fail_at: sys.exit("error: no step " + str(i))
    print("step", i, flush=True); time.sleep(pace); at.write_text(str(i + 1))
(folder / "result.json").write_text(json.dumps({"updates": updates}))
"""


@pytest.fixture
def fake(tmp_path):
    """A job that counts up to `updates` in files, goes on where it was cut, and fails at a step if it is told to."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def job(name, updates=3, fail_at=-1, pace=0.0, after=()):
        folder = tmp_path / "runs" / name
        command = [sys.executable, "-S", str(script), str(folder), str(updates), str(fail_at), str(pace)]
        return Job(name, command, folder, tmp_path / "logs" / f"{name}.log", updates, after)

    return job


def starts(job):
    return (job.folder.parent / "starts").read_text().split()


def test_finished_runs_are_skipped_and_dependent_ones_wait(fake):
    done, more, lender, borrower = fake("done"), fake("more"), fake("lender", pace=0.1), fake("borrower", after=("lender",))
    for job, updates in ((done, 4), (more, 2)):  # one has gone on beyond what is asked
        job.folder.mkdir(parents=True)
        (job.folder / "result.json").write_text(json.dumps({"updates": updates}))
    assert benchmark.work_off([done, borrower, more, lender], 3, "test") == []
    assert sorted(starts(done)) == ["borrower", "lender", "more"] and starts(done)[-1] == "borrower"
    assert all(job.finished() for job in (done, more, lender, borrower))
    assert benchmark.work_off([done, borrower, more, lender], 3, "test") == [] and len(starts(done)) == 3


def test_a_failed_run_is_reported_with_its_last_lines_and_the_others_go_on(fake, capsys, monkeypatch):
    jobs = [fake("bad", updates=30, fail_at=20), fake("borrower", after=("bad",)), fake("good"), fake("liar")]
    jobs[3].command[4] = "2"  # ends well, but has made 2 updates of 3
    monkeypatch.setattr(benchmark.suites, "expand", lambda *a: jobs)
    monkeypatch.setattr(benchmark.report, "tables", lambda folders: {})
    with pytest.raises(SystemExit) as stopped:
        benchmark.run(benchmark.RunSuite("smoke", jobs=2))
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "bad: exit status 1" in said.err and "step 19\n    error: no step 20\n" in said.err and "step 5" not in said.err
    assert "borrower: not started, bad failed" in said.err and "liar: no result for 3 updates" in said.err
    assert "1 of 4 runs" in said.out and set(said.err.split("failed: ")[-1].split(";")[0].split(", ")) == {"bad", "borrower", "liar"}
    assert sorted(starts(jobs[0])) == ["bad", "good", "liar"]
    jobs[0].command[5], jobs[3].command[4] = "25", "3"  # the same command goes on, and only what is new is reported
    with pytest.raises(SystemExit):
        benchmark.run(benchmark.RunSuite("smoke"))
    said = capsys.readouterr()
    assert "no step 25" in said.err and "no step 20" not in said.err and "2 of 4 runs" in said.out
    jobs[0].command[5] = "-1"
    benchmark.run(benchmark.RunSuite("smoke"))
    assert starts(jobs[0]).count("good") == 1 and jobs[0].log.read_text().count("step 19") == 1 and all(job.finished() for job in jobs)


def test_never_two_processes_on_one_folder(fake, capsys):
    job = fake("one", pace=0.3)
    process = benchmark.start(job)
    assert benchmark.start(fake("one")) is None  # the lock is the process's own: we hold nothing open
    assert benchmark.work_off([fake("one")], 2, "test") == []  # waits, and takes the other's result
    assert process.wait() == 0 and starts(job) == ["one"] and "another process is at it" in capsys.readouterr().err


def test_ctrl_c_stops_the_children(fake, monkeypatch):
    jobs = [fake("a", updates=1000, pace=0.02), fake("b", updates=1000, pace=0.02)]
    begun, pressed = [], []
    monkeypatch.setattr(benchmark, "start", lambda job, plain=benchmark.start: begun.append(plain(job)) or begun[-1])

    def ctrl_c(_):
        if not pressed and len(begun) == 2 and all((job.folder / "at").exists() for job in jobs):
            pressed.append(True)
            raise KeyboardInterrupt
        time.sleep(0.01)

    monkeypatch.setattr(benchmark, "time", type("clock", (), {"sleep": staticmethod(ctrl_c), "time": time.time}))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        benchmark.work_off(jobs, 2, "test")
    assert signal.getsignal(signal.SIGINT) == handler
    assert [process.returncode for process in begun] == [-signal.SIGTERM] * 2
    assert 0 < int((jobs[0].folder / "at").read_text()) < 1000 and not jobs[0].finished()


def test_cut_anywhere_and_started_again_it_ends_in_the_same_table(data_file, tmp_path, capsys):  # noqa: F811
    """The real thing: a tiny run of the suite, once left alone, once with the benchmark stopped in its middle."""
    flags = ["--dataset", str(data_file), "--total-updates", "300", "--checkpoint-every", "20", "--eval-every", "100"]
    args = benchmark.RunSuite("smoke", tuple(flags), only="__cql__", run_dir=tmp_path / "cut")
    name = "hopper-medium-replay-v2__cql__0__small"
    checkpoint, log = (tmp_path / "cut" / part for part in (f"{name}/checkpoint.pt", f"benchmark_logs/{name}.log"))
    benchmark.run(replace(args, dry_run=True))
    (line,) = capsys.readouterr().out.splitlines()
    benchmark.run(replace(args, run_dir=tmp_path / "whole"))

    command = [sys.executable, str(ROOT / "benchmark.py"), "run", "smoke", "--only", "__cql__", "--run-dir", str(tmp_path / "cut")]
    cut = subprocess.Popen([*command, "--", *flags], stderr=subprocess.PIPE, text=True)
    while cut.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    cut.send_signal(signal.SIGTERM)
    assert "interrupted; the same command goes on" in cut.communicate()[1] and cut.returncode == 130
    assert not (checkpoint.parent / "result.json").exists()
    benchmark.run(args)  # does not wait: nobody is left behind
    assert "another process" not in capsys.readouterr().err
    said = log.read_text()
    assert said.count(f"$ {line}\n") == 2 and said.count("resumed at step") == 1  # what --dry-run prints is what was run
    one, two = (rows_of(report.tables([tmp_path / where / name])["hopper-medium-replay-v2__small"]) for where in ("whole", "cut"))
    assert [row | {"wall time": ""} for row in one] == [row | {"wall time": ""} for row in two] and one[0]["updates"] == "300"


def test_slurm_needs_submitit_and_a_task_asks_to_be_submitted_again(fake, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        benchmark.submit(benchmark.RunSuite("smoke"), [fake("a")])
    task, good, bad = benchmark.SlurmTask(), fake("good"), fake("bad", fail_at=1)
    task(good)
    task(good)  # finished: nothing to do
    assert good.finished() and starts(good) == ["good"]
    with pytest.raises(RuntimeError, match="no step 1"):
        task(bad)


# --- W&B ---


def records(path):
    """What the client has written, by its own protocol: LevelDB's log format around messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


def history(kinds):
    """What was logged, without the client's own keys; what is more than a number comes as parts."""
    rows = []
    for record in kinds["history"]:
        rows.append({})
        for item in record.history.item:
            *outer, key = item.nested_key
            at = rows[-1]
            for name in outer:
                at = at.setdefault(name, {})
            at[key] = json.loads(item.value_json)
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


def test_wandb_holds_config_metrics_and_result(data_file, tmp_path):  # noqa: F811
    flags = ["--dataset", str(data_file), "--total-updates", "20", "--run-dir", str(tmp_path), "--track", "--model-ratio", "0"]
    flags += shlex.split(
        "--env hopper-medium-replay --batch-size 20 --hidden 16 --cql-samples 2 --eval-every 10 --eval-episodes 2 --log-every 10"
    )
    command = [sys.executable, str(ROOT / "algorithms" / "romi_cql.py"), *flags, "--num-threads", "1"]
    done = subprocess.run(command, env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "hopper-medium-replay-v2__bc__0__small"
    (file,) = folder.rglob("*.wandb")
    kinds = {}
    for record in records(file):
        kinds.setdefault(record.WhichOneof("record_type"), []).append(record)
    run = kinds["run"][0].run
    assert run.display_name == folder.name and run.run_group == "hopper-medium-replay-v2__bc" and run.project == "rewind"
    assert list(run.tags) == ["hopper-medium-replay-v2", "bc", "file"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    assert config == json.loads((folder / "config.json").read_text())
    assert history(kinds)[:-1] == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(history(kinds)) == 5 and history(kinds)[-1]["evaluations"]["_type"] == "table-file"
    (table,) = folder.rglob("evaluations*.table.json")
    table, evals = json.loads(table.read_text()), [row for row in history(kinds) if "eval/return" in row]
    assert [dict(zip(table["columns"], row, strict=True))["return"] for row in table["data"]] == [e["eval/return"] for e in evals]
    summary = {i.key: json.loads(i.value_json) for r in kinds["summary"] for i in r.summary.update if i.key}
    assert json.loads((folder / "result.json").read_text()).items() <= summary.items()


def test_wandb_gets_the_pictures_of_a_maze(tmp_path):
    make = [str(ROOT / "datasets" / "maze2d.py"), "--steps", "3000", "--out", str(tmp_path)]
    flags = ["--env", "maze2d-umaze", "--dataset", str(tmp_path / "maze2d_umaze.hdf5"), "--run-dir", str(tmp_path), "--track"]
    flags += shlex.split(
        "--num-threads 1 --total-updates 4 --batch-size 20 --hidden 8 8 --vae-hidden 8 --eval-every 2 --eval-episodes 1 --log-every 2 "
        "--dynamics-hidden 8 --dynamics-max-epochs 1 --model-buffer-size 500 --rollout-batch-size 100 --eval-samples 2"
    )
    for command in (make, [str(ROOT / "algorithms" / "romi_bcq.py"), *flags]):
        done = subprocess.run([sys.executable, *command], env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "maze2d-umaze-v1__romi_bcq__0__maze2d_umaze").rglob("*.wandb")
    rows = history({"history": [r for r in records(file) if r.WhichOneof("record_type") == "history"]})
    shown = [(k, v) for row in rows for k, v in row.items() if k.startswith("figures/")]
    assert [k for k, _ in shown] == ["figures/imagination", "figures/execution", "figures/execution"]
    assert all(v["_type"] == "image-file" and (file.parent / "files" / v["path"]).exists() for _, v in shown)
