"""The case study's measures against numbers worked by hand, closed-form motion, brute force and MuJoCo; and its command line."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import mujoco
import numpy as np
import pytest
import romi_bcq
import torch
import tyro
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

import case_study as study
import report
from maze2d_env import Maze2d, wall_distance
from utils import Dataset, UserError

ROOT = Path(__file__).resolve().parents[1]
H, M = 0.01, 4.18879020478639  # s, kg


# --- discrepancy ---


def test_discrepancy_by_hand():
    data = np.array([[0.0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 9]])
    far = np.array([[0, 1.0, 0, 0], [3, 0, 2, 0], [1, 0, 0, 9]])  # 1, 2 and 1 away
    near = np.array([[0, 0, 0, 5.0], [1.4, 0, 0, 0]])  # 4 away from the third, not 5 from the first; 1.4, not 1.6
    states, positions = cKDTree(data), cKDTree(data[:, :2])
    np.testing.assert_allclose(study.discrepancy(states, [far, data, near]), [4 / 3, 0, 2.7])
    np.testing.assert_allclose(study.discrepancy(positions, [far, data, near]), [2 / 3, 0, 0.7])
    assert study.mean_se([1.0, 3.0]) == [2, pytest.approx(1)] and study.mean_se([1.0]) == [1, None]


def test_discrepancy_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    data, trajectories = rng.normal(size=(500, 4)), [rng.normal(size=(n, 4)) for n in (1, 7, 30)]
    for dims in (4, 2):
        tree = cKDTree(data[:, :dims], balanced_tree=False)
        expected = [cdist(t[:, :dims], data[:, :dims]).min(1).mean() for t in trajectories]
        np.testing.assert_allclose(study.discrepancy(tree, trajectories), expected, atol=1e-12)


# --- accuracy ---


def forward(obs, act):
    v = obs[..., 2:] + H * (100 * act - obs[..., 2:]) / (M + H)  # no speed is clipped here
    return torch.cat([obs[..., :2] + H * v, v], -1)


def reverse(next_obs, act):
    v = (next_obs[..., 2:] * (M + H) - 100 * H * act) / M
    return torch.cat([next_obs[..., :2] - H * next_obs[..., 2:], v], -1)


@pytest.fixture(scope="module")
def free_motion():
    """8 trajectories of 25 transitions amid the bottom corridor, from the simulator itself; the row's speed is its reward."""
    env, rng = Maze2d("umaze"), np.random.default_rng(0)
    obs, act, after = np.zeros((8, 25, 4)), rng.uniform(-1, 1, (8, 25, 2)), np.zeros((8, 25, 4))
    for e in range(8):
        env.set_state(rng.uniform([2.75, 1.6], [2.85, 1.9]), rng.uniform(-0.3, 0.3, 2))
        for t in range(25):
            obs[e, t] = env.observation()
            after[e, t] = env.step(act[e, t])[0]
    obs, act, after = (torch.as_tensor(x.reshape(200, -1)) for x in (obs, act, after))
    yes = torch.ones(200, dtype=torch.bool)
    return Dataset(obs, act, obs[:, 2:].norm(dim=1), after, torch.zeros(200), yes, torch.arange(200) // 25)


def speed(backward, given, pred):
    return (pred if backward else given)[..., 2:].norm(dim=-1)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("h", [1, 5])
def test_a_perfect_model_has_no_error(free_motion, h, backward):
    def predict(cond, act):
        pred = (reverse if backward else forward)(cond, act)
        return pred[None], speed(backward, cond, pred)[None]

    chains = study.recorded_chains(free_motion, torch.arange(200), h, backward)
    out = study.accuracy(predict, free_motion, chains, backward)
    assert out["chains"] == 8 * (25 - h + 1) and out["explained"] == pytest.approx(1, abs=1e-12)
    assert max(out[f"rmse_{k}"] for k in ("state", "position", "reward")) < 1e-12


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("h", [1, 5])
def test_known_errors_of_a_model_come_out_as_they_are(free_motion, h, backward):
    """Two elites: one errs by (0.03, -0.04) m a step, the other by 0.1 m/s, and by 0.5 in the reward."""
    errors = torch.tensor([[[0.03, -0.04, 0, 0]], [[0, 0, 0.1, 0]]], dtype=torch.float64)

    def predict(cond, act):
        pred = (reverse if backward else forward)(cond.expand(2, -1, -1), act.expand(2, -1, -1))
        return pred + errors, speed(backward, cond.expand(2, -1, -1), pred) + torch.tensor([[0.0], [0.5]])

    chains = study.recorded_chains(free_motion, torch.arange(200), h, backward)
    out = study.accuracy(predict, free_motion, chains, backward)
    x = v = 0.0  # the second elite's error, passed on from step to step
    for _ in range(h):
        x, v = (x - H * v, v * (M + H) / M + 0.1) if backward else (x + H * v * M / (M + H), v * M / (M + H) + 0.1)
    assert out["rmse_position"] == pytest.approx((((0.05 * h) ** 2 + x**2) / 2) ** 0.5)
    assert out["rmse_state"] == pytest.approx((((0.05 * h) ** 2 + x**2 + v**2) / 2) ** 0.5)
    if h == 1:
        assert out["rmse_reward"] == pytest.approx(0.5 / 2**0.5)
    change = (free_motion.next_obs[chains[:, -1]] - free_motion.obs[chains[:, 0]]).numpy()
    assert out["explained"] == pytest.approx(1 - out["rmse_state"] ** 2 / change.var(0).sum())


def test_chains_stay_within_a_trajectory_and_touch_the_held_out_row():
    trajectory, has_next = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2]), torch.tensor([True] * 6 + [False, True])
    data = Dataset(*[torch.zeros(8)] * 5, has_next, trajectory)
    assert study.recorded_chains(data, torch.tensor([0, 2, 4, 5, 7]), 2, False).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert study.recorded_chains(data, torch.tensor([0, 2, 4, 5, 7]), 2, True).tolist() == [[1, 2], [4, 5]]
    args = replace(romi_bcq.Args(), holdout_ratio=0.5)
    rows = study.held_out(data, args)
    assert len(rows) == 3 and 6 not in rows and not torch.equal(rows, study.held_out(data, replace(args, seed=1)))


def test_elite_means_are_those_of_the_elites():
    dynamics = romi_bcq.Dynamics(4, 2, romi_bcq.Args(ensemble_size=3, num_elites=2, dynamics_hidden=8))
    with torch.no_grad():
        for p in (*dynamics.weight, *dynamics.bias):
            p.zero_()
        dynamics.bias[-1][:, 0, :5] = torch.arange(15.0).view(3, 5)  # reward, then change of state
    dynamics.elites.copy_(torch.tensor([2, 0]))
    pred, rew = study.elite_means(dynamics)(torch.full((6, 4), 100.0), torch.rand(6, 2))
    assert rew.tolist() == [[10.0] * 6, [0.0] * 6] and pred[:, 5].tolist() == [[111, 112, 113, 114], [101, 102, 103, 104]]


# --- walls ---


def test_wall_distance_by_hand():
    """The wall between umaze's corridors reaches from row 1.3 to 2.3 and up to column 2.3."""
    ways = [
        ((2.8, 1.6), (2.8, 1.6), 0.5),  # stands amid the lower corridor, rows 2.3 to 3.3
        ((2.4, 0.8), (2.4, 1.9), 0.1),  # along the wall
        ((2.8, 0.5), (2.8, 2.9), 0.2),  # ends nearer to a wall than it begins: the left one ends at column 0.3
        ((1.2, 1.0), (2.4, 1.0), 0.0),  # through the wall, from corridor to corridor
        ((1.2, 2.1), (1.5, 2.4), 0.0),  # cuts its corner at (1.3, 2.3), both ends are outside
        ((1.1, 2.4), (1.2, 2.5), 0.15 * 2**0.5),  # nearest to that corner half-way, at (1.15, 2.45)
        ((1.0, -0.1), (1.0, -0.1), 0.0),  # within the left wall
        ((9.0, 9.0), (9.1, 9.0), 0.0),  # outside
    ]
    begin, end, expected = (np.array(x) for x in zip(*ways, strict=True))
    np.testing.assert_allclose(wall_distance("umaze", begin, end), expected, atol=1e-12)
    np.testing.assert_allclose(wall_distance("umaze", end, begin), expected, atol=1e-12)
    obs, next_obs = (np.concatenate([x, x], 1) for x in (begin, end))
    assert study.wall_shares("umaze", obs, next_obs) == {"overlaps_wall": 4 / 8, "enters_wall": 4 / 8}


@pytest.mark.parametrize("maze", ["umaze", "large"])
def test_wall_distance_is_mujocos(maze):
    env, rng = Maze2d(maze), np.random.default_rng(0)
    boxes = np.flatnonzero(env.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)
    ball = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_GEOM, "ball")
    begin = env.starts[rng.integers(len(env.starts), size=40)] + rng.uniform(-0.5, 0.1, (40, 2))
    end = begin + rng.normal(0, 0.3, (40, 2))
    least = np.full((40, 31), np.inf)
    for c in range(40):
        for k in range(31):
            env.set_state(begin[c] + k / 30 * (end[c] - begin[c]), [0, 0])
            mujoco.mj_forward(env.model, env.data)
            least[c, k] = min(mujoco.mj_geomDistance(env.model, env.data, ball, b, 2.0, None) for b in boxes) + 0.1
    here = wall_distance(maze, begin, begin)
    np.testing.assert_allclose(here, least[:, 0].clip(0), atol=1e-6)
    way, points = wall_distance(maze, begin, end), least.min(1).clip(0)
    spacing = np.linalg.norm(end - begin, axis=1) / 30
    assert (way <= points + 1e-6).all() and (way >= points - spacing / 2 - 1e-6).all() and (way == 0).any() and (way > 0).any()


# --- runs ---

TINY = [
    "--env", "maze2d-umaze", "--total-updates", "30", "--batch-size", "20", "--hidden", "16", "16", "--vae-hidden", "16",
    "--dynamics-hidden", "16", "--dynamics-max-epochs", "2", "--model-buffer-size", "2000", "--rollout-batch-size", "500",
    "--bcq-samples", "2", "--eval-samples", "4", "--eval-episodes", "1", "--num-threads", "1",
]  # fmt: skip
FEW = ["--episodes", "2", "--chains", "40", "--num-threads", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """romi_bcq, fomi_bcq and bcq on 2000 steps of random motion, 10 segments, in their default folders."""
    folder, env, rng = tmp_path_factory.mktemp("runs"), Maze2d("umaze"), np.random.default_rng(0)
    obs, act = np.zeros((2000, 4)), rng.uniform(-1, 1, (2000, 2)).astype("f4")
    state, _ = env.reset(seed=0)
    for t in range(2000):
        obs[t], state = state, env.step(act[t])[0]
    with h5py.File(folder / "small.hdf5", "w") as f:
        f["observations"], f["actions"], f["rewards"] = obs.astype("f4"), act, env.reward(obs[:, :2]).astype("f4")
        f["terminals"], f["timeouts"] = np.zeros(2000, bool), np.arange(2000) % 200 == 199
    for script, *flags in (["romi_bcq"], ["fomi_bcq"], ["romi_bcq", "--model-ratio", "0"]):
        m = importlib.import_module(script)
        m.main(tyro.cli(m.Args, args=[*TINY, *flags, "--dataset", str(folder / "small.hdf5"), "--run-dir", str(folder)]))
    return folder


def of(runs, name):
    return runs / f"maze2d-umaze-v1__{name}__0__small"


def command(*flags):
    return subprocess.run([sys.executable, str(ROOT / "case_study.py"), *map(str, flags)], capture_output=True, text=True)


def study_of(out, *flags):
    study.main(tyro.cli(study.Args, args=[*FEW, "--out", str(out), *map(str, flags)]))
    return json.loads((out / "case_study_maze2d-umaze-v1.json").read_text())


def edited(runs, name, tmp_path, exp_name=None, **changes):
    """A copy of a run with another checkpoint; None removes an entry."""
    folder = tmp_path / f"{exp_name or name}-copy"
    shutil.copytree(of(runs, name), folder)
    config = json.loads((folder / "config.json").read_text())
    config["args"]["exp_name"] = exp_name or name
    (folder / "config.json").write_text(json.dumps(config))
    state = torch.load(folder / "checkpoint.pt", weights_only=True) | changes
    torch.save({k: v for k, v in state.items() if v is not None}, folder / "checkpoint.pt")
    return folder


def test_command_line(runs, tmp_path):
    done = command(*FEW, "--run-dir", runs, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "case_study_maze2d-umaze-v1.json").read_text())
    assert (tmp_path / "case_study_maze2d-umaze-v1.png").stat().st_size > 10_000 and result["data"]["transitions"] == 1990
    assert [(k, r["direction"]) for k, r in result["runs"].items()] == [("romi_bcq", "reverse"), ("fomi_bcq", "forward"), ("bcq", None)]
    for name, run in result["runs"].items():
        assert run["updates"] == 30 and run["executed"]["trajectories"] == 2 and run["executed"]["discrepancy"][0] > 0
        if name == "bcq":
            assert "held_out" not in run and "imagined" not in run
            continue
        assert run["imagined"]["trajectories"] == 40 and 0 < run["imagined"]["discrepancy_positions"][0] < run["imagined"]["discrepancy"][0]
        # these are the rows that the run held out: the error that it logged itself, a mean over reward and four dimensions
        lines = [json.loads(line) for line in (of(runs, name) / "metrics.jsonl").read_text().splitlines()]
        logged = next(line["model/elite_mse"] for line in lines if "model/elite_mse" in line)
        one = run["held_out"]["1"]
        assert one["chains"] == 398 and (one["rmse_state"] ** 2 + one["rmse_reward"] ** 2) / 5 == pytest.approx(logged, rel=1e-4)
        assert 300 < run["held_out"]["5"]["chains"] < 398
    tables = re.findall(r"^\| .* \|$", done.stdout, re.M)
    assert len({t.count("|") for t in tables}) == 2 and len(tables) == 2 + 5 + 2 + 4 + 2 + 3
    assert report.tables([], [tmp_path / "case_study_maze2d-umaze-v1.json"])["case_study_maze2d-umaze-v1"] in done.stdout
    assert str(tmp_path) not in json.dumps(result)
    again = study_of(tmp_path / "again", "--run-dir", runs)
    assert again == result  # the same command, the same numbers
    assert study_of(tmp_path / "again", "--run-dir", runs, "--seed", "1")["runs"]["bcq"]["executed"] != result["runs"]["bcq"]["executed"]


def test_maze_runs_draw_what_they_imagine_and_execute(runs):
    for name, pictures in {"romi_bcq": ["imagination"], "fomi_bcq": ["imagination"], "bcq": []}.items():
        assert sorted(file.stem for file in of(runs, name).glob("*.png")) == ["execution", *pictures]
    assert all(file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 2_000 for file in runs.glob("*/*.png"))


def test_chains_are_imagined_in_the_runs_direction(runs):
    first = {}
    for name in ("romi_bcq", "fomi_bcq"):
        run = study.StoredRun(of(runs, name))
        data = study.load_dataset(run.task, str(runs / "small.hdf5"))
        run.load_networks(data)
        obs, act, next_obs = study.imagined_chains(run, data, 30, seed=0)
        assert obs.shape == next_obs.shape == (30, 5, 4) and act.shape == (30, 5, 2) and (obs[:, 1:] == next_obs[:, :-1]).all()
        rows = {tuple(x) for x in data.obs.tolist()}
        ends, others = (next_obs[:, -1], obs[:, 0]) if name == "romi_bcq" else (obs[:, 0], next_obs[:, -1])
        assert {tuple(x) for x in ends} <= rows and not {tuple(x) for x in others} & rows
        first[name] = ends
    assert (first["romi_bcq"] == first["fomi_bcq"]).all()


def test_unfinished_runs_are_shown_as_far_as_they_go(runs, tmp_path, capsys):
    folders = [
        edited(runs, "romi_bcq", tmp_path, "training", phase="dynamics", agent=None),
        edited(runs, "fomi_bcq", tmp_path, "cloning", phase="rollout_policy", agent=None),
        edited(runs, "romi_bcq", tmp_path, "waiting", agent=None),
    ]
    result = study_of(tmp_path, "--runs", *folders, "--labels", "a", "b", "c")["runs"]
    has = [[k for k in ("held_out", "imagined", "executed") if k in result[n]] for n in "abc"]
    assert has == [[], ["held_out"], ["held_out", "imagined"]]
    said = capsys.readouterr().err
    assert "left out: model" in said and "left out: imagination" in said and "left out: policy" in said


def test_direction_does_not_depend_on_the_name_alone(runs, free_motion, tmp_path, monkeypatch):
    """The checkpoint's word counts, then a name of ours, then what fits the data."""
    key = {"direction": "forward"}
    folders = [edited(runs, "fomi_bcq", tmp_path, "romi_not", model_key=key), edited(runs, "fomi_bcq", tmp_path, "fomi_x", model_key=None)]
    assert [r["direction"] for r in study_of(tmp_path, "--episodes", "0", "--runs", *folders)["runs"].values()] == ["forward"] * 2
    run = study.StoredRun(edited(runs, "fomi_bcq", tmp_path, "quick", model_key=None))
    run.args = romi_bcq.Args()
    for motion, direction in ((forward, "forward"), (reverse, "reverse")):
        monkeypatch.setattr(study, "elite_means", lambda _, f=motion: lambda cond, act: (f(cond, act)[None], torch.zeros(1, len(act))))
        assert run.find_direction(free_motion) == direction


def test_what_cannot_be_used_is_said_in_one_line(runs, tmp_path):
    done = command("--runs", tmp_path)
    assert done.returncode == 2 and re.fullmatch(r"error: [^\n]*is no run[^\n]*\n", done.stderr), done.stderr

    def error(*flags):
        with pytest.raises(UserError) as e:
            study_of(tmp_path, *flags)
        assert e.value.status == 2
        return str(e.value)

    assert "no runs on maze2d-medium-v1" in error("--env", "maze2d-medium", "--run-dir", tmp_path)
    hopper = edited(runs, "bcq", tmp_path, "hopper")
    config = json.loads((hopper / "config.json").read_text())
    (hopper / "config.json").write_text(json.dumps(config | {"task": "hopper-medium-v2"}))
    assert "no maze" in error("--runs", hopper)
    (hopper / "config.json").write_text(json.dumps(config | {"dataset": {"sha256": "another", "source": "file"}}))
    assert "different data sets" in error("--runs", hopper, of(runs, "romi_bcq"))
    assert "another sha256" in error("--runs", hopper)
    (hopper / "checkpoint.pt").write_bytes(b"torn")
    assert "cannot be read" in error("--runs", hopper)
    (hopper / "config.json").write_text("{}")
    assert "cannot be read" in error("--runs", hopper)
    other = edited(runs, "bcq", tmp_path, "other", agent={"qf": {}})
    assert "does not fit" in error("--runs", other)
    assert "as many different names" in error("--runs", of(runs, "bcq"), "--labels", "a", "b")
