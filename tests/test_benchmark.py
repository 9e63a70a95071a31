"""Tables by hand-worked numbers, results that give way or do not, runs that are skipped, fail and are cut."""

import _thread
import importlib
import json
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import pytest
import submitit
import tyro

from benchmark import __main__ as main
from benchmark import report, suites
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
DATA = {"id": "x", "source": "d4rl", "sha256": "ab" * 32, "transitions": 1_234}


def made_up(results, algorithm, seed, scores, name=None, evals="evals.jsonl", command=(), **more):
    """A result with an evaluation every 1000 updates; all else alike unless it is given."""
    folder = results / (name or f"hopper-medium-v2__{algorithm}__{seed}")
    folder.mkdir(parents=True)
    result = {"task": "hopper-medium-v2", "script": "x.py", "algorithm": algorithm, "seed": seed, "dataset": DATA}
    result |= {"updates": 1000 * len(scores), "normalized_score": scores[-1], "return_mean": 10 * scores[-1]}
    result |= {"eval_episodes": 10, "command": ["x.py", "--env", "hopper-medium", "--seed", str(seed), *command]}
    (folder / "result.json").write_text(json.dumps(result | more))
    rows = [{"update": 1000 * (i + 1), "eval/return": 10 * y, "eval/normalized_score": y} for i, y in enumerate(scores)]
    lines = [json.dumps({"update": 1, "losses/critic": 2.0})] * (evals == "metrics.jsonl") + [*map(json.dumps, rows)]
    (folder / evals).write_text("\n".join(lines) + "\n")
    return folder


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(titles, row, strict=True)) for row in rows]


def table_of(results, setting="hopper-medium-v2"):
    return rows_of(report.tables(results)[setting])


# --- tables ---


def test_a_row_by_hand(tmp_path):
    for seed, last in enumerate((10.0, 20.0, 60.0)):
        made_up(tmp_path, "cql", seed, [100.0, 100.0, *[5.0] * 9, last], command=["--gamma=0.9", "--num-threads", "1"])
    (row,) = table_of(tmp_path)
    assert (row["algorithm"], row["updates"], row["seeds"], row["flags"]) == (
        "cql",
        "12 000",
        "0, 1, 2",
        "`--gamma 0.9`",
    )
    assert row["last (each seed)"] == "30.0 ± 26.5 (10.0, 20.0, 60.0)"  # sqrt((20² + 10² + 30²) / 2) = 26.46
    assert row["last ten (each seed)"] == "7.5 ± 2.6 (5.5, 6.5, 10.5)"
    assert row["95 %"] == "-35.7 to 95.7" and row["published"] == "66.6 ± 4.1 (ROMI-T2)"


def test_interval_of_the_mean():
    """Student's t with two degrees of freedom has its 97.5 % point at 4.303; the standard error is sqrt(7 / 3)."""
    assert report.interval([5.0, 5.0, 5.0]) == (5, 5)
    assert report.interval([1.0, 2.0, 6.0]) == pytest.approx(
        (3 - 4.303 * (7 / 3) ** 0.5, 3 + 4.303 * (7 / 3) ** 0.5), 1e-3
    )


def test_no_mean_hides_a_seed_or_a_length(tmp_path):
    made_up(tmp_path, "bcq", 0, [1.0, 7.0, 50.0])
    made_up(tmp_path, "bcq", 1, [2.0, 8.0])
    shorter, longer = table_of(tmp_path)
    assert (shorter["updates"], shorter["seeds"], shorter["95 %"]) == ("2 000", "0, 1", "-")
    assert shorter["last (each seed)"] == "7.5 ± 0.7 (7.0, 8.0)"
    assert (longer["updates"], longer["seeds"], longer["last (each seed)"]) == ("3 000", "0", "50.0")


def test_the_schedule_of_sra_is_not_cut(tmp_path):
    made_up(tmp_path, "bc_expert", 0, [1.0, 7.0], script="sra_iql.py")
    made_up(tmp_path, "bc_expert", 1, [2.0], script="sra_iql.py")
    assert [(row["updates"], row["seeds"]) for row in table_of(tmp_path)] == [("1 000", "1"), ("2 000", "0")]


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": DATA | {"sha256": "cd" * 32}},
        {"dataset": DATA | {"expert": {"sha256": "ef" * 32}}},
        {"task": "hopper-expert-v2"},
        {"command": ["--gamma", "0.9"]},
        {"eval_episodes": 20},
    ],
    ids=lambda other: next(iter(other)),
)
def test_runs_that_differ_are_never_averaged(tmp_path, other):
    made_up(tmp_path, "cql", 0, [1.0])
    made_up(tmp_path, "cql", 1, [2.0], **other)
    assert sorted(report.cells(report.read(tmp_path)).scores) == [[1.0], [2.0]]


def test_one_seed_counts_once(tmp_path):
    made_up(tmp_path, "cql", 0, [1.0])
    made_up(tmp_path, "cql", 0, [3.0], name="elsewhere__cql__0")
    with pytest.raises(UserError, match="two results of one seed"):
        report.cells(report.read(tmp_path))


def test_old_data_are_named(tmp_path):
    task = {"task": "maze2d-umaze-v1"}
    made_up(tmp_path, "bcq", 0, [1.0], "maze2d-umaze-v1__bcq__0__maze2d_umaze_repaired", **task)
    made_up(
        tmp_path, "bcq", 0, [2.0], "maze2d-umaze-v1__bcq__0__generated", dataset=DATA | {"sha256": "cd" * 32}, **task
    )
    assert [row["data"] for row in table_of(tmp_path, "maze2d-umaze-v1")] == ["D4RL's script", "repaired data"]


def test_claims_quote_the_last_ten_evaluations_up_to_the_last_common_update(tmp_path, monkeypatch):
    made_up(tmp_path, "cql", 0, [float(k) for k in range(1, 13)])  # 3 to 12 count: 7.5
    made_up(tmp_path, "bc", 0, [100.0, *[0.0] * 11, 50.0])  # 12 are common; neither the first nor the 13th counts
    claim = {"claim": "c", "setting": "hopper-medium-v2", "algorithms": ["cql", "bc"], "verdict": "v", "why": "w"}
    (tmp_path / "claims.json").write_text(json.dumps([claim]))
    monkeypatch.setattr(report, "HERE", tmp_path)
    [row] = rows_of(report.claim_table(report.cells(report.read(tmp_path))))
    assert row["ours"] == "cql 7.5, bc 0.0; 12k"


def test_armors_gain_over_its_reference(tmp_path):
    """hopper: a random policy returns -20.3, an expert 3234.3."""
    for seed, last in ((0, 20.0), (1, 40.0)):
        more = {"reference_return": -20.272305 + 32.54572, "discounted_improvement": 3.0 + seed}
        made_up(tmp_path, "armor", seed, [15.0, last], **more)
    (row,) = table_of(tmp_path)
    assert row["gain"] == "29.0 ± 14.1 (19.0, 39.0)" and row["discounted gain"] == "3.5 ± 0.7 (3.0, 4.0)"


def test_returns_where_there_is_no_score(tmp_path):
    folder = made_up(tmp_path, "mopo", 0, [1.5], task="halfcheetah-jump-v1", normalized_score=None)
    text = report.tables(tmp_path)["halfcheetah-jump-v1"]
    assert rows_of(text)[0]["last (each seed)"] == "15.0" and "Return, 10 episodes" in text
    assert rows_of(text)[0]["published"] == "4016.6 ± 144.0 (MOPO-slides-OOD)"
    (folder / "evals.jsonl").write_text('{"update": 1000, "eval/return": 7.0, "eval/normalized_score": null}\n')
    with pytest.raises(UserError, match="do not end with that of result"):
        report.read(tmp_path)


def test_the_committed_page_is_what_the_results_say(capsys):
    report.table(check=True)
    assert "up to date" in capsys.readouterr().out
    assert len(report.PAGE.read_bytes()) <= 25_600


def test_check_sees_a_changed_number(tmp_path, capsys):
    page = tmp_path / "benchmarks.md"
    page.write_text(report.PAGE.read_text().replace("86.3 ± 65.0", "96.3 ± 65.0"))
    with pytest.raises(SystemExit) as stopped:
        report.table(page=page, check=True)
    rebuilt = [line for line in capsys.readouterr().out.splitlines() if line.startswith("+| romi_bcq")]
    assert stopped.value.code == 1 and len(rebuilt) == 1 and "86.3 ± 65.0" in rebuilt[0]
    page.write_text("<!-- table: claims -->\n<!-- end -->\n")
    with pytest.raises(UserError, match="no place for the table"):
        report.table(page=page)


def test_every_committed_result_stands_in_a_table():
    """result.json and evals.jsonl, nothing else; and the page shows every figure, of the case studies at least one."""
    for folder in (folder for folder in report.RESULTS.iterdir() if folder.is_dir()):
        assert sorted(file.name for file in folder.iterdir()) == ["evals.jsonl", "result.json"]
    text = report.PAGE.read_text()
    pictures = {part.split(")")[0] for part in text.split("](benchmark/figures/")[1:]}
    rest = {file.name for file in report.FIGURES.iterdir()} ^ pictures
    assert rest and all((report.FIGURES / name).exists() and name.startswith("case_study_") for name in rest)


def test_curves(tmp_path):
    made_up(tmp_path, "cql", 0, [1.0, 2.0])
    made_up(tmp_path, "cql", 1, [1.0, 3.0])
    report.plot(tmp_path)
    assert (tmp_path / "figures" / "hopper-medium-v2.png").stat().st_size > 5_000


# --- collect ---


def test_a_result_gives_way_only_to_the_same_run_carried_on(tmp_path, capsys):
    """A toy run under the name of a published one must not take its place."""

    def collected(i, scores, force=False, seed=0, **more):
        made_up(tmp_path / str(i), "mopo", seed, scores, "run", "metrics.jsonl", **more)
        main.collect((tmp_path / str(i),), tmp_path / "results", force)
        there = tmp_path / "results" / "run"
        assert "losses" not in (there / "evals.jsonl").read_text()
        return json.loads((there / "result.json").read_text())["normalized_score"], "".join(capsys.readouterr())

    assert collected(0, [1.0, 2.0]) == (2.0, "run: 2000 updates, new\n")
    assert collected(1, [1.0, 2.0])[1] == "run: 2000 updates, unchanged\n"
    assert collected(2, [1.0, 2.0, 3.0, 4.0]) == (4.0, "run: 4000 updates, replaces 2000 updates\n")
    for i, (scores, more, why) in enumerate(
        (
            ([1.0], {}, "more updates (4000)"),
            ([9.0] * 5, {}, "other evaluations"),
            ([1.0, 2.0, 3.0, 4.0, 5.0], {"dataset": DATA | {"sha256": "cd" * 32}}, "other data"),
            ([1.0, 2.0, 3.0, 4.0, 5.0], {"script": "y.py"}, "another seed or script"),
            ([1.0, 2.0, 3.0, 4.0, 5.0], {"seed": 1}, "another seed or script"),
        )
    ):
        score, said = collected(10 + i, scores, **more)
        assert score == 4.0 and why in said and "--force" in said
    assert collected(20, [9.0], force=True)[0] == 9.0
    with pytest.raises(UserError, match="no finished run"):
        main.collect((tmp_path / "nowhere",), tmp_path / "results")


# --- suites and sweeps ---


def test_scripts_take_the_flags_of_all_suites():
    seen = set()
    for suite in suites.SUITES:
        for run in suites.expand(suite):
            script, flags = Path(run.command[1]).stem, run.command[2:]
            kind = script, *sorted(flag for flag in flags if flag.startswith("--"))
            if kind not in seen:
                seen.add(kind)
                args = tyro.cli(importlib.import_module(script).Args, args=list(flags))
                assert f"__{args.exp_name}__{args.seed}" in run.name
                assert run.updates in (0, args.total_updates)


def test_names_of_runs_and_their_lenders():
    smoke = suites.expand("smoke", ["mbpo"])
    assert [run.name.split("__")[1] for run in smoke] == ["mopo", "mbpo"]  # the lender comes along, and first
    assert str(smoke[0].folder / "dynamics.pt") in smoke[1].command
    names = [run.name for run in suites.expand("headline")]
    assert "maze2d-umaze-v1__romi_bcq__2__generated" in names and len(names) == 17
    assert "hopper-medium-replay-v2__romi_cql__0__bundled" in names
    spaced = suites.expand("smoke", ["sra_iql"], "a b")[-1]
    assert "a b/data/maze2d_umaze_expert.hdf5" in spaced.command and spaced.folder.parent == Path("a b")
    assert [run.name for run in suites.expand("headline", ["maze*__bcq__1__*"])] == [
        "maze2d-umaze-v1__bcq__1__generated"
    ]
    with pytest.raises(UserError, match="no run of this suite"):
        suites.expand("headline", ["nothing"])


def test_sweeps_are_up_to_date():
    files = suites.sweep_files()
    assert {*files} == {*(ROOT / "benchmark" / "sweeps").iterdir()}
    assert all(path.read_text() == text for path, text in files.items())


# --- run ---


def fake(folder, code="", lender=""):
    """A run that executes `code` and then has a result."""
    result = f"import pathlib; p = pathlib.Path({str(folder)!r}); p.mkdir(parents=True, exist_ok=True); {code}\n"
    result += "(p / 'result.json').write_text('{\"updates\": 5}')"
    return suites.Run(folder, (sys.executable, "-S", "-c", result), 5, lender)


def test_what_is_finished_is_skipped_and_what_fails_is_named(tmp_path, monkeypatch, capfd):
    runs = [fake(tmp_path / "done", "1 / 0"), fake(tmp_path / "good"), fake(tmp_path / "bad", "print('why'); 1 / 0")]
    runs += [fake(tmp_path / "borrower", lender="bad")]
    runs[0].folder.mkdir()
    (runs[0].folder / "result.json").write_text('{"updates": 7}')
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(suites, "expand", lambda *_: runs)
    cloudpickle.register_pickle_by_value(main)  # as in `python -m benchmark`: a task imports nothing of ours
    with pytest.raises(SystemExit) as stopped:
        main.run("headline", jobs=2)
    out, err = capfd.readouterr()
    assert stopped.value.code == 1 and "done: started" not in out and "good: finished" in out
    assert "2 of 4 runs" in out and "failed: bad, borrower" in err and "why" in err and "ZeroDivisionError" in err
    assert not (tmp_path / "borrower").exists()


def test_ctrl_c_ends_the_children(tmp_path, monkeypatch):
    pid = "import os, time; (p / 'new').write_text(str(os.getpid())); os.replace(p / 'new', p / 'pid'); time.sleep(60)"
    run, file = fake(tmp_path / "run", pid), tmp_path / "run" / "pid"

    def interrupt():
        while not file.exists():
            time.sleep(0.05)
        _thread.interrupt_main()

    monkeypatch.chdir(ROOT)
    cloudpickle.register_pickle_by_value(main)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            main.work_off([run], 1, submitit.AutoExecutor(tmp_path / "logs", cluster="local"))
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 20
    while alive(int(file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(file.read_text()))


def alive(pid):
    """Whether there is such a process; one that has ended and waits to be collected is none."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.strip().startswith("Z")


@pytest.mark.filterwarnings("ignore:.*sys.modules")
def test_bad_input_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "table", "--results", str(tmp_path)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module("benchmark", run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
