"""AntMaze: MuJoCo 2.2.0's physics, starts, goals, reward, end; D4RL's recipe for data, with a policy of our own."""

import collections
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import pytest
import romi_bcq
import torch
import tyro
from gymnasium.utils.env_checker import check_env

import envs.antmaze as env_file
import utils
from benchmark import report
from benchmark.case_study import case_study
from plumbing import UserError
from utils import load_dataset, make_env, normalized_score, parse_task

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
GOALS = {"umaze": (0, 8), "medium": (20, 20), "large": (32, 24)}  # middles of the evaluation's goal cells, (x, y)
VERSION = tuple(int(n) for n in mujoco.__version__.split(".")[:2])
needs_reference = pytest.mark.skipif(not SHARED.exists(), reason="the reference is not shipped")


@pytest.fixture(scope="module")
def generator():
    path = sys.path[:]
    spec = importlib.util.spec_from_file_location("antmaze_generator", ROOT / "datasets" / "antmaze.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)  # rewrites sys.path[0], which is its own only when it runs as a script
    sys.path[:] = path
    return module


@pytest.fixture
def make(generator, monkeypatch, tmp_path):
    """main() with runs of 40 rows of an ant that jerks at random, two of them a part."""
    monkeypatch.setattr(generator, "ROWS", 40)
    monkeypatch.setattr(generator, "PART", 2)

    def run(act=lambda obs, waypoint, rng: rng.uniform(-1, 1, 8), **flags):
        generator.main(generator.Args(**{"out": tmp_path / "data", "steps": 100} | flags), act)
        task = flags.get("task", "umaze").replace("-", "_")
        with h5py.File(flags.get("out", tmp_path / "data") / f"antmaze_{task}.hdf5") as f:
            return {k: f[k][()] for k in (*(k for k in f if k != "infos"), "infos/goal")}

    return run


# --- physics ---


@needs_reference
@pytest.mark.parametrize("maze", env_file.MAZES)
def test_steps_are_mujoco_2s(maze):
    env = env_file.AntMaze(maze)
    with np.load(SHARED / "antmaze_reference.npz") as f:
        states, act, after, contacts = (f[f"{maze}_{k}"] for k in ("states", "actions", "next_states", "contacts"))
    rows = np.r_[np.flatnonzero(contacts > 0)[:200], np.flatnonzero(contacts == 0)[:20]]
    error = []
    for i in rows:
        env.set_state(states[i, :15], states[i, 15:])
        error.append(np.abs(env.step(act[i])[0] - after[i]).max())
    median, most = np.quantile(error, (0.5, 0.95))
    assert median < (3e-4 if VERSION >= (3, 5) else 1e-12) and most < 3e-3  # 0.2 and 0.9 with the margins as they are


def test_the_ant_is_d4rls():
    model = env_file.mujoco_model("umaze")
    assert model.body_mass.sum() == pytest.approx(0.910880, abs=1e-6)
    assert (model.nq, model.nv, model.nu, model.opt.timestep) == (15, 14, 8, 0.02)
    assert model.geom_margin == pytest.approx(0.005 if VERSION >= (3, 5) else 0.01)
    joints = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, i) for i in model.actuator_trnid[:, 0]]
    assert joints == [f"{joint}_{i}" for i in (4, 1, 2, 3) for joint in ("hip", "ankle")]
    env = env_file.AntMaze()
    env.reset(seed=0)
    env.step(np.full(8, 2.0))
    assert (env.data.ctrl == 30).all()  # clipped to 1, then scaled


# --- task ---


@pytest.mark.parametrize("task", env_file.TASKS)
def test_starts_and_goals(task):
    env, maze = make_env(parse_task(f"antmaze-{task}")), task.split("-")[0]
    assert env.spec.id == f"Rewind/AntMaze-{task}-v2" and env.spec.max_episode_steps == (
        700 if maze == "umaze" else 1000
    )
    assert make_env(parse_task(f"antmaze-{task}-v0")).spec.id == env.spec.id
    starts, goals = [], []
    for seed in range(300):
        obs, _ = env.reset(seed=seed)
        starts.append(obs)
        goals.append(env.unwrapped.goal)
    starts, goals = np.array(starts), np.array(goals) - GOALS[maze]
    moved = starts[:, :15] - [0, 0, 0.75, 1, *[0] * 11]
    assert (
        -0.1 <= moved.min() < -0.099 and 0.099 < moved.max() <= 0.1 and moved.std() == pytest.approx(0.0577, rel=0.05)
    )
    assert starts[:, 15:].std() == pytest.approx(0.1, rel=0.05)
    # U(0, 1) + U(0, 0.5) along both axes: mean 0.75, variance 1/12 + 1/48
    assert goals.min() >= 0 and 1.3 < goals.max() <= 1.5
    assert goals.mean(0) == pytest.approx(0.75, abs=0.08) and goals.std(0) == pytest.approx((5 / 48) ** 0.5, rel=0.15)
    again, _ = env.reset(seed=0)
    assert (again == starts[0]).all() and (env.unwrapped.goal == goals[0] + GOALS[maze]).all()
    env.reset()
    assert (env.unwrapped.goal != goals[0] + GOALS[maze]).all()  # a new one at every reset


def test_environment_is_gymnasiums(recwarn):
    check_env(gymnasium.make("Rewind/AntMaze-umaze-v2", render_mode="rgb_array").unwrapped)


def test_reward_and_end_are_those_of_the_position_after_the_step():
    env, act = env_file.AntMaze("medium"), np.full(8, 0.5, np.float32)
    begin, _ = env.reset(seed=3)
    after = env.step(act)[0]
    for distance, reached in ((0.4999, True), (0.5001, False)):
        env.set_state(begin[:15], begin[15:])
        env.goal = after[:2] + distance * np.array([0.6, 0.8])
        obs, reward, terminated, truncated, _ = env.step(act)
        assert (obs == after).all() and (reward, terminated, truncated) == (float(reached), reached, False)


def test_episodes_end_after_700_steps_in_umaze_and_1000_elsewhere():
    env = make_env(parse_task("antmaze-umaze-diverse"))
    env.reset(seed=0)
    steps, truncated = 0, False
    while not truncated:
        _, reward, terminated, truncated, _ = env.step(np.zeros(8, np.float32))
        steps += 1
        assert not (reward or terminated)
    assert steps == 700
    assert {parse_task(f"antmaze-{t}").max_steps for t in env_file.TASKS if "umaze" not in t} == {1000}
    assert normalized_score(parse_task("antmaze-umaze"), 0.25) == 25


@pytest.mark.parametrize("maze", env_file.MAZES)
def test_y_grows_downwards(maze):
    """The ant fits into the cell in row r and column c at x = 4 (c - 1), y = 4 (r - 1); in the mirror image not."""
    env = env_file.AntMaze(maze)
    boxes = set(np.flatnonzero(env.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX).tolist())

    def touches_walls(cell, mirrored):
        row = len(env_file.MAZES[maze]) - 1 - cell[0] if mirrored else cell[0]
        env.set_state(np.r_[4 * (cell[1] - 1), 4 * (row - 1), env.model.qpos0[2:]], np.zeros(14))
        mujoco.mj_forward(env.model, env.data)
        return any(boxes & set(contact.geom.tolist()) for contact in env.data.contact)

    cells = [(r, c) for r, line in enumerate(env_file.MAZES[maze]) for c in range(len(line))]
    wall = {(r, c): env_file.MAZES[maze][r][c] == "#" for r, c in cells}
    assert all(touches_walls(cell, False) == wall[cell] for cell in cells)
    if maze != "umaze":  # which is its own mirror image but for start and goal
        assert any(touches_walls(cell, True) != wall[cell] for cell in cells)
    assert env_file.MAZES[maze][1][1] == "R" and tuple(env_file.middle(env_file.goal_cell(maze))) == GOALS[maze]


def test_pictures(tmp_path):
    env = gymnasium.make("Rewind/AntMaze-umaze-v2", render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    image = env.render()
    assert image.shape == (400, 400, 3) and (env.unwrapped.observation() == obs).all()
    at = lambda x, y: tuple(image[round(20 * y + 120), round(20 * x + 120)].tolist())  # noqa: E731 - 20 pixels a metre
    assert at(0, 0) == (139, 0, 0) and at(0, 4) == (128, 128, 128) and at(8, 4) == (255, 255, 255)
    assert at(*env.unwrapped.goal) == (50, 205, 50)
    way = np.zeros((50, 29))
    way[:, 1] = np.linspace(0, 8, 50)
    picture = np.asarray(env_file.view_trajectories("umaze", [way], 80))
    column = picture[:, 120].astype(int)  # x = 0: blue at y = 0, red at y = 8
    assert (np.abs(column[122] - [0, 0, 255]) < 10).all() and (np.abs(column[277] - [255, 0, 0]) < 10).all()
    utils.draw_maze(parse_task("antmaze-umaze"), [way], tmp_path, "execution")
    assert (tmp_path / "execution.png").stat().st_size > 500


def test_replayed_chains_of_the_simulator_itself_have_no_error():
    env, rng = env_file.AntMaze("umaze"), np.random.default_rng(0)
    obs, act, after = np.zeros((2, 3, 29)), rng.uniform(-1, 1, (2, 3, 8)), np.zeros((2, 3, 29))
    for c in range(2):
        state = env.start(rng)
        state = env.step(rng.uniform(-1, 1, 8))[0]  # from here on the quaternion has length 1
        for t in range(3):
            obs[c, t] = state
            state = after[c, t] = env.step(act[c, t])[0]
    assert env_file.replay_error("umaze", obs, act, after) == pytest.approx(
        (0, 0), abs=1e-3
    )  # not the warm start's bits
    after[:, 2, :2] += [30, 40]
    assert env_file.replay_error("umaze", obs, act, after) == pytest.approx((50 / 3, 50), rel=1e-3)


# --- D4RL's policy ---


def layers(rng):
    return [(rng.normal(0, 0.1, (o, i)).astype("f4"), rng.normal(0, 0.1, o).astype("f4"))
            for o, i in ((6, 29), (5, 6), (8, 5), (8, 5))]  # fmt: skip


def write_policy(path, weights):
    """A file of the old kind, as torch < 1.6 wrote it: objects with `_modules`, which hold `_parameters`."""
    modules = {}
    for name, (weight, bias) in zip(("fc0", "fc1", "last_fc", "last_fc_log_std"), weights, strict=True):
        module = torch.nn.Linear(*weight.shape[::-1])
        module.weight.data[:], module.bias.data[:] = torch.from_numpy(weight), torch.from_numpy(bias)
        modules[name] = module
    modules["fc0"].weight.data = modules["fc0"].weight.data.T.contiguous().T  # strides are not always a row's length
    policy = torch.nn.ModuleDict(modules)
    for module in policy.modules():
        del module.__dict__["_non_persistent_buffers_set"]  # a set, which those versions did not have
    torch.save({"exploration/policy": policy}, path, _use_new_zipfile_serialization=False)


def test_policy_is_read_from_a_stubbed_pickle(generator, tmp_path):
    weights = layers(np.random.default_rng(0))
    write_policy(tmp_path / "a.pkl", weights)
    read = generator.read_policy(tmp_path / "a.pkl")
    for have, want in zip(read[:2], weights[:2], strict=True):
        assert all((a == b).all() for a, b in zip(have, want, strict=True))
    for i in range(2):
        assert (read[2][i] == np.concatenate([weights[2][i], weights[3][i]])).all()
    # its action by hand: the observation without x and y, then a way of length 10; noise is the generator's
    obs, goal = np.random.default_rng(1).normal(size=29), np.array([3.0, 4.0])
    x = np.r_[obs[2:], 10 * (goal - obs[:2]) / np.linalg.norm(goal - obs[:2])]
    for weight, bias in weights[:2]:
        x = np.maximum(weight @ x + bias, 0)
    mean, log_std = (weight @ x + bias for weight, bias in weights[2:])
    action = np.tanh(mean + np.exp(log_std) * np.random.default_rng(2).standard_normal(8))
    np.testing.assert_allclose(generator.Policy(read)(obs, goal, np.random.default_rng(2)), action, rtol=1e-5)


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, getattr, print])
def test_a_pickle_that_would_run_code_is_refused(generator, tmp_path, function):
    path, trace = tmp_path / "a.pkl", tmp_path / "trace"
    argument = {os.system: f"touch {trace}", eval: f"open({str(trace)!r}, 'w')"}.get(function, "x")
    content = {"exploration/policy": Evil(function, argument)}
    path.write_bytes(b"".join(pickle.dumps(x, 2) for x in (1, 2, {}, content, [])))
    with pytest.raises(UserError, match=r"is not D4RL's policy \(it asks for"):
        generator.read_policy(path)
    assert not trace.exists()


def test_names_that_the_file_may_hold_run_nothing(generator, tmp_path):
    """Names of torch and the like stand for nothing, even those of functions."""
    path, trace = tmp_path / "a.pkl", tmp_path / "trace"
    path.write_bytes(
        b"".join(pickle.dumps(x, 2) for x in (1, 2, {}))
        + b"\x80\x02ctorch.serialization\nos.system\n(V" + f"touch {trace}".encode() + b"\ntR."
        + pickle.dumps([], 2)
    )  # fmt: skip
    with pytest.raises(UserError, match="is not D4RL's policy"):
        generator.read_policy(path)
    assert not trace.exists()
    for content in (b"", b"\x80\x02", b"no pickle at all", pickle.dumps(collections.OrderedDict(), 2)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not D4RL's policy"):
            generator.read_policy(path)


@needs_reference
def test_d4rls_ant_walks(generator, monkeypatch):
    """On its way to umaze's goal it gets round the first corner, 6 m away, in most of 4 runs of 120 steps."""
    monkeypatch.setattr(generator, "ROWS", 120)
    act = generator.Policy(generator.read_policy(SHARED / "ant_hierarch_pol.pkl"))
    assert [weight.shape for weight, _ in act.layers] == [(256, 29), (256, 256), (16, 256)]
    env = env_file.AntMaze("umaze")
    runs = [generator.run_ant(env, act, np.random.default_rng(e), 0.2, [(3, 1)], False)[0] for e in range(4)]
    assert sum(obs[:, 0].max() > 6 for obs in runs) >= 2


# --- data ---


def test_waypoints_lead_round_the_walls(generator):
    cells = [(1, 1)]
    while cells[-1] != (3, 1):
        cells.append(generator.next_cell("umaze", cells[-1], (3, 1)))
    assert cells == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    assert generator.next_cell("umaze", (2, 1), (3, 1)) == (3, 1)  # an ant beside a wall may count as inside it
    assert generator.next_cell("medium", (5, 1), (6, 5)) == (6, 1)  # of two shortest ways D4RL's
    for maze, cell in (("medium", (6, 5)), ("large", (7, 9))):
        for start in env_file.free_cells(maze):
            c, steps = start, 0
            while c != cell and steps < 60:
                c, steps = generator.next_cell(maze, c, cell), steps + 1
            assert c == cell
    assert [generator.cell_of(p) for p in ((-0.5, -0.5), (3.9, 0), (4.1, 8.2))] == [(1, 1), (1, 1), (3, 2)]
    rng, goal = np.random.default_rng(0), np.array([1.2, 8.9])
    points = np.array([generator.waypoint("umaze", np.array([0.1, 0.2]), goal, rng) for _ in range(400)])
    assert ((points >= [4, 0]) & (points <= [5, 1])).all() and points.std(0) == pytest.approx(12**-0.5, rel=0.1)
    for x in (1.0, 5.0):  # in its cell and in the one before it
        assert (generator.waypoint("umaze", np.array([x, 8.5]), goal, rng) == goal).all()


@pytest.mark.parametrize("task", env_file.TASKS)
def test_starts_and_goals_of_the_data(generator, make, monkeypatch, task):
    monkeypatch.setattr(generator, "ROWS", 1)
    data, maze = make(task=task, steps=150, noise=0.0), task.split("-")[0]
    start, goal = data["observations"][:, :2], data["infos/goal"]
    marked = generator.GOALS[maze]
    assert env_file.goal_cell(maze) in {"umaze": marked, "medium": [(6, 6)], "large": marked}[maze]
    cells = {tuple(int(i) + 1 for i in p[::-1] // 4) for p in goal}
    assert cells == set(marked if task.endswith("diverse") else marked[:1])
    inside = goal - 4 * (goal // 4)
    assert inside.max() <= 1.5 and inside.mean() == pytest.approx(0.75, abs=0.1)
    if task == "umaze":
        assert np.abs(start).max() <= 0.1
    else:
        assert (start % 4 <= 1).all()
        begun = {tuple(int(i) + 1 for i in p[::-1] // 4) for p in start}
        free = set(env_file.free_cells(maze)) - set(marked)
        assert begun <= free and len(begun) > 0.9 * len(free)
    assert data["timeouts"].all()


def test_recipe(make, tmp_path):
    told = []

    def act(obs, waypoint, rng):
        told.append((obs, waypoint))
        return np.full(8, 2.0) if len(told) % 2 else rng.uniform(-1, 1, 8)

    data = make(act)
    n = 100
    shapes = {"observations": (n, 29), "actions": (n, 8), "rewards": (n,), "terminals": (n,), "timeouts": (n,)}
    assert {k: v.shape for k, v in data.items()} == shapes | {"infos/goal": (n, 2)}
    assert np.flatnonzero(data["timeouts"]).tolist() == [39, 79]
    seen = np.array([obs for obs, _ in told[:n]], "f4")
    assert (seen == data["observations"]).all()
    assert np.abs(data["observations"][[0, 40, 80], :2]).max() <= 0.1  # real resets
    assert (data["infos/goal"][:40] == data["infos/goal"][0]).all() and (
        data["infos/goal"][0] != data["infos/goal"][40]
    ).any()
    assert np.abs(data["actions"]).max() == 1 and (data["actions"][::2] > 0.99).all()  # 2 + noise, clipped
    moved = data["actions"][1::2].astype(float)
    assert 0.1 < np.abs(moved).mean() < 0.9
    env, errors = env_file.AntMaze("umaze"), []
    for t in range(5, 35):
        env.set_state(data["observations"][t, :15], data["observations"][t, 15:])
        errors.append(np.abs(env.step(data["actions"][t])[0] - data["observations"][t + 1]).max())
    assert np.median(errors) < 1e-3
    meta = json.loads((tmp_path / "data" / "antmaze_umaze.json").read_text())
    assert meta["sha256"] == utils.file_sha256(tmp_path / "data" / "antmaze_umaze.hdf5")
    assert (meta["runs"], meta["transitions"], meta["goals"], meta["success"]) == (2, n, "one", 0)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["antmaze_umaze.hdf5", "antmaze_umaze.json"]
    loaded = load_dataset(parse_task("antmaze-umaze"), str(tmp_path / "data" / "antmaze_umaze.hdf5"))
    assert len(loaded) == n - 3 and loaded.has_next.all() and loaded.trajectory.unique().tolist() == [0, 1, 2]


def test_rewards_and_terminals_are_those_of_the_next_position(generator, monkeypatch):
    monkeypatch.setattr(generator, "ROWS", 4)
    positions = np.array([[0, 8.0], [0, 8.5], [0, 9.0], [0, 9.51], [0, 9.4]])
    arrays = {"next_observations": np.pad(positions[1:], ((0, 0), (0, 27))).astype("f4")}
    arrays |= {"timeouts": np.array([False, False, False, True]), "infos/goal": np.array([[0.1, 9.4]] * 4)}
    arrays = generator.relabel(arrays, np.array([0, 9.0]))
    assert arrays["rewards"].tolist() == [1, 1, 0, 1] and arrays["terminals"].tolist() == [True, True, False, True]
    stats = generator.statistics(arrays)
    assert (stats["reward_rows"], stats["episodes"], stats["one_step_episodes"], stats["runs"]) == (3, 3, 2, 1)
    assert (stats["success"], stats["median_steps"]) == (1, 2)  # its own goal was another


def test_same_seed_same_data_also_after_a_kill(generator, make, tmp_path, monkeypatch):
    whole, other = make(steps=200), make(steps=200, seed=1, out=tmp_path / "other")
    assert (whole["observations"] != other["observations"]).any()
    count = 0

    def dies(obs, waypoint, rng):
        nonlocal count
        count += 1
        if count > 130:
            raise KeyboardInterrupt
        return rng.uniform(-1, 1, 8)

    with pytest.raises(KeyboardInterrupt):
        make(dies, steps=200, out=tmp_path / "killed")
    assert [p.name for p in (tmp_path / "killed" / "antmaze_umaze.parts").iterdir()] == ["000000.npz"]
    begun, plain = [], generator.run_ant
    monkeypatch.setattr(generator, "run_ant", lambda *args: begun.append(1) or plain(*args))
    again = make(steps=200, out=tmp_path / "killed")
    assert len(begun) == 3 and all((again[k] == whole[k]).all() for k in whole)
    with pytest.raises(KeyboardInterrupt):
        count = 0
        make(dies, steps=200, out=tmp_path / "third")
    begun.clear()
    third = make(steps=200, seed=1, out=tmp_path / "third")  # parts of another seed are not taken
    assert len(begun) == 5 and (third["actions"] == other["actions"]).all()


def test_data_of_other_settings_are_not_replaced_by_the_way(make, tmp_path, capsys):
    make()
    before = (tmp_path / "data" / "antmaze_umaze.hdf5").stat().st_mtime_ns
    make()
    assert "exists; --overwrite" in capsys.readouterr().err
    assert (tmp_path / "data" / "antmaze_umaze.hdf5").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"differs in steps \(100 there, here 90\), noise \(0.2 there, here 0.1\)"):
        make(steps=90, noise=0.1)
    assert len(make(steps=90, overwrite=True)["rewards"]) == 90


def test_minari_round_trip(make, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    make()
    before = (tmp_path / "data" / "antmaze_umaze.hdf5").stat().st_mtime_ns
    file = make(minari=True)
    assert (tmp_path / "data" / "antmaze_umaze.hdf5").stat().st_mtime_ns == before
    task = parse_task("rewind/antmaze/umaze-v0")
    assert (task.domain, task.kind, task.max_steps) == ("antmaze", "umaze", 700)
    data = load_dataset(task, "auto")
    assert (data.obs.numpy() == file["observations"]).all() and (data.rew.numpy() == file["rewards"]).all()
    assert data.has_next.all() and (data.terminated.numpy() == file["terminals"]).all()
    assert data.trajectory.bincount().tolist() == [40, 40, 20]
    assert make_env(task).spec.id == "Rewind/AntMaze-umaze-v2" and normalized_score(task, 1) == 100


def test_generated_data_are_found_and_made_on_first_use(generator, make, monkeypatch):
    calls = []

    def run(command):
        calls.append([str(word) for word in command[1:]])
        make(out=Path(command[-1]), task="medium-play")
        return subprocess.CompletedProcess(command, 0)

    task = parse_task("antmaze-medium-play")
    monkeypatch.setattr(utils, "ant_policy", lambda: None)  # as if it were there
    monkeypatch.setattr(utils.subprocess, "run", run)
    for _ in range(2):
        data = load_dataset(task, "generated")
        assert len(data) == 97 and data.source == "generated" and data.obs.shape[1] == 29
    assert len(calls) == 1 and calls[0][1:3] == ["--task", "medium-play"]


def test_without_the_policy_one_line_says_how_to_get_it(own_folders):
    how = f"put D4RL's ant_hierarch_pol.pkl, the ant that collects the data, in {utils.D4RL}"
    with pytest.raises(UserError) as e:
        load_dataset(parse_task("antmaze-umaze"), "generated")
    assert (
        how in str(e.value) and "\n" not in str(e.value) and "python datasets/antmaze.py --task umaze" in str(e.value)
    )
    script = subprocess.run([sys.executable, ROOT / "datasets" / "antmaze.py"], capture_output=True, text=True)
    assert script.returncode == 2 and script.stdout == ""
    assert (
        script.stderr.startswith("error: cannot download") and how in script.stderr and script.stderr.count("\n") == 1
    )


def test_another_policy_is_refused():
    utils.D4RL.mkdir(parents=True)
    (utils.D4RL / "ant_hierarch_pol.pkl").write_bytes(pickle.dumps(Evil(os.system, "true"), 2))
    with pytest.raises(UserError, match="is not D4RL's file"):
        utils.ant_policy()


def test_case_study(make, tmp_path):
    make(steps=200)
    flags = "--env antmaze-umaze --no-imagined-ends --total-updates 10 --batch-size 20 --hidden 16 16 --vae-hidden 16"
    flags += " --dynamics-hidden 16 --dynamics-max-epochs 1 --model-buffer-size 500 --rollout-batch-size 100"
    flags += " --rollout-policy-updates 5 --eval-episodes 0 --num-threads 1"
    flags = [*flags.split(), "--dataset", str(tmp_path / "data/antmaze_umaze.hdf5"), "--run-dir", str(tmp_path)]
    romi_bcq.main(tyro.cli(romi_bcq.Args, args=flags))
    folder = tmp_path / "antmaze-umaze-v2__romi_bcq__0__antmaze_umaze"
    case_study((folder,), out=tmp_path, episodes=2, chains=10)
    assert (tmp_path / "case_study_antmaze-umaze-v2__antmaze_umaze.png").stat().st_size > 10_000
    assert "| antmaze-umaze, antmaze_umaze | romi_bcq 0 | 10 | 0.0 ± 0.0 |" in report.case_study_table(tmp_path)


def test_data_of_another_mujoco_are_not_taken_for_the_same(make, tmp_path):
    make()
    file = tmp_path / "data" / "antmaze_umaze.json"
    file.write_text(file.read_text().replace(f'"mujoco": "{mujoco.__version__}"', '"mujoco": "2.2.0"'))
    with pytest.raises(UserError, match=r"differs in mujoco \(2\.2\.0 there"):
        make()


def test_a_wrong_estimate_of_the_goal_is_told(capsys):
    obs, ends = torch.zeros(100, 29), torch.arange(100) < 2
    rows = dict(obs=obs, act=torch.zeros(100, 8), rew=ends.float(), has_next=ends | True, trajectory=torch.arange(100))
    for apart, told in (
        (0.4, False),
        (4.0, True),
    ):  # positions of two rewarded rows; the goal is estimated between them
        after = obs.clone()
        after[:, 0], after[0, 0], after[1, 0] = 9.0, 0.0, apart
        data = utils.Dataset(next_obs=after, terminated=ends.float(), path="x.hdf5", **rows)
        romi_bcq.termination_fn(parse_task("antmaze-umaze"), data, romi_bcq.Args())
        assert ("x.hdf5: the termination rule of antmaze is wrong for 2.0%" in capsys.readouterr().err) == told
