"""Maze2d: physics against closed form, recorded D4RL data and a contact reference; planner, generator and task layer."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import maze2d_env as env_file
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
CONTACT = SHARED / "maze2d_contact_reference.npz"  # recorded in MuJoCo 2.2.0
if not CONTACT.exists():
    CONTACT = Path(__file__).with_name("mujoco_2_steps.npz")  # 80 of its 2 000 rows a maze, 60 of them at walls
MAZES = ("umaze", "medium", "large")
needs_recordings = pytest.mark.skipif(not SHARED.exists(), reason="recorded D4RL data is not shipped")


@pytest.fixture(scope="module")
def generator():
    first = sys.path[0]
    spec = importlib.util.spec_from_file_location("maze2d_generator", ROOT / "datasets" / "maze2d.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["maze2d_generator"] = module
    spec.loader.exec_module(module)
    sys.path[0] = first
    return module


def step(env, obs, act):
    env.set_state(obs[:2], obs[2:])
    return env.step(act)


def recorded(name):
    with np.load(SHARED / "maze2d_expert" / f"{name}.npz") as f:
        return {k: f[k] for k in f.files}


# --- physics ---


def test_free_motion_is_the_closed_form():
    env, rng = env_file.Maze2d("umaze"), np.random.default_rng(0)
    h, m = 0.01, 4.18879020478639
    for _ in range(300):
        obs = np.r_[rng.uniform(2.7, 2.9), rng.uniform(1.9, 2.1), rng.uniform(-5.5, 5.5, 2)]  # amid the corridor at the bottom
        act = rng.uniform(-1.2, 1.2, 2).astype(np.float32)
        c = np.clip(obs[2:], -5, 5)
        v = c + h * (100 * np.clip(act, -1, 1).astype(float) - c) / (m + h)
        np.testing.assert_allclose(step(env, obs, act)[0], np.r_[obs[:2] + h * v, v], atol=1e-14, rtol=0)


def test_walls_act_from_two_millimetres_and_with_the_old_stiffness():
    """The larger margin counts, not the sum of two; the stiffness of contact is that of an inverse weight 2/(3m)."""
    env, touch = env_file.Maze2d("umaze"), 1 - 0.6 - 0.1 + 0.1  # wall of row 0 ends at x = 0.3, the ball's radius is 0.1
    for gap, pushed in ((0.003, False), (0.0015, True)):
        obs = step(env, np.array([touch + gap, 1.8, 0, 0]), np.zeros(2))[0]
        assert (obs[2] > 0) == pushed
    assert env.model.body_invweight0[1, 0] == pytest.approx(2 / (3 * 4.18879020478639))
    assert (env.model.geom_margin > 0).sum() == 1


@pytest.mark.parametrize("maze", MAZES)
def test_contact_is_mujoco_2s(maze):
    env = env_file.Maze2d(maze)
    with np.load(CONTACT) as f:
        obs, act, after = (f[f"{maze}_{k}"] for k in ("observations", "actions", "next_observations"))
    error = [np.abs(step(env, o, a)[0] - n).max() for o, a, n in zip(obs, act, after, strict=True)]
    assert max(error) < 1e-9


@needs_recordings
@pytest.mark.parametrize("maze", ["umaze", "medium"])
def test_recorded_d4rl_transitions(maze):
    data, env, T = recorded(maze), env_file.Maze2d(maze), env_file.MAX_STEPS[maze]
    rows = np.random.default_rng(0).choice(np.flatnonzero(~data["timeouts"]), 1000, replace=False)
    for i in rows:
        np.testing.assert_allclose(step(env, data["observations"][i], data["actions"][i])[0], data["observations"][i + 1], atol=1e-12)
    env.set_state(data["observations"][0, :2], data["observations"][0, 2:])  # a whole episode, open loop
    for t in range(T - 1):
        obs = env.step(data["actions"][t])[0]
    np.testing.assert_allclose(obs, data["observations"][T - 1], atol=1e-9)


@needs_recordings
@pytest.mark.parametrize("name", ["umaze", "umaze-dense", "medium", "medium-dense"])
def test_recorded_rewards_and_goal(name):
    data, maze = recorded(name), name.split("-")[0]
    env = env_file.Maze2d(maze, dense="dense" in name)
    h, m, c = 0.01, 4.18879020478639, np.clip(data["observations"][:, 2:], -5, 5)
    after = data["observations"][:, :2] + h * (c + h * (100 * data["actions"] - c) / (m + h))
    np.testing.assert_allclose(env.reward(after), data["rewards"], atol=1e-12)


# --- task ---


@pytest.mark.parametrize("maze", MAZES)
@pytest.mark.parametrize("dense", [False, True])
def test_environment(maze, dense):
    env = gymnasium.make(f"Rewind/Maze2d-{maze}{'-dense' * dense}-v1", render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=False)
    inner, cells = env.unwrapped, env_file.free_cells(maze)
    assert len(cells) == {"umaze": 7, "medium": 26, "large": 46}[maze]
    assert tuple(inner.goal) == {"umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}[maze]
    starts = np.array([env.reset(seed=s)[0] for s in range(600)])
    nearest = starts[:, :2].round()
    assert {tuple(map(int, c)) for c in nearest} == set(cells)
    assert np.abs(starts[:, :2] - nearest).max() <= 0.1 and starts[:, 2:].std() == pytest.approx(0.1, rel=0.1)
    env.reset(seed=0)
    inner.set_state(inner.goal + [0.3, 0.4 - 1e-3], [0, 0])
    obs, reward, terminated, _, _ = env.step(np.zeros(2, np.float32))
    assert not terminated and reward == pytest.approx(np.exp(-np.linalg.norm(obs[:2] - inner.goal)) if dense else 1)
    steps = 1
    while not env.step(np.zeros(2, np.float32))[3]:
        steps += 1
    assert steps + 1 == {"umaze": 300, "medium": 600, "large": 800}[maze]
    picture = env.render()
    assert picture.dtype == np.uint8 and len(np.unique(picture.reshape(-1, 3), axis=0)) >= 4  # wall, floor, goal, ball


def test_position_just_outside_the_goal_earns_nothing():
    env = env_file.Maze2d("umaze")
    assert env.reward(np.array([[1.0, 1.5], [1.0, 1.5001]])).tolist() == [1, 0]


# --- planner and generator ---


def test_planner_finds_the_shortest_path(generator):
    planner = generator.Planner("umaze", np.random.default_rng(0))
    planner.plan((3.0, 1.0), (1, 1))  # round the bend: the only way
    cells = [(round(x + 0.1), round(y + 0.1)) for x, y in planner.waypoints]
    assert cells == [(3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)] and planner.waypoints[-1] == (1, 1)


@needs_recordings
@pytest.mark.parametrize("maze, expected, tolerance", [("umaze", 226.9, 1), ("medium", 420.4, 2)])
def test_planner_earns_what_the_recorded_one_earned(generator, maze, expected, tolerance):
    T = env_file.MAX_STEPS[maze]
    starts = recorded(maze)["observations"].reshape(100, T, 4)[:, 0]
    obs, _ = generator.expert(maze, 100, 0, 0.0, starts)
    returns = env_file.Maze2d(maze).reward(obs[:, 1:, :2]).sum(1)
    assert returns.mean() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("maze, planner, se", [("umaze", 206.7, 5.1), ("medium", 435.4, 8.9), ("large", 550.0, 12.0)])
def test_returns_of_planner_and_random_policy(generator, maze, planner, se):
    """Means of 300 episodes with D4RL's script, a new planner in each, and their standard errors; here 40 episodes."""
    obs, _ = generator.expert(maze, 40, 5, 0.0)
    env, se = env_file.Maze2d(maze), se * (1 + 300 / 40) ** 0.5
    assert env.reward(obs[:, 1:, :2]).sum(1).mean() == pytest.approx(planner, abs=3 * se)
    if maze == "umaze":
        rng, returns = np.random.default_rng(0), np.zeros(100)
        for e in range(100):
            env.reset(seed=e)
            returns[e] = sum(env.step(a)[1] for a in rng.uniform(-1, 1, (300, 2)).astype(np.float32))
        assert returns.mean() == pytest.approx(32.1, abs=3 * 3.5 * 2)


def make(out, *flags):
    command = [sys.executable, str(ROOT / "datasets" / "maze2d.py"), "--out", str(out), *flags]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("repaired", [False, True])
def test_generated_data(tmp_path, repaired):
    make(tmp_path, "--steps", "100000", "--seed", "4", *["--repaired"] * repaired)
    suffix = "_repaired" * repaired  # eight seeds had 1 197 to 1 316 segments and means of 0.073 to 0.086
    with h5py.File(tmp_path / f"maze2d_umaze{suffix}.hdf5") as f, h5py.File(tmp_path / f"maze2d_umaze_dense{suffix}.hdf5") as g:
        sparse, dense = ({k: v[()] for k, v in x.items() if k != "infos"} for x in (f, g))
    assert all((sparse[k] == dense[k]).all() for k in ("observations", "actions", "timeouts"))
    assert 1150 <= sparse["timeouts"].sum() <= 1300 and not sparse["terminals"].any()
    assert 0.07 <= sparse["rewards"].mean() <= 0.085
    obs, act = sparse["observations"].astype(float), sparse["actions"].astype(float)
    distance = np.linalg.norm(obs[:, :2] - [1, 1], axis=1)
    clear = np.abs(distance - 0.5) > 1e-6  # float32 files
    assert ((distance <= 0.5) == sparse["rewards"])[clear].all()  # the row's own position is rewarded
    np.testing.assert_allclose(dense["rewards"], np.exp(-distance), atol=1e-6)
    # one endless motion: almost every row is followed by its own successor, also across the marks
    h, m, c = 0.01, 4.18879020478639, np.clip(obs[:-1, 2:], -5, 5)
    after = obs[:-1, :2] + h * (c + h * (100 * act[:-1] - c) / (m + h))
    own = np.abs(after - obs[1:, :2]).max(1) < 1e-5
    ends, stale = sparse["timeouts"][:-1], (obs[1:] == obs[:-1]).all(1)
    if repaired:
        assert own.mean() > 0.99 and not stale.any()
    else:  # a reached target: the next row repeats this one, and the one after it is two steps on
        assert (stale == ends).all()
        assert not own[np.flatnonzero(ends[:-2]) + 1].any()
        rest = own.copy()
        rest[np.flatnonzero(ends)] = True
        rest[np.flatnonzero(ends[:-1]) + 1] = True
        assert rest.mean() > 0.99


def test_data_of_other_settings_are_not_replaced_by_the_way(generator, tmp_path):
    make = lambda **flags: generator.main(generator.Args(out=tmp_path, **flags))  # noqa: E731
    make(steps=900)
    before = {p.name for p in tmp_path.iterdir()}
    make(steps=900)  # the same again
    assert {p.name for p in tmp_path.iterdir()} == before
    for flags, word in (({"steps": 800}, "steps"), ({"steps": 900, "seed": 1}, "seed"), ({"steps": 900, "noise": 0.1}, "noise")):
        with pytest.raises(UserError, match=rf"other {word} \("):
            make(**flags)
    old = json.loads((tmp_path / "maze2d_umaze.json").read_text())
    assert old.pop("steps") == 900
    (tmp_path / "maze2d_umaze.json").write_text(json.dumps(old))  # as files were described before
    with pytest.raises(UserError, match=r"steps \(\d+ rows there, here 300\)"):
        make(steps=300)
    make(steps=300, overwrite=True)
    assert json.loads((tmp_path / "maze2d_umaze.json").read_text())["steps"] == 300


def test_expert_data_and_reward_timing(tmp_path):
    make(tmp_path, "--expert", "--steps", "900", "--seed", "3")
    with h5py.File(tmp_path / "maze2d_umaze_expert.hdf5") as f:
        data = {k: v[()] for k, v in f.items() if k != "infos"}
    assert np.flatnonzero(data["timeouts"]).tolist() == [299, 599, 899]
    reached = np.linalg.norm(data["next_observations"][:, :2] - [1, 1], axis=1) <= 0.5
    assert (reached == data["rewards"]).all() and data["rewards"].reshape(3, 300)[:, -50:].all()  # stands on the goal
    assert np.abs(data["observations"][299::300, :2] - [1, 1]).max() < 1e-3


@pytest.mark.parametrize("flags, timing", [((), "same"), (("--reward-timing", "next"), "next"), (("--expert",), "next"),
                                           (("--expert", "--reward-timing", "same"), "same")])  # fmt: skip
def test_reward_timing(tmp_path, flags, timing):
    make(tmp_path, "--steps", "3000", *flags)
    name = f"maze2d_umaze_dense{'_expert' * ('--expert' in flags)}"
    with h5py.File(tmp_path / f"{name}.hdf5") as f:
        obs, rewards, inside = f["observations"][()], f["rewards"][()], ~f["timeouts"][:-1]
    reward = np.exp(-np.linalg.norm(obs[:, :2].astype(float) - [1, 1], axis=1))
    same, after = np.abs(reward - rewards)[:-1][inside].max(), np.abs(reward[1:] - rewards[:-1])[inside].max()
    assert (same < 1e-5 < after) if timing == "same" else (after < 1e-5 < same)
    assert json.loads((tmp_path / f"{name}.json").read_text())["reward_timing"] == timing


@pytest.mark.parametrize("expert", [False, True])
def test_minari_round_trip(tmp_path, monkeypatch, expert):
    from utils import load_dataset, make_env, normalized_score, parse_task

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    for _ in range(2):  # the second time it is replaced
        make(tmp_path, "--steps", "900", "--minari", *["--expert"] * expert)
    for suffix in ("", "-dense"):
        task = parse_task(f"rewind/maze2d/umaze{suffix}{'-expert' * expert}-v0")
        assert (task.domain, task.kind, task.max_steps) == ("maze2d", f"umaze{suffix}", 300)
        data = load_dataset(task, "auto")
        with h5py.File(tmp_path / f"maze2d_umaze{suffix.replace('-', '_')}{'_expert' * expert}.hdf5") as f:
            file = {k: f[k][()] for k in ("observations", "actions", "rewards", "timeouts")}
        assert all(np.array_equal(x, file[k]) for x, k in ((data.obs, "observations"), (data.rew, "rewards")))
        np.testing.assert_allclose(data.act, file["actions"], atol=1e-6)
        assert data.has_next.all() and not data.terminated.any()  # also at the end of a segment, where the motion goes on
        inside = data.trajectory[1:] == data.trajectory[:-1]
        assert np.array_equal(data.next_obs[:-1][inside], data.obs[1:][inside])
        assert np.array_equal(np.flatnonzero(data.trajectory.diff()), np.flatnonzero(file["timeouts"][:-1]))
        env = make_env(task)
        assert env.spec.id == f"Rewind/Maze2d-umaze{suffix}-v1" and env.spec.max_episode_steps == 300
        assert normalized_score(task, 161.86 if not suffix else 193.66285642381482) == pytest.approx(100)


def test_same_seed_same_data(generator):
    a, b, c = (generator.trajectory("umaze", 500, seed, 0.5) for seed in (1, 1, 2))
    assert all((x == y).all() for x, y in zip(a, b, strict=True)) and (a[0] != c[0]).any()


# --- what scripts do with it ---


def test_replayed_chains_of_the_simulator_itself_have_no_error():
    env, rng = env_file.Maze2d("umaze"), np.random.default_rng(0)
    obs, act, after = np.zeros((3, 4, 4)), rng.uniform(-1, 1, (3, 4, 2)), np.zeros((3, 4, 4))
    for c in range(3):
        state, _ = env.reset(seed=c)
        for t in range(4):
            obs[c, t] = state
            state = after[c, t] = env.step(act[c, t])[0]
    assert env_file.replay_error("umaze", obs, act, after) == pytest.approx((0, 0), abs=1e-12)
    after[:, 3] += [0.3, 0.4, 0, 0]
    assert env_file.replay_error("umaze", obs, act, after) == pytest.approx((0.5 / 4, 0.5))


def test_maze_data_is_made_on_first_use_and_evaluated_in_the_maze(monkeypatch, tmp_path, capfd):
    import utils

    plain = subprocess.run
    monkeypatch.setattr(utils.subprocess, "run", lambda command: plain([*command, "--steps", "5000"]))
    task = utils.parse_task("maze2d-umaze-dense")
    data = utils.load_dataset(task, "auto")
    assert data.source == "generated" and "making maze2d_umaze_dense.hdf5" in capfd.readouterr().err
    monkeypatch.setattr(utils.subprocess, "run", None)  # not made a second time
    assert len(utils.load_dataset(task, "generated")) == len(data) and not data.terminated.any()
    env, seen = utils.make_env(task), []
    returns, lengths = utils.evaluate([env], lambda obs: np.zeros((len(obs), 2)), seed=0, trajectories=seen)
    assert lengths == [300] and seen[0].shape == (301, 4)
    assert returns[0] == pytest.approx(env.unwrapped.reward(seen[0][1:, :2]).sum())
    env_file.draw_trajectories("umaze", seen, tmp_path / "x.png.part")
    assert (tmp_path / "x.png.part").stat().st_size > 500
