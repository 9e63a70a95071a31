"""Runs through the command line, of every script: what a run leaves behind, and what becomes of one that is killed."""

import importlib
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import tyro

from utils import load_dataset, parse_task

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--env", "hopper-medium-replay", "--total-updates", "60", "--batch-size", "20",
    "--dynamics-hidden", "16", "--dynamics-max-epochs", "4",
    "--eval-every", "30", "--eval-episodes", "2", "--log-every", "10", "--checkpoint-every", "20", "--num-threads", "1",
]  # fmt: skip
ONCE = [  # imagination once, before policy learning
    "--model-buffer-size", "20000", "--rollout-batch-size", "1000",
    "--rollout-policy", "cvae", "--vae-hidden", "16", "--rollout-policy-updates", "60",
]  # fmt: skip
AGAIN = ["--rollout-every", "15", "--rollout-starts", "500", "--rollouts-kept", "2", "--hidden", "16"]  # and again, four times in a run
GAME = ["--hidden", "16", "--warm-start-updates", "40", "--horizon", "5", "--model-buffer-size", "330"]  # a step in every update
BCQ = ("bcq", "BCQ", [*ONCE, "--hidden", "16", "16", "--bcq-samples", "2", "--eval-samples", "4"], lambda step: ())
# script -> name without the model, class of the learner, flags that make it small, what update takes beside the batch
SCRIPTS = {
    "romi_cql": ("cql", "CQL", [*ONCE, "--hidden", "16", "--cql-samples", "2", "--bc-warmup", "20"], lambda step: (step < 20, False)),
    "romi_bcq": BCQ,
    "fomi_bcq": BCQ,
    "mopo": ("sac", "SAC", AGAIN, lambda step: (step,)),
    "combo": ("combo_cql", "COMBO", [*AGAIN, "--cql-samples", "2"], lambda step: (20, step)),
    "armor": ("atac", "ARMOR", GAME, None),
}
PHASES = ["dynamics", "rollout_policy", "warm_start", "imagination", "policy"]
LACKS = {"rollout_policy": ("mopo", "combo", "armor"), "imagination": ("armor",)}


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


def folder_of(run_dir, name):
    return run_dir / f"hopper-medium-replay-v2__{name}__0__small"


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """A hopper-like file: 40 episodes of 50 steps, some terminal, some cut by the clock."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "small.hdf5"
    obs = rng.normal(size=(2000, 11)).cumsum(0) * 0.01
    obs[:, 0] = 1.2
    ends = np.arange(2000) % 50 == 49
    terminals = ends & (np.arange(2000) % 100 == 99)
    with h5py.File(path, "w") as f:
        f["observations"], f["actions"] = obs.astype("f4"), rng.uniform(-1, 1, (2000, 3)).astype("f4")
        f["rewards"], f["terminals"], f["timeouts"] = rng.normal(size=2000).astype("f4"), terminals, ends & ~terminals
    return path


def arguments(script, data_file, run_dir, *flags):
    return [*SMALL, *SCRIPTS[script][2], "--dataset", str(data_file), "--run-dir", str(run_dir), *flags]


def run(script, data_file, run_dir, *flags):
    command = [sys.executable, str(ROOT / "algorithms" / f"{script}.py"), *arguments(script, data_file, run_dir, *flags)]
    return subprocess.run(command, capture_output=True, text=True)


def patched(patch, script, *rest):
    """The same command with some of the script's functions replaced before it starts."""
    head = f"import os, signal, sys, tyro; sys.path.insert(0, {str(ROOT / 'algorithms')!r}); import {script} as m\n"
    tail = "try: m.main(tyro.cli(m.Args))\nexcept m.UserError as e: sys.exit(e.report())"
    return subprocess.run([sys.executable, "-c", head + patch + tail, *arguments(script, *rest)], capture_output=True, text=True)


def leaves(x, path=""):
    if isinstance(x, dict):
        return {k: v for key in x for k, v in leaves(x[key], f"{path}/{key}").items()}
    if isinstance(x, (list, tuple)):
        return {k: v for i, y in enumerate(x) for k, v in leaves(y, f"{path}/{i}").items()}
    return {path: x}


def weights(folder):
    return {k: v for k, v in leaves(torch.load(folder / "checkpoint.pt", weights_only=True)).items() if isinstance(v, torch.Tensor)}


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows]


def assert_same_run(a, b):
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys() and len(x) > 50
    assert not [k for k in x if not torch.equal(x[k], y[k])]
    assert metrics(a) == metrics(b)


@pytest.fixture(scope="module")
def whole(script, data_file, tmp_path_factory):
    """The run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole")
    done = run(script, data_file, run_dir)
    assert done.returncode == 0, done.stderr
    return folder_of(run_dir, script)


def test_smoke_run_leaves_what_the_contract_names(script, whole):
    config, result = (json.loads((whole / f"{n}.json").read_text()) for n in ("config", "result"))
    assert config["args"]["horizon"] == 5 and config["args"]["exp_name"] == script  # resolved values
    assert result["updates"] == 60 and result["task"] == "hopper-medium-replay-v2" and result["algorithm"] == script
    assert math.isfinite(result["normalized_score"]) and result["dataset"]["transitions"] == config["dataset"]["transitions"]
    assert result["normalized_score"] == pytest.approx(100 * (result["return_mean"] + 20.272305) / 3254.572305)
    rows = metrics(whole)
    assert [r["update"] for r in rows if "eval/return" in r] == [30, 60]
    assert [r["update"] for r in rows if any(k.startswith("losses/") for k in r) and r["update"]] == [10, 20, 30, 40, 50, 60]
    rollouts = 4 if "--rollout-every" in SCRIPTS[script][2] else 0 if script in LACKS["imagination"] else 1
    assert sum("model/epoch" in r for r in rows) == 4 and sum("model/imagined_reward_min" in r for r in rows) == rollouts
    assert not list(whole.glob("*.part"))


def test_finished_run_is_left_alone_and_more_updates_carry_it_on(script, whole, data_file, tmp_path):
    run_dir = tmp_path / "runs"
    short = run(script, data_file, run_dir, "--total-updates", "40")
    assert short.returncode == 0, short.stderr
    folder = run_dir / whole.name
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    again = run(script, data_file, run_dir, "--total-updates", "40")
    assert again.returncode == 0 and "finished" in again.stdout
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    other = run(script, data_file, run_dir, "--total-updates", "40", "--gamma", "0.9")
    assert other.returncode == 2 and other.stderr.startswith("error:") and "--gamma (0.99 there)" in other.stderr
    fewer = run(script, data_file, run_dir, "--total-updates", "20")
    assert fewer.returncode == 2 and "--total-updates" in fewer.stderr
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    config = json.loads((folder / "config.json").read_text())
    del config["args"]["dynamics_bf16"]  # as if begun before this flag existed: it has its default
    (folder / "config.json").write_text(json.dumps(config))
    other = run(script, data_file, run_dir, "--dynamics-bf16")
    assert other.returncode == 2 and "--dynamics-bf16" in other.stderr
    (folder / "config.json").write_text(json.dumps(config | {"args": config["args"] | {"renamed_since": 1}}))
    other = run(script, data_file, run_dir)
    assert other.returncode == 2 and "--renamed-since" in other.stderr
    (folder / "config.json").write_text(json.dumps(config))
    assert run(script, data_file, run_dir).returncode == 0  # 60 updates
    x, y = weights(whole), weights(folder)
    assert not [k for k in x if not torch.equal(x[k], y[k])]


def test_whose_run_a_folder_holds(data_file, tmp_path):
    folder = folder_of(tmp_path, "mopo")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"args": {"gamma": 0.5}}')  # interrupted before its first checkpoint: settings may change
    (folder / "metrics.jsonl").touch()
    done = run("mopo", data_file, tmp_path)
    assert done.returncode == 0, done.stderr
    respelt = run("mopo", f"{data_file.parent}/../{data_file.parent.name}/{data_file.name}", tmp_path)
    assert respelt.returncode == 0 and "is finished" in respelt.stdout
    config, whole = (folder / "config.json").read_text(), (folder / "checkpoint.pt").read_bytes()
    (folder / "config.json").write_text(config.replace('"mopo.py"', '"combo.py"'))
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    other = run("mopo", data_file, tmp_path)
    assert other.returncode == 2 and "holds a run of combo.py; give another --run-dir" in other.stderr
    (folder / "config.json").write_text(config)
    damaged = run("mopo", data_file, tmp_path)
    assert damaged.returncode == 2 and damaged.stderr.startswith("error:") and "checkpoint.pt: cannot be read (" in damaged.stderr


def test_two_processes_do_not_train_in_one_folder(script, whole, data_file, tmp_path):
    import fcntl

    folder = shutil.copytree(whole, tmp_path / whole.name)
    (folder / "result.json").unlink()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with open(folder / "metrics.jsonl", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run(script, data_file, tmp_path)
    assert done.returncode == 2 and "another process is training in it" in done.stderr
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert run(script, data_file, tmp_path).returncode == 0


@pytest.mark.parametrize("phase", PHASES)
def test_resume_after_a_kill_equals_a_run_left_alone(script, whole, data_file, tmp_path, phase):
    """The process kills itself in the given phase: after a checkpoint, with work done since that is lost."""
    again = "--rollout-every" in SCRIPTS[script][2]
    if script in LACKS.get(phase, ()) or (phase == "warm_start" and script != "armor"):
        pytest.skip("has no such phase")
    where = {
        "dynamics": "x.get('model/epoch') == 3",
        "rollout_policy": "x.get('model/rollout_policy_update') == 50",
        "warm_start": "x.get('model/warm_start_update') == 30",
        "imagination": "False",
        "policy": "u == 50",
    }[phase]
    stop = "plain_imagine = m.imagine\ncalls = []\n"  # where there are several rollouts, in the fourth: two are in the checkpoint
    stop += f"def stop(*a):\n    calls.append(0)\n    return die() if len(calls) == {4 if again else 1} else plain_imagine(*a)\n"
    stop += "m.imagine = stop\n"
    killed = patched(
        "def die(*a): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"def log(self, u, x, plain=m.Run.log):\n    plain(self, u, x)\n    {where} and die()\n"
        "m.Run.log = log\n" + (stop if phase == "imagination" else ""),
        script,
        data_file,
        tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / whole.name
    assert not (folder / "result.json").exists()
    done = run(script, data_file, tmp_path)
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    assert_same_run(whole, folder)


def test_a_model_is_taken_from_another_run_only_if_it_is_the_same_model(script, whole, data_file, tmp_path):
    flags = ("--dynamics-from", str(whole), "--exp-name", "borrowed")
    done = run(script, data_file, tmp_path, *flags)
    assert done.returncode == 0 and "epochs" not in done.stderr, done.stderr
    x, y = weights(whole), weights(folder_of(tmp_path, "borrowed"))
    assert not [k for k in y if not torch.equal(x[k], y[k])]  # nothing else changes
    for wrong, name in (("--seed", "seed (0, here 1)"), ("--dynamics-max-epochs", "dynamics_max_epochs (4, here 1)")):
        done = run(script, data_file, tmp_path / "other", *flags, wrong, "1")
        assert done.returncode == 2 and done.stderr.startswith("error:") and f"another {name}" in done.stderr, done.stderr
    done = run(script, data_file, tmp_path / "other", "--dynamics-from", str(tmp_path))
    assert done.returncode == 2 and "no checkpoint.pt" in done.stderr and not (tmp_path / "other").exists()
    m, state = importlib.import_module(script), torch.load(whole / "checkpoint.pt", weights_only=True)
    key = dict(state["model_key"])
    del state["model_key"]["dynamics_bf16"]  # trained before this flag existed: with its default
    torch.save(state, tmp_path / "checkpoint.pt")
    taken, args = state["dynamics"], m.Args(dynamics_from=str(tmp_path))
    assert all(torch.equal(v, taken[k]) for k, v in m.model_of_another_run(args, key).items())
    with pytest.raises(m.UserError, match="another dynamics_bf16"):
        m.model_of_another_run(args, key | {"dynamics_bf16": True})


def test_same_seed_same_metrics_other_seed_other_metrics(script, whole, data_file, tmp_path):
    assert run(script, data_file, tmp_path).returncode == 0
    assert_same_run(whole, tmp_path / whole.name)
    assert run(script, data_file, tmp_path, "--seed", "1").returncode == 0
    assert metrics(tmp_path / whole.name.replace("__0__", "__1__")) != metrics(whole)


def test_without_the_model_it_is_the_base_learner(script, data_file, tmp_path):
    name, learner, _, extra = SCRIPTS[script]
    if extra is None:
        pytest.skip("begins with a warm start: tests/test_armor.py")
    flags = ("--model-ratio", "0", "--eval-episodes", "0")
    assert run(script, data_file, tmp_path, *flags).returncode == 0
    folder = folder_of(tmp_path, name)
    assert not any(k.startswith("model/") or k.startswith("eval/") for row in metrics(folder) for k in row)
    assert json.loads((folder / "result.json").read_text())["normalized_score"] is None
    # the same updates as the learner alone, fed from the real rows: no other path, no other random numbers
    m, task = importlib.import_module(script), parse_task("hopper-medium-replay")
    args = m.resolve(tyro.cli(m.Args, args=arguments(script, data_file, tmp_path, *flags)), task)
    data = load_dataset(task, str(data_file))
    torch.set_num_threads(1)
    torch.manual_seed(3)
    agent = getattr(m, learner)(11, 3, args, torch.device("cpu"))
    rows = m.pack(data.obs, data.act, data.rew, data.next_obs, data.terminated)
    prioritised = hasattr(args, "priority_policy")
    sampler = m.Sampler(len(data), m.priority_weights(data.trajectory_returns()), torch.device("cpu")) if prioritised else None
    for step in range(60):
        idx = sampler(20) if prioritised else torch.randint(len(data), (20,))
        agent.update(*m.unpack(rows[idx], 11, 3), *extra(step))
    targets = [p for k in vars(agent) if k.startswith("target_") and k != "target_entropy" for p in getattr(agent, k).parameters()]
    assert targets and not any(p.requires_grad for p in targets)  # a target in the graph keeps every update that it ever saw
    saved = leaves(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
    mine = leaves(agent.state_dict())
    assert all(torch.equal(v, saved[k]) for k, v in mine.items() if isinstance(v, torch.Tensor))


def test_batches_are_split_exactly(script, data_file, tmp_path, monkeypatch):
    m, sizes = importlib.import_module(script), []
    if not hasattr(m, "imagine"):
        pytest.skip("has no imagined transitions: tests/test_armor.py")
    learner = getattr(m, SCRIPTS[script][1])
    plain = learner.update

    def update(self, obs, *rest):
        sizes.append(((obs[:, 0] == 7).sum().item(), len(obs)))
        return plain(self, obs, *rest)

    monkeypatch.setattr(learner, "update", update)
    sevens = torch.cat([torch.full((100, 1), 7.0), torch.zeros(100, 26)], 1)
    if "--rollout-every" in SCRIPTS[script][2]:
        monkeypatch.setattr(m, "fitted_dynamics", lambda data, args, *a: m.Dynamics(11, 3, args))
        monkeypatch.setattr(m, "imagine", lambda *a: (sevens, {}))
    else:
        monkeypatch.setattr(m, "imagined_data", lambda *a: sevens)
    m.main(tyro.cli(m.Args, args=arguments(script, data_file, tmp_path, "--model-ratio", "0.7", "--eval-episodes", "0")))
    assert set(sizes) == {(14, 20)}
    assert (sevens[:, 0] == 7).all() and not sevens[:, 1:].any()  # learning from imagined rows writes none


def test_a_loss_that_is_not_finite_ends_the_run_with_status_3(script, data_file, tmp_path):
    name, learner, *_ = SCRIPTS[script]
    flags = ("--model-ratio", "0", "--eval-episodes", "0")
    assert run(script, data_file, tmp_path, *flags, "--total-updates", "40").returncode == 0
    folder = folder_of(tmp_path, name)
    good = (folder / "checkpoint.pt").read_bytes()
    critic = f"m.{learner}.{'adversary' if script == 'armor' else 'critic'}_loss"
    nan = f"plain = {critic}\ndef nan(*a):\n    loss, *rest = plain(*a)\n    return loss * float('nan'), *rest\n"
    done = patched(f"{nan}{critic} = nan\n", script, data_file, tmp_path, *flags)
    assert done.returncode == 3 and "not finite at update" in done.stderr and "Traceback" not in done.stderr
    assert any(line.startswith("error:") for line in done.stderr.splitlines())
    assert (folder / "checkpoint.pt").read_bytes() == good


def test_wandb_gets_the_metrics_offline_and_never_stops_a_run(data_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ("--track", "--model-ratio", "0", "--eval-episodes", "0")
    done = run("romi_cql", data_file, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path, "cql")
    files = list(folder.rglob("*.wandb"))
    assert len(files) == 1 and json.loads((folder / "config.json").read_text())["wandb_id"] in files[0].name
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise RuntimeError('no such client')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    done = run("romi_cql", data_file, tmp_path / "two", *flags)
    assert done.returncode == 0 and "no such client" in done.stderr


def test_evaluations_log_return_and_discounted_return(monkeypatch):
    m, logged = importlib.import_module("mopo"), {}

    def evaluate(envs, act, seed, trajectories, rewards):
        rewards.extend([np.array([1.0, 1.0, 1.0]), np.array([2.0])])  # discounted by 0.5: 1.75 and 2
        return np.array([3.0, 2.0]), np.array([3, 1])

    monkeypatch.setattr(m, "evaluate", evaluate)
    run = SimpleNamespace(args=m.Args(gamma=0.5), task=parse_task("hopper-medium-replay"), evals=[], draw=lambda *a: None)
    run.log = lambda update, metrics: logged.update(metrics)
    score = m.Run.evaluate(run, 7, [], None)
    assert logged["eval/discounted_return"] == 1.875 and logged["eval/return"] == 2.5 and logged["eval/length"] == 2.0
    assert score == logged["eval/normalized_score"] and run.evals[0]["update"] == 7


def test_a_copied_script_finds_its_own_utils_before_a_package_of_that_name(data_file, tmp_path):
    project = tmp_path / "project"
    (project / "utils").mkdir(parents=True)
    (project / "utils" / "__init__.py").touch()
    (project / "rl").mkdir()
    for file in (ROOT / "algorithms" / "mopo.py", ROOT / "utils.py"):
        (project / "rl" / file.name).write_text(file.read_text())
    command = [sys.executable, "mopo.py", "--env", "hopper-medium-replay"]
    done = subprocess.run([*command, "--dataset", "bundled"], capture_output=True, text=True, cwd=project / "rl")
    assert done.returncode == 2 and "bundled is missing, copy it from the repository" in done.stderr, done.stderr
    lines = [next(line for line in p.read_text().splitlines() if "sys.path.insert" in line) for p in (ROOT / "algorithms").glob("*.py")]
    assert len(set(lines)) == 1
