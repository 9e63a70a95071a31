"""Maze2d: physics against closed form, recorded D4RL data and a contact reference; planner, generator, task layer."""

import json
import subprocess
import sys

import gymnasium
import h5py
import numpy as np
import pytest
from conftest import ROOT, load_script
from gymnasium.utils.env_checker import check_env
from PIL import Image

import utils
from envs import maze2d
from utils import UserError, evaluate, load_dataset, load_expert, make_env, normalized_score, parse_task

SHARED = ROOT.parent / "shared" / "data"
CONTACT = SHARED / "maze2d_contact_reference.npz"  # recorded in MuJoCo 2.2.0
if not CONTACT.exists():
    CONTACT = ROOT / "tests" / "mujoco_2_steps.npz"  # 80 of its 2 000 rows a maze, 60 of them at walls
MAZES = ("umaze", "medium", "large")
H, M = 0.01, 4.18879020478639  # time step in s, mass in kg
needs_recordings = pytest.mark.skipif(not SHARED.exists(), reason="recorded D4RL data is not shipped")


@pytest.fixture(scope="module")
def generator():
    return load_script("maze2d")


@pytest.fixture
def make(generator, tmp_path):
    """Runs the generator; returns a reader of its files."""

    def read(name):
        with h5py.File(tmp_path / f"maze2d_{name}.hdf5") as f:
            return {k: v[()] for k, v in f.items() if k != "infos"}

    def run(**flags):
        generator.main(generator.Args(out=tmp_path, **flags))
        return read

    return run


def step(env, obs, act):
    env.set_state(obs[:2], obs[2:])
    return env.step(act)


def free_motion(obs, act):
    """Positions and velocities after a step without walls, in closed form."""
    c = np.clip(obs[..., 2:].astype(float), -5, 5)
    v = c + H * (100 * np.clip(act, -1, 1).astype(float) - c) / (M + H)
    return np.concatenate([obs[..., :2] + H * v, v], -1)


def recorded(name):
    with np.load(SHARED / "maze2d_expert" / f"{name}.npz") as f:
        return {k: f[k] for k in f.files}


# --- physics ---


def test_free_motion_is_the_closed_form():
    env, rng = maze2d.Maze2d("umaze"), np.random.default_rng(0)
    for _ in range(300):
        obs = np.r_[rng.uniform(2.7, 2.9), rng.uniform(1.9, 2.1), rng.uniform(-5.5, 5.5, 2)]  # amid a corridor
        act = rng.uniform(-1.2, 1.2, 2).astype(np.float32)
        np.testing.assert_allclose(step(env, obs, act)[0], free_motion(obs, act), atol=1e-14, rtol=0)


def test_walls_act_from_two_millimetres_and_with_the_old_stiffness():
    """The larger margin counts, not the sum of two; the stiffness of contact is that of an inverse weight 2/(3m)."""
    env, touch = maze2d.Maze2d("umaze"), 1 - 0.6 - 0.1 + 0.1  # wall of row 0 ends at x = 0.3, the ball's radius is 0.1
    for gap, pushed in ((0.003, False), (0.0015, True)):
        obs = step(env, np.array([touch + gap, 1.8, 0, 0]), np.zeros(2))[0]
        assert (obs[2] > 0) == pushed
    assert env.model.body_invweight0[1, 0] == pytest.approx(2 / (3 * M)) and (env.model.geom_margin > 0).sum() == 1


@pytest.mark.parametrize("maze", MAZES)
def test_contact_is_mujoco_2s(maze):
    env = maze2d.Maze2d(maze)
    with np.load(CONTACT) as f:
        obs, act, after = (f[f"{maze}_{k}"] for k in ("observations", "actions", "next_observations"))
    assert max(np.abs(step(env, o, a)[0] - n).max() for o, a, n in zip(obs, act, after, strict=True)) < 1e-9


@needs_recordings
@pytest.mark.parametrize("maze", ["umaze", "medium"])
def test_recorded_d4rl_transitions(maze):
    data, env, T = recorded(maze), maze2d.Maze2d(maze), maze2d.MAX_STEPS[maze]
    states, actions = data["observations"], data["actions"]
    for i in np.random.default_rng(0).choice(np.flatnonzero(~data["timeouts"]), 1000, replace=False):
        np.testing.assert_allclose(step(env, states[i], actions[i])[0], states[i + 1], atol=1e-12)
    env.set_state(states[0, :2], states[0, 2:])  # a whole episode, open loop
    for t in range(T - 1):
        obs = env.step(actions[t])[0]
    np.testing.assert_allclose(obs, states[T - 1], atol=1e-9)
    for dense in (False, True):
        data = recorded(maze + "-dense" * dense)
        after = free_motion(data["observations"], data["actions"])[:, :2]
        np.testing.assert_allclose(maze2d.Maze2d(maze, dense).reward(after), data["rewards"], atol=1e-12)


# --- task ---


@pytest.mark.parametrize("maze", MAZES)
@pytest.mark.parametrize("dense", [False, True])
def test_environment(maze, dense):
    env = gymnasium.make(f"Rewind/Maze2d-{maze}{'-dense' * dense}-v1", render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=False)
    inner, cells = env.unwrapped, maze2d.free_cells(maze)
    assert len(cells) == {"umaze": 7, "medium": 26, "large": 46}[maze]
    assert tuple(inner.goal) == {"umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}[maze]
    starts = np.array([env.reset(seed=s)[0] for s in range(600)])
    nearest = starts[:, :2].round()
    assert {tuple(map(int, c)) for c in nearest} == set(cells)
    assert np.abs(starts[:, :2] - nearest).max() <= 0.1 and starts[:, 2:].std() == pytest.approx(0.1, rel=0.1)
    env.reset(seed=0)
    inner.set_state(inner.goal + [0.3, 0.4 - 1e-3], [0, 0])
    beside = inner.reward(inner.goal + [[0.0, 0.5], [0.0, 0.5001]])
    assert dense or beside.tolist() == [1, 0]
    obs, reward, terminated, _, _ = env.step(np.zeros(2, np.float32))
    assert reward == pytest.approx(np.exp(-np.linalg.norm(obs[:2] - inner.goal)) if dense else 1) and not terminated
    steps = 2
    while not env.step(np.zeros(2, np.float32))[3]:
        steps += 1
    assert steps == {"umaze": 300, "medium": 600, "large": 800}[maze]
    picture = env.render()
    assert picture.dtype == np.uint8 and len(np.unique(picture.reshape(-1, 3), axis=0)) >= 4  # wall, floor, goal, ball


# --- planner and generator ---


def test_planner_finds_the_shortest_path(generator):
    planner = generator.Planner("umaze", np.random.default_rng(0))
    planner.plan((3.0, 1.0), (1, 1))  # round the bend: the only way
    cells = [(round(x + 0.1), round(y + 0.1)) for x, y in planner.waypoints]
    assert cells == [(3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)] and planner.waypoints[-1] == (1, 1)


@needs_recordings
@pytest.mark.parametrize("maze, expected, tolerance", [("umaze", 226.9, 1), ("medium", 420.4, 2)])
def test_planner_earns_what_the_recorded_one_earned(generator, maze, expected, tolerance):
    starts = recorded(maze)["observations"].reshape(100, maze2d.MAX_STEPS[maze], 4)[:, 0]
    obs, _ = generator.expert(maze, 100, 0, 0.0, starts)
    assert maze2d.Maze2d(maze).reward(obs[:, 1:, :2]).sum(1).mean() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("maze, planner, se", [("umaze", 206.7, 5.1), ("medium", 435.4, 8.9), ("large", 550.0, 12.0)])
def test_returns_of_planner_and_random_policy(generator, maze, planner, se):
    """Means of 300 episodes with D4RL's script, a new planner in each, and their standard errors; here 30 episodes."""
    obs, _ = generator.expert(maze, 30, 5, 0.0)
    env, se = maze2d.Maze2d(maze), se * (1 + 300 / 30) ** 0.5
    assert env.reward(obs[:, 1:, :2]).sum(1).mean() == pytest.approx(planner, abs=3 * se)
    if maze == "umaze":
        rng, returns = np.random.default_rng(0), np.zeros(75)
        for e in range(75):
            env.reset(seed=e)
            returns[e] = sum(env.step(a)[1] for a in rng.uniform(-1, 1, (300, 2)).astype(np.float32))
        assert returns.mean() == pytest.approx(32.1, abs=3 * 3.5 * 5**0.5)


@pytest.mark.parametrize("repaired", [False, True])
def test_generated_data(make, repaired):
    read, suffix = make(steps=40_000, seed=4, repaired=repaired), "_repaired" * repaired
    sparse, dense = read(f"umaze{suffix}"), read(f"umaze_dense{suffix}")
    assert all((sparse[k] == dense[k]).all() for k in ("observations", "actions", "timeouts"))
    assert not sparse["terminals"].any()  # eight seeds had 480 to 539 segments and means of 0.062 to 0.094
    assert 460 <= sparse["timeouts"].sum() <= 560 and 0.06 <= sparse["rewards"].mean() <= 0.1
    obs = sparse["observations"].astype(float)
    distance = np.linalg.norm(obs[:, :2] - [1, 1], axis=1)
    clear = np.abs(distance - 0.5) > 1e-6  # float32 files
    assert ((distance <= 0.5) == sparse["rewards"])[clear].all()  # the row's own position is rewarded
    np.testing.assert_allclose(dense["rewards"], np.exp(-distance), atol=1e-6)
    # one endless motion: almost every row is followed by its own successor, also across the marks
    own = np.abs(free_motion(obs, sparse["actions"])[:-1, :2] - obs[1:, :2]).max(1) < 1e-5
    ends, stale = sparse["timeouts"][:-1], (obs[1:] == obs[:-1]).all(1)
    if repaired:
        assert own.mean() > 0.99 and not stale.any()
    else:  # a reached target: the next row repeats this one, and the one after it is two steps on
        assert (stale == ends).all() and not own[np.flatnonzero(ends[:-2]) + 1].any()
        own[np.flatnonzero(ends)] = own[np.flatnonzero(ends[:-1]) + 1] = True
        assert own.mean() > 0.99


def test_data_of_other_settings_are_not_replaced_by_the_way(make, tmp_path):
    first = make(steps=900)("umaze")
    files = {"maze2d_umaze.hdf5", "maze2d_umaze.json", "maze2d_umaze_dense.hdf5", "maze2d_umaze_dense.json"}
    again = make(steps=900)("umaze")  # the same
    assert {p.name for p in tmp_path.iterdir()} == files and all((first[k] == again[k]).all() for k in first)
    for word, flags in {"steps": {"steps": 800}, "seed": {"seed": 1}, "noise": {"noise": 0.1}}.items():
        with pytest.raises(UserError, match=rf"differs in {word} \("):
            make(**{"steps": 900} | flags)
    sheet = tmp_path / "maze2d_umaze.json"
    old = json.loads(sheet.read_text())
    sheet.write_text(json.dumps(old | {"mujoco": "3.0.0"}).replace(old["versions"]["mujoco"], "3.0.0"))
    with pytest.raises(UserError, match=r"differs in mujoco \(3.0.0 there"):
        make(steps=900)
    assert old.pop("steps") == 900
    sheet.write_text(json.dumps(old))  # as files were described before
    with pytest.raises(UserError, match=r"steps \(None there, here 300\)"):
        make(steps=300)
    make(steps=300, overwrite=True)
    assert json.loads(sheet.read_text())["steps"] == 300 and {p.name for p in tmp_path.iterdir()} == files
    for flags in ({"steps": 0}, {"noise": -0.1}):
        with pytest.raises(UserError, match="must be greater than"):
            make(**flags)


def test_expert_data(make):
    data = make(expert=True, steps=900, seed=3)("umaze_expert")
    assert np.flatnonzero(data["timeouts"]).tolist() == [299, 599, 899]
    reached = np.linalg.norm(data["next_observations"][:, :2] - [1, 1], axis=1) <= 0.5
    assert (reached == data["rewards"]).all() and data["rewards"].reshape(3, 300)[:, -50:].all()  # stands on the goal
    assert np.abs(data["observations"][299::300, :2] - [1, 1]).max() < 1e-3


@pytest.mark.parametrize("expert, asked, timing", [(0, None, 0), (0, "next", 1), (1, None, 1), (1, "same", 0)])
def test_reward_timing(make, tmp_path, expert, asked, timing):
    name = "umaze_dense" + "_expert" * expert
    data = make(steps=3000, expert=bool(expert), reward_timing=asked)(name)
    rewards, inside = data["rewards"], ~data["timeouts"][:-1]
    reward = np.exp(-np.linalg.norm(data["observations"][:, :2].astype(float) - [1, 1], axis=1))
    errors = [np.abs(reward[k : len(reward) - 1 + k] - rewards[:-1])[inside].max() for k in (0, 1)]
    assert errors[timing] < 1e-5 < errors[1 - timing]
    assert json.loads((tmp_path / f"maze2d_{name}.json").read_text())["reward_timing"] == ("same", "next")[timing]


@pytest.mark.parametrize("expert", [False, True])
def test_minari_round_trip(make, expert):
    for _ in range(2):  # the second time it is replaced
        read = make(steps=900, minari=True, expert=expert)
    for suffix in ("", "-dense"):
        task = parse_task(f"rewind/maze2d/umaze{suffix}{'-expert' * expert}-v0")
        assert (task.domain, task.kind, task.max_steps) == ("maze2d", f"umaze{suffix}", 300)
        data, file = load_dataset(task, "auto"), read(f"umaze{suffix.replace('-', '_')}{'_expert' * expert}")
        assert all(np.array_equal(x, file[k]) for x, k in ((data.obs, "observations"), (data.rew, "rewards")))
        np.testing.assert_allclose(data.act, file["actions"], atol=1e-6)
        assert data.has_next.all() and not data.terminated.any()  # also where a segment ends: the motion goes on
        inside = data.trajectory[1:] == data.trajectory[:-1]
        assert np.array_equal(data.next_obs[:-1][inside], data.obs[1:][inside])
        assert np.array_equal(np.flatnonzero(data.trajectory.diff()), np.flatnonzero(file["timeouts"][:-1]))
        env = make_env(task)
        assert env.spec.id == f"Rewind/Maze2d-umaze{suffix}-v1" and env.spec.max_episode_steps == 300
        assert normalized_score(task, 193.66285642381482 if suffix else 161.86) == pytest.approx(100)


# --- what scripts do with it ---


def test_replayed_chains_of_the_simulator_itself_have_no_error():
    env, rng = maze2d.Maze2d("umaze"), np.random.default_rng(0)
    obs, act, after = np.zeros((3, 4, 4)), rng.uniform(-1, 1, (3, 4, 2)), np.zeros((3, 4, 4))
    for c in range(3):
        state, _ = env.reset(seed=c)
        for t in range(4):
            obs[c, t] = state
            state = after[c, t] = env.step(act[c, t])[0]
    assert maze2d.replay_error("umaze", obs, act, after) == pytest.approx((0, 0), abs=1e-12)
    after[:, 3] += [0.3, 0.4, 0, 0]
    assert maze2d.replay_error("umaze", obs, act, after) == pytest.approx((0.5 / 4, 0.5))


def test_maze_data_is_made_on_first_use_and_evaluated_in_the_maze(generator, monkeypatch, tmp_path, capsys):
    made = []

    def run(command):
        assert command[:2] == [sys.executable, ROOT / "datasets" / "maze2d.py"]
        flags = dict(zip(command[2:6:2], command[3:7:2], strict=True))
        made.append(command[6:])
        expert = "--expert" in command
        generator.main(generator.Args(maze=flags["--maze"], out=flags["--out"], steps=600, expert=expert))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(utils.subprocess, "run", run)
    task = parse_task("maze2d-umaze-dense")
    data = load_dataset(task, "auto")
    assert data.source == "generated" and "generating maze2d_umaze_dense.hdf5" in capsys.readouterr().err
    assert len(load_expert(task, "auto", 2, data)) == 600 and made == [[], ["--expert"]]
    assert len(load_dataset(task, "generated")) == len(data) and len(made) == 2 and not data.terminated.any()
    env, episodes = make_env(task), []
    metrics = evaluate(task, [env], lambda obs: np.zeros((len(obs), 2)), 0, 0.99, tmp_path, episodes)
    assert metrics["eval/length"] == 300 and episodes[0].shape == (301, 4)
    assert metrics["eval/return"] == pytest.approx(env.unwrapped.reward(episodes[0][1:, :2].astype(float)).sum())
    assert Image.open(tmp_path / "execution.png").size == (400, 400)
