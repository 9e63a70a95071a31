"""Faults that users meet: whatever the user, the operating system, W&B or a damaged file does ends in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from errno import ENOSPC
from types import SimpleNamespace

import fomi_bcq
import h5py
import numpy as np
import pytest
import romi_bcq
import romi_cql as m
import torch
from test_runs import ROOT, assert_same_weights, contents, data_file, folder_of, metrics, weights  # noqa: F401 - a fixture

import plumbing
from plumbing import UserError

TINY = {"env": "hopper-medium-replay", "total-updates": 4, "checkpoint-every": 2, "log-every": 1, "eval-every": 2}
TINY |= {"eval-episodes": 1, "num-threads": 1, "batch-size": 8, "model-ratio": 0, "bc-warmup": 0}


def flags_of(data, run_dir, script=m):
    flags = {k: v for k, v in TINY.items() if script is m or k != "bc-warmup"} | {"dataset": data, "run-dir": run_dir}
    return [x for k, v in flags.items() for x in (f"--{k}", str(v))]


@pytest.fixture
def command(data_file, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The script's command line in this process -> exit status and lines of standard error."""

    def run(*flags, script=m, run_dir=tmp_path):
        flags = [*flags_of(data_file, run_dir, script), "--hidden", "8", "8", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
        with pytest.raises(SystemExit) as end:
            plumbing.run_script(script.main, script.Args, script.__doc__)
        traceback.clear_frames(end.tb)  # they hold the log open, which is locked
        return end.value.code, capsys.readouterr().err.replace("\r", "\n").splitlines()

    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    yield run
    for s, handler in kept.items():
        signal.signal(s, handler)


@pytest.fixture(scope="module")
def finished(data_file, tmp_path_factory):  # noqa: F811
    """Folder of a run that nothing befell."""
    run_dir, args = tmp_path_factory.mktemp("finished"), {k.replace("-", "_"): v for k, v in TINY.items()}
    m.main(m.Args(**args, hidden=(8, 8), dataset=str(data_file), run_dir=str(run_dir)))
    return folder_of(run_dir, "cql")


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / finished.name)


def refused(answer, *words, status=2):
    """One line that says what is wrong."""
    code, lines = answer
    (line,) = [x for x in lines if "error" in x.lower()]
    assert code == status and line.startswith("error: ") and all(str(word) in line for word in words), line


def replace_by(path, content):
    """Other bytes or, for None, a folder."""
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("flag", ["--batch-size", "--hidden"])
@pytest.mark.parametrize("size", [10**15, 10**18, 10**20])
def test_sizes_beyond_memory_are_named(command, flag, size):
    refused(command(flag, size), flag)


def test_names_numbers_and_paths_that_cannot_be(command, tmp_path):
    for name in ("a/b", "x" * 300, "a\0b", "", "a__b"):
        refused(command("--exp-name", name), "--exp-name")
    for flag, value in (("--seed", 2**32), ("--num-threads", 10**12)):
        refused(command(flag, value), flag)
    assert not list(tmp_path.iterdir())
    (file := tmp_path / "file").touch()
    refused(command(run_dir=file), file)
    refused(command("--dataset", f"{'x' * 300}.hdf5"), "xxx")
    for path in (tmp_path, tmp_path / "none.pt", file, tmp_path / ("x" * 300)):
        refused(command("--dynamics-from", path, "--model-ratio", 0.5), path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_run_with_a_message(command, monkeypatch, number):
    monkeypatch.setattr(m, "evaluate", lambda *_: os.kill(os.getpid(), number))
    code, lines = command()
    assert code == 130 and [x for x in lines if x.startswith("interrupted; repeat the command to resume")]


def test_a_copy_in_a_folder_of_any_name_trains_with_closed_streams(data_file, tmp_path):  # noqa: F811
    """It finds its own utils before a package of that name, and no shell reads the folder's name."""
    home = tmp_path / "it's `touch ran` $(touch ran)" / "rl"
    (home.parent / "utils").mkdir(parents=True)
    (home.parent / "utils" / "__init__.py").touch()
    shutil.copytree(ROOT / "envs", home / "envs")
    for file in ("utils.py", "plumbing.py", "algorithms/romi_cql.py"):
        shutil.copy(ROOT / file, home)
    shell = ["sh", "-c", '"$@" >&- 2>&-', "sh", sys.executable, "romi_cql.py", *flags_of(data_file, "runs")]
    assert subprocess.run(shell, cwd=home).returncode == 0
    assert (folder_of(home / "runs", "cql") / "result.json").exists() and not list(home.parent.rglob("ran"))
    assert len({x for p in ROOT.glob("algorithms/*.py") for x in p.read_text().splitlines() if "sys.path" in x}) == 1


def test_a_checkpoint_with_one_wrong_bit_is_refused_or_the_same(folder):
    path, good, refusals = folder / "agent.pt", weights(folder), 0
    whole = path.read_bytes()
    for i in (*range(0, len(whole), len(whole) // 60), *range(len(whole) - 99, len(whole))):  # and all of zip's end
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        try:
            plumbing.read_checkpoint(path)
        except UserError:
            refusals += 1
        else:
            assert all(v.equal(good[k]) for k, v in weights(folder).items())
    assert refusals > 30


@pytest.mark.parametrize("damage", ["zeros", "half", "empty", "folder", "list", "keys", "part", "shape"])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_overwritten(command, folder, damage):
    path = folder / "agent.pt"
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    half, part = len(whole) // 2, {k: v for k, v in state.items() if k != "policy"}
    wrong = part | {"policy": {k: torch.zeros(3) for k in state["policy"]}}
    states = {"list": [1, 2], "keys": {"policy": state["policy"]}, "part": part, "shape": wrong}
    bits = {"zeros": whole[:half] + bytes(2000) + whole[half + 2000 :], "half": whole[:half], "empty": b""}
    replace_by(path, None if damage == "folder" else bits.get(damage, b""))
    if damage in states:
        torch.save(states[damage], path)
    before = contents(folder)
    refused(command("--total-updates", 6), path)
    assert contents(folder) == before


NONE = [
    (name, content) for name in ("config.json", "result.json") for content in (b"", b"{}", b"[]", b"{x", b"\xff", None)
]


@pytest.mark.parametrize("name, content", [*NONE, ("metrics.jsonl", None)])
def test_settings_results_and_logs_that_are_none(command, folder, name, content):
    replace_by(folder / name, content)
    before = contents(folder)
    refused(command("--total-updates", 6), folder / name)
    assert contents(folder) == before


@pytest.mark.parametrize("left", [None, 0, 200, -7])
def test_a_log_that_lost_lines_goes_on_with_the_evaluations_of_the_checkpoint(command, folder, finished, left):
    log = folder / "metrics.jsonl"
    content = log.read_bytes()
    log.unlink() if left is None else log.write_bytes(content[:left])
    code, lines = command("--total-updates", 6)
    assert code == 0 and [x for x in lines if x.startswith("note: ") and "metrics.jsonl" in x]
    evals, before = ([r for r in metrics(f) if "eval/return" in r] for f in (folder, finished))  # every line is JSON
    assert [r["update"] for r in evals] == [2, 4, 6] and evals[:2] == before and b"\0" not in log.read_bytes()
    result = json.loads((folder / "result.json").read_text())
    assert result["normalized_score_last_10"] == pytest.approx(sum(r["eval/normalized_score"] for r in evals) / 3)


def test_a_finished_run_without_its_checkpoint_is_not_begun_anew(command, folder):
    (folder / "agent.pt").unlink()
    before = contents(folder)
    refused(command("--total-updates", 6), folder, "agent.pt")
    assert command()[0] == 0 and contents(folder) == before


def test_the_size_of_a_cut_log_is_known_before_its_first_new_line(tmp_path):
    """A checkpoint saved before that line would hold the old size, and the next resume would think the log damaged."""
    (tmp_path / "log").write_text("12345\n67890\n")
    with plumbing.open_log(tmp_path / "log", 6) as log:
        assert log.tell() == 6
    assert (tmp_path / "log").read_text() == "12345\n"


@pytest.mark.parametrize("lost", [(), ("config.json", "result.json"), ("agent.pt",), ("agent.pt", "config.json")])
def test_a_run_of_another_script_is_refused(command, tmp_path, lost):
    assert command("--exp-name", "x", script=fomi_bcq)[0] == 0  # whose settings have the same names and values
    folder = folder_of(tmp_path, "x")
    for name in lost:
        (folder / name).unlink()
    before = contents(folder)
    refused(command("--exp-name", "x", script=romi_bcq), folder)
    assert contents(folder) == before


SPOILT = [("loss", ()), ("actions", ("--log-every", 9, "--eval-every", 3))]
SPOILT += [("weights", ("--log-every", 9, "--eval-episodes", 0, "--total-updates", 6))]


@pytest.mark.parametrize("what, flags", SPOILT)
def test_a_run_that_diverges_ends_with_status_3(command, finished, tmp_path, monkeypatch, what, flags):
    """It keeps its checkpoint, if there is one, and neither evaluates nor logs what is not finite."""
    plain, folder = m.CQL.update, tmp_path / finished.name

    def update(self, *args):
        metrics = plain(self, *args)
        if what != "loss":
            self.policy.net[-1].bias.data[0] = torch.nan
        return metrics | ({"losses/td": torch.tensor(torch.nan)} if what == "loss" else {})

    assert command(*flags, "--total-updates", 2)[0] == 0
    good = (folder / "agent.pt").read_bytes()
    monkeypatch.setattr(m.CQL, "update", update)
    refused(command(*flags), what, "not finite", status=3)
    assert (folder / "agent.pt").read_bytes() == good and not (folder / "result.json").exists()
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    shutil.rmtree(folder)
    code, lines = command(*flags, "--checkpoint-every", 1)
    assert code == 3 and not list(folder.glob("*.pt*")) and not any("last good" in line for line in lines)


def test_numbers_that_are_not_finite_are_null(command, finished, tmp_path, monkeypatch):
    plain, folder = m.CQL.update, tmp_path / finished.name
    monkeypatch.setattr(m.CQL, "update", lambda *a: plain(*a) | {"q/x": torch.tensor(torch.nan), "q/y": torch.inf})
    nan = {f"eval/{k}": torch.nan for k in ("return", "return_std", "length", "normalized_score")}
    monkeypatch.setattr(m, "evaluate", lambda *_: nan)
    assert command()[0] == 0
    rows = metrics(folder)
    assert rows[0]["q/x"] is rows[0]["q/y"] is None and [r for r in rows if r.get("eval/return", 0) is None]
    for text in [*(folder / "metrics.jsonl").read_text().splitlines(), (folder / "result.json").read_text()]:
        json.loads(text, parse_constant=pytest.fail)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, plain=plain: (calls.append(name), plain(*a)))
    plumbing.write_file(tmp_path / "x", "text")
    assert calls == ["fsync", "replace"] and contents(tmp_path) == {"x": b"text"}


@pytest.mark.parametrize("name", ["agent.pt", "metrics.jsonl"])
def test_a_full_disk_is_named_and_costs_nothing(command, finished, tmp_path, monkeypatch, name):
    folder, fits = tmp_path / finished.name, iter([True])

    def fsync(fd):
        if not next(fits, False):  # config.json does, the checkpoint does not
            raise OSError(ENOSPC, os.strerror(ENOSPC))

    assert command("--total-updates", 2)[0] == 0
    good = (folder / "agent.pt").read_bytes()
    with monkeypatch.context() as patch:
        if name == "agent.pt":
            patch.setattr(os, "fsync", fsync)
        else:
            patch.setattr(plumbing, "open_log", lambda *_: open("/dev/full", "a"))
        refused(command(), f"{folder / name if name == 'agent.pt' else '/dev/full'}: No space left on device")
    assert (folder / "agent.pt").read_bytes() == good and not list(folder.glob("*.part"))
    assert command()[0] == 0 and metrics(folder) == metrics(finished)
    assert_same_weights(weights(folder), weights(finished))


def test_wall_time_counts_worked_seconds(command, finished, tmp_path, monkeypatch):
    clock, update, evaluate = SimpleNamespace(wall=0.0, cpu=0.0), m.CQL.update, m.evaluate
    times = SimpleNamespace(monotonic=lambda: clock.wall, process_time=lambda: clock.cpu)

    def work(*args):
        clock.wall, clock.cpu = clock.wall + 2, clock.cpu + 8  # four threads
        return update(*args)

    def sleep(*args):
        clock.wall += 3600
        return evaluate(*args)

    monkeypatch.setattr(plumbing, "time", times)
    monkeypatch.setattr(m.CQL, "update", work)
    monkeypatch.setattr(m, "evaluate", sleep)
    assert command("--total-updates", 2)[0] == command()[0] == 0
    result = json.loads((tmp_path / finished.name / "result.json").read_text())
    assert (result["wall_time_s"], result["updates_per_s"]) == (8.0, 0.5)


class Tracker:
    """Stands in for the module wandb and for its run; `broken` names what raises."""

    def __init__(self, key, broken):
        self.rows, self.modes, self.summary, self.broken = [], [], {}, broken
        self.login = lambda prompt, verify: key and not prompt  # a prompt would wait for ever
        self.Settings, self.define_metric, self.log = dict, lambda *_, **__: None, self.rows.append
        self.finish = lambda: self.modes.append("finished")

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "broken"):
            raise RuntimeError("no such client")
        return object.__getattribute__(self, name)

    def init(self, mode, **about):
        self.modes.append(mode)
        if mode == self.broken:
            raise RuntimeError("no such server")
        return self


@pytest.mark.parametrize("broken", "none online login init define_metric log finish summary module".split())
@pytest.mark.parametrize("key", [True, False])
def test_wandb_never_stops_a_run_and_is_offline_without_a_key(command, finished, tmp_path, monkeypatch, key, broken):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = Tracker(key, broken)
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "module" else tracker)
    code, lines = command("--track")
    assert code == 0 and metrics(tmp_path / finished.name) == metrics(finished)
    said = [line for line in lines if "W&B: " in line]
    if broken in ("none", "online"):
        offline = not key or broken == "online"
        assert tracker.modes == ["online"] * key + ["offline"] * offline + ["finished"]
        assert len(tracker.rows) == 6 and tracker.summary["updates"] == 4
        assert any("W&B: offline; " in line for line in said) == offline
    else:
        assert 1 <= len(said) <= 3


def test_denormal_numbers_are_flushed():
    """Without that, BCQ's Adam takes five times as long after a thousand updates."""
    torch.set_flush_denormal(False)
    assert (torch.tensor([1e-30]) * 1e-10).item()
    plumbing.start(SimpleNamespace(device="cpu", num_threads=1, seed=0, compile=False))
    assert not (torch.tensor([1e-30]) * 1e-10).item()


@pytest.mark.parametrize("cpu", [{}, {"avx512_bf16": True}, {"bf16": True}])
def test_bfloat16_in_software_is_named_before_it_costs_a_day(cpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    start = {"device": "cpu", "num_threads": 1, "seed": 0, "compile": False, "dynamics_bf16": True}
    plumbing.start(SimpleNamespace(bf16=False, **start))
    assert ("--dynamics-bf16 will be many times slower" in capsys.readouterr().err) == (not cpu)


def test_help_names_flags_that_exist(capsys):
    """A switch that a task may set takes a value; only plain ones have a --no- form."""
    plumbing.show_help(m.Args, m.__doc__)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
    assert "--no-bf16" in lines["--bf16"] and "True, False" not in lines["--bf16"]
    assert "--no-" not in lines["--priority-rollout"] and "True, False" in lines["--priority-rollout"]
    assert "cvae, uniform, rbc" in lines["--rollout-policy"]
    assert lines["--env"].endswith("; also --env-id")


def test_out_of_memory_without_any_size(monkeypatch, capsys):
    @dataclass
    class Args:
        seed: int = 0

    def main(args):
        raise MemoryError

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit, match="2"):
        plumbing.run_script(main, Args, "A script.")
    assert capsys.readouterr().err == "error: out of memory\n"


def test_hdf5_has_the_bytes_of_a_file_on_disk(tmp_path):
    """Results name their data by the file's sha256, so its layout must not change."""
    arrays = {k: np.random.default_rng(0).normal(size=(100, 4)).astype("f4") for k in ("observations", "infos/goal")}
    plumbing.write_hdf5(tmp_path / "ours.hdf5", arrays, {})
    with h5py.File(tmp_path / "theirs.hdf5", "w") as f:
        for k, v in arrays.items():
            f.create_dataset(k, data=v, compression="gzip", compression_opts=1, shuffle=True)
    assert (tmp_path / "ours.hdf5").read_bytes() == (tmp_path / "theirs.hdf5").read_bytes()
