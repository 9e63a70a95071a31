"""datasets/mujoco.py: what it records and writes, that a killed run is resumed exactly; and the bundled file."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT

import utils
from utils import UserError, load_dataset, parse_task

META = {"kind": "random", "seed": 0, "recipe": "by hand"}


def by_hand():
    """Three episodes of 2, 1 and 3 rows: terminal, time limit, terminal. Observation t of an episode is 10 * episode + t."""
    obs = np.array([0, 1, 10, 20, 21, 22], np.float32)[:, None] + np.zeros(11, np.float32)
    return {
        "observations": obs,
        "actions": np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3),
        "rewards": np.array([1, 2, 4, 8, 16, 32], np.float32),
        "next_observations": obs + 1,
        "terminals": np.array([0, 1, 0, 0, 0, 1], bool),
        "timeouts": np.array([0, 0, 1, 0, 0, 0], bool),
        "infos/qpos": np.zeros((6, 6), np.float32),
        "infos/qvel": np.ones((6, 6), np.float32),
    }


def random_policy(seed):
    rng = np.random.default_rng(seed)
    return lambda obs: rng.uniform(-1, 1, (len(obs), 3)).astype(np.float32)


def arrays(path):
    with h5py.File(path) as f:
        return {k: f[k][:] for k in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts", "infos/qpos")}


def assert_same_arrays(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert np.array_equal(a[k], b[k]), k


# --- recording and writing ---


def test_returns_and_lengths_by_hand(collector):
    returns, lengths = collector.episode_returns(by_hand())
    assert returns.tolist() == [3, 4, 56] and lengths.tolist() == [2, 1, 3]


def test_recorder_keeps_the_order_of_whole_episodes(collector):
    whole, rows = collector.Recorder(), by_hand()
    for begin, end in ((0, 2), (2, 3), (3, 6)):
        episode = collector.Recorder()
        for i in range(begin, end):
            episode.add(*(rows[k][i] for k in collector.Recorder.KEYS))
        whole.extend(episode)
    assert len(whole) == 6
    assert_same_arrays(whole.arrays(), rows)
    assert {v.dtype for k, v in whole.arrays().items() if k in ("terminals", "timeouts")} == {np.dtype(bool)}


def test_collected_rows_are_whole_episodes_of_the_environment(collector):
    data = collector.collect("hopper", random_policy(0), 150, seed=5, desc="test", num_envs=3)
    ends = data["terminals"] | data["timeouts"]
    assert len(ends) >= 150 and ends[-1] and not (data["terminals"] & data["timeouts"]).any()
    inside = np.flatnonzero(~ends)
    assert np.array_equal(data["next_observations"][inside], data["observations"][inside + 1])
    starts = np.flatnonzero(np.r_[True, ends[:-1]])
    assert np.abs(data["infos/qpos"][starts] - [0, 1.25, 0, 0, 0, 0]).max() < 0.0051  # starts are resets, all different
    assert len(np.unique(data["observations"][starts], axis=0)) == len(starts)
    assert_same_arrays(data, collector.collect("hopper", random_policy(0), 150, seed=5, desc="test", num_envs=3))

    env = utils.make_env("hopper")  # qpos and qvel are the state before the action
    env.reset(seed=0)
    for i in (0, len(ends) // 2):
        env.unwrapped.set_state(data["infos/qpos"][i].astype(float), data["infos/qvel"][i].astype(float))
        obs, rew, terminated, *_ = env.unwrapped.step(data["actions"][i])
        assert np.allclose(obs, data["next_observations"][i], atol=1e-4) and np.isclose(rew, data["rewards"][i], atol=1e-3)
        assert terminated == data["terminals"][i]


class Ends(gymnasium.Env):
    """Episodes of one step that end by a terminal, by the time limit, by both at once, and so on."""

    data, count = SimpleNamespace(qpos=np.zeros(1), qvel=np.zeros(1)), 0

    def reset(self, seed=None, options=None):
        return np.zeros(1), {}

    def step(self, action):
        self.count += 1
        return np.ones(1), 1.0, self.count % 3 != 2, self.count % 3 != 1, {}


def test_row_that_ends_both_ways_is_recorded_as_terminal(collector, monkeypatch):
    monkeypatch.setattr(collector, "make_env", lambda _: Ends())
    data = collector.collect("hopper", lambda obs: np.zeros((1, 1)), 6, seed=0, desc="test", num_envs=1)
    assert data["terminals"].tolist() == [True, False, True] * 2 and data["timeouts"].tolist() == [False, True, False] * 2


def test_written_file_is_read_back_and_its_sheet_is_right(collector, tmp_path):
    data = by_hand()
    path = tmp_path / "new" / "hopper_random.hdf5"
    collector.write(path, data, dict(META), collector.Args(minari=False, seed=3))
    assert sorted(p.name for p in path.parent.iterdir()) == ["hopper_random.hdf5", "hopper_random.json"]
    assert_same_arrays(arrays(path), {k: data[k] for k in arrays(path)})

    loaded = load_dataset(parse_task("hopper-random"), str(path))
    for name, key in (("obs", "observations"), ("act", "actions"), ("rew", "rewards"), ("next_obs", "next_observations")):
        assert np.array_equal(getattr(loaded, name), data[key])
    assert loaded.terminated.tolist() == [0, 1, 0, 0, 0, 1] and loaded.has_next.all() and loaded.trajectory.tolist() == [0, 0, 1, 2, 2, 2]

    sheet = json.loads(path.with_suffix(".json").read_text())
    facts = {"transitions": 6, "episodes": 3, "terminals": 2, "timeouts": 1, "return_mean": 21, "return_min": 3, "return_max": 56}
    assert facts.items() <= sheet.items() and META.items() <= sheet.items()
    assert sheet["return_std"] == pytest.approx(np.std([3, 4, 56])) and sheet["length_mean"] == 2
    assert sheet["sha256"] == loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and sheet["bytes"] == path.stat().st_size
    assert sheet["environment"] == "Hopper-v4" and "halved" in sheet["margins"] and sheet["args"]["seed"] == 3
    assert sheet["versions"]["gymnasium"] == gymnasium.__version__
    with h5py.File(path) as f:
        assert f.attrs["recipe"] == "by hand" and f.attrs["environment"] == "Hopper-v4"


def test_infos_can_be_left_out(collector, tmp_path):
    collector.write(tmp_path / "hopper_random.hdf5", by_hand(), dict(META), collector.Args(minari=False, infos=False))
    with h5py.File(tmp_path / "hopper_random.hdf5") as f:
        assert "infos" not in f and "observations" in f


def test_sheet_is_written_last(collector, tmp_path, monkeypatch):
    """Its presence means "done": a run that was cut while it wrote Minari data has to do it again."""

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(collector, "write_minari", cut)
        collector.write(tmp_path / "hopper_random.hdf5", by_hand(), dict(META), collector.Args())
    assert not (tmp_path / "hopper_random.json").exists()
    collector.write(tmp_path / "hopper_random.hdf5", by_hand(), dict(META), collector.Args())
    assert (tmp_path / "hopper_random.json").exists()
    assert len(load_dataset(parse_task("rewind/hopper/random-v0"), "auto")) == 6


def test_minari_data_left_by_a_killed_run_is_replaced(collector, own_folders, monkeypatch):
    import minari.utils

    def cut(*_):
        raise KeyboardInterrupt

    meta = META | {"margins": "", "versions": {}}
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(minari.utils, "_generate_dataset_metadata", cut)
        collector.write_minari("rewind/hopper/random-v0", by_hand(), meta, collector.Args())
    assert (own_folders / "minari" / "rewind" / "hopper" / "random-v0").exists()
    for _ in range(2):
        collector.write_minari("rewind/hopper/random-v0", by_hand(), meta, collector.Args())
        assert len(load_dataset(parse_task("rewind/hopper/random-v0"), "auto")) == 6


# --- SAC ---


def test_log_density_is_that_of_a_squashed_gaussian(collector):
    torch.manual_seed(0)
    policy = collector.Policy(4, 2, 16).double()
    obs = torch.randn(7, 4, dtype=torch.float64)
    act, log_prob, mean_act = policy(obs)
    mean, log_std = policy.head(policy.body(obs)).chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    squashed = torch.distributions.TransformedDistribution(normal, [torch.distributions.TanhTransform()])
    assert act.shape == (7, 2) and log_prob.shape == (7,)
    torch.testing.assert_close(log_prob, squashed.log_prob(act).sum(-1))
    torch.testing.assert_close(mean_act, mean.tanh())


def test_sac_target_bootstraps_through_time_limits_only(collector, monkeypatch):
    """The Q loss of a row is (Q - r - gamma (1 - terminated) V(s'))^2, V with the smaller target Q and the entropy bonus."""
    torch.manual_seed(0)
    agent = collector.SAC(4, 2, collector.Args(hidden=8, lr=0.0))
    obs, next_obs, act, rew = torch.randn(2, 4), torch.randn(2, 4), torch.rand(2, 2), torch.tensor([1.0, 2.0])
    terminated = torch.tensor([1.0, 0.0])
    losses = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.detach()))
    torch.manual_seed(1)
    agent.update(obs, act, rew, next_obs, terminated)
    torch.manual_seed(1)
    with torch.no_grad():
        next_act, next_log_prob, _ = agent.policy(next_obs)
        next_v = agent.target_qf(next_obs, next_act).min(0).values - next_log_prob  # the temperature begins at 1
        target = torch.stack([rew[0], rew[1] + 0.99 * next_v[1]])
        expected = sum(((q - target) ** 2).mean() for q in agent.qf(obs, act))
    torch.testing.assert_close(losses[0], expected)


def test_sac_update_moves_each_network_and_the_target_slowly(collector):
    torch.manual_seed(0)
    agent = collector.SAC(4, 2, collector.Args(hidden=8, tau=0.1))
    before = {k: [p.clone() for p in getattr(agent, k).parameters()] for k in ("policy", "qf", "target_qf")}
    agent.update(torch.randn(5, 4), torch.rand(5, 2), torch.ones(5), torch.randn(5, 4), torch.zeros(5))
    for k in ("policy", "qf"):
        assert all((p != q).any() for p, q in zip(getattr(agent, k).parameters(), before[k], strict=True))
    for target, old, q in zip(agent.target_qf.parameters(), before["target_qf"], agent.qf.parameters(), strict=True):
        torch.testing.assert_close(target.data, old + 0.1 * (q.data - old))
    assert agent.log_alpha != 0


# --- a run, its kill, its resumption ---


class Killed(Exception):
    pass


@pytest.mark.parametrize("checkpoint_every", [520, 700], ids=["in the random steps", "while learning"])
@pytest.mark.parametrize("eval_every", [250, 1000])
def test_run_cut_after_its_first_checkpoint_ends_alike(collector, tmp_path, monkeypatch, checkpoint_every, eval_every):
    """Checkpoint 520 lies between the evaluation that is due at 500 and the end of the random steps, until which it has to wait."""
    sizes = {"total_steps": 1100, "random_steps": 600, "updates_per_step": 0.1, "batch_size": 8, "hidden": 8, "eval_episodes": 1}
    args = collector.Args(**sizes, eval_every=eval_every, checkpoint_every=checkpoint_every, medium_band=(-9, 9), min_replay=900)

    def train(folder):
        agent, run, replay, _, medium = collector.train(args, folder)
        return agent.state_dict(), asdict(run), [x[: run.step] for x in replay], medium

    def replace_then_die(a, b):
        os.rename(a, b)
        raise Killed

    torch.manual_seed(0)
    agent, facts, replay, medium = train(tmp_path / "whole")
    torch.manual_seed(0)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(collector, "os", SimpleNamespace(replace=replace_then_die))
        train(tmp_path / "cut")
    torch.manual_seed(1)  # the random numbers come from the checkpoint
    agent_2, facts_2, replay_2, medium_2 = train(tmp_path / "cut")

    assert facts == facts_2 and facts["medium_at"] >= 900 and facts["updates"] > 0
    assert all(np.array_equal(a, b) for a, b in zip(replay, replay_2, strict=True))
    assert all(torch.equal(medium[k], medium_2[k]) for k in medium) and torch.equal(agent["log_alpha"], agent_2["log_alpha"])
    assert all(torch.equal(agent["target_qf"][k], agent_2["target_qf"][k]) for k in agent["target_qf"])


def test_policies_of_the_checkpoints_are_kept(collector, tmp_path, monkeypatch):
    sizes = {"total_steps": 900, "random_steps": 600, "updates_per_step": 0.1, "batch_size": 8, "hidden": 8, "eval_episodes": 1}
    args = collector.Args(**sizes, kinds=("expert",), eval_every=10_000, checkpoint_every=300, keep_policies=True)
    made = []

    def replace_then_die(a, b):
        os.rename(a, b)
        made.append(Path(b).name)
        if made.count("checkpoint.pt") == 2:
            raise Killed

    torch.manual_seed(0)
    agent = collector.train(args, tmp_path / "whole")[0].policy.state_dict()
    torch.manual_seed(0)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(collector, "os", SimpleNamespace(replace=replace_then_die))
        collector.train(args, tmp_path / "cut")
    assert len(made) == 4 and made[0].startswith("policy_3") and made[2].startswith("policy_6")  # before the checkpoint, not after
    torch.manual_seed(1)
    collector.train(args, tmp_path / "cut")

    names = sorted(path.name for path in (tmp_path / "whole").glob("policy_*.pt"))
    assert names == sorted(path.name for path in (tmp_path / "cut").glob("policy_*.pt")) and len(names) >= 3
    kept = [[torch.load(tmp_path / run / name, weights_only=True)["agent"]["policy"] for name in names] for run in ("whole", "cut")]
    for first, second in zip(*kept, strict=True):
        assert first.keys() == second.keys() == agent.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(kept[0][0]["head.weight"], kept[0][-1]["head.weight"])
    assert all(torch.equal(kept[0][-1][k], agent[k]) for k in agent)


def test_keeping_policies_is_no_other_run(collector, tmp_path):
    run(collector, kinds=("expert",), out=tmp_path)
    (folder,) = tmp_path.glob("sac-*")
    (tmp_path / "hopper_expert.hdf5").unlink()
    run(collector, kinds=("expert",), out=tmp_path, keep_policies=True)
    assert [*tmp_path.glob("sac-*")] == [folder] and len([*folder.glob("policy_*.pt")]) == 1
    run(collector, kinds=("expert",), out=tmp_path)  # nor another data set


def run(collector, **flags):
    """The command without a process of its own: tiny, medium at once."""
    tiny = {"steps": 50, "total_steps": 700, "random_steps": 600, "updates_per_step": 0.1, "batch_size": 8, "hidden": 8, "minari": False}
    threads = torch.get_num_threads()
    try:
        collector.main(collector.Args(**tiny | {"eval_every": 500, "eval_episodes": 1, "medium_band": (-9, 9)} | flags))
    finally:
        torch.set_num_threads(threads)


def test_killed_command_gives_the_same_data(collector, tmp_path, capsys):
    flags = "--kinds random medium-replay --steps 200 --total-steps 6000 --random-steps 500 --eval-every 2500 --eval-episodes 2"
    flags += " --updates-per-step 0.5 --batch-size 16 --hidden 16 --checkpoint-every 500 --medium-band -9 9"
    start = [sys.executable, str(ROOT / "datasets" / "mujoco.py"), "--env", "hopper", "--no-minari", *flags.split(), "--out"]
    whole, cut = [*start, str(tmp_path / "whole")], [*start, str(tmp_path / "cut")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    uninterrupted = subprocess.Popen(whole, **pipes)

    killed = subprocess.Popen(cut, **pipes)
    while killed.poll() is None and not list((tmp_path / "cut").glob("sac-*/checkpoint.pt")):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not list((tmp_path / "cut").glob("*.hdf5"))

    resumed = subprocess.run(cut, capture_output=True, text=True, cwd=tmp_path)
    out, err = uninterrupted.communicate()
    assert resumed.returncode == 0 == uninterrupted.returncode, resumed.stderr + err
    assert "resumed at step" in resumed.stdout and "resumed" not in out
    for kind in ("random", "medium_replay"):
        assert_same_arrays(*(arrays(tmp_path / folder / f"hopper_{kind}.hdf5") for folder in ("whole", "cut")))
        sheets = [json.loads((tmp_path / folder / f"hopper_{kind}.json").read_text()) for folder in ("whole", "cut")]
        assert sheets[0]["evaluations"] == sheets[1]["evaluations"]
        data = load_dataset(parse_task(f"hopper-{kind.replace('_', '-')}"), str(tmp_path / "cut" / f"hopper_{kind}.hdf5"))
        assert len(data) == sheets[1]["transitions"] and data.has_next.all()
        assert sheets[1]["episodes"] == data.trajectory[-1] + 1  # only whole episodes
    assert len(data) == sheets[1]["medium_at"] >= 2500 and sheets[1]["evaluations"][-1][1] == sheets[1]["medium_eval_return"]

    before = (tmp_path / "cut" / "hopper_random.hdf5").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"made with --updates-per-step 0\.5, --random-steps 500, "):  # a trial is not the real data
        run(collector, kinds=("medium-replay",), out=tmp_path / "cut")
    with pytest.raises(UserError, match="made with --steps 200;"):
        run(collector, kinds=("random",), out=tmp_path / "cut")
    same = {"steps": 200, "total_steps": 6000, "random_steps": 500, "eval_every": 2500, "eval_episodes": 2, "updates_per_step": 0.5}
    same |= {"batch_size": 16, "hidden": 16}
    run(collector, kinds=("random", "medium-replay"), out=tmp_path / "cut", **same)
    assert capsys.readouterr().out.count("is there already") == 2
    assert (tmp_path / "cut" / "hopper_random.hdf5").stat().st_mtime_ns == before


def test_data_sets_do_not_depend_on_which_others_are_made(collector, tmp_path):
    kinds = ("random", "medium", "expert", "medium-expert")
    run(collector, kinds=kinds, out=tmp_path / "all")
    made = {kind: arrays(tmp_path / "all" / f"hopper_{kind.replace('-', '_')}.hdf5") for kind in kinds}
    for kind in ("random", "medium", "medium-expert"):
        run(collector, kinds=(kind,), out=tmp_path / kind)
        assert_same_arrays(arrays(tmp_path / kind / f"hopper_{kind.replace('-', '_')}.hdf5"), made[kind])
    halves = {k: np.concatenate([made["medium"][k], made["expert"][k]]) for k in made["medium"]}
    assert_same_arrays(made["medium-expert"], halves)
    assert not np.array_equal(made["medium"]["actions"][:20], made["expert"]["actions"][:20])


def test_deleted_file_is_made_again_although_its_sheet_is_there(collector, tmp_path):
    run(collector, kinds=("random",), out=tmp_path)
    first = arrays(tmp_path / "hopper_random.hdf5")
    (tmp_path / "hopper_random.hdf5").unlink()
    run(collector, kinds=("random",), out=tmp_path)
    assert_same_arrays(arrays(tmp_path / "hopper_random.hdf5"), first)


def test_run_that_never_is_medium_says_so(collector, tmp_path):
    with pytest.raises(UserError, match="--medium-band"):
        run(collector, kinds=("medium-replay",), out=tmp_path, medium_band=(8, 9))
    assert not list(tmp_path.glob("*.hdf5")) and not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("robot, kind", [("halfcheetah", "jump"), ("ant", "angle")])
def test_relabelled_replay_has_the_reward_of_its_environment(collector, tmp_path, robot, kind):
    """One step of the task's environment from a recorded state pays what the file says for the recorded action."""
    run(collector, env=robot, kinds=(kind,), out=tmp_path, medium_band=(8, 9), total_steps=1200, random_steps=1100, minari=True)
    task, file = parse_task(f"{robot}-{kind}"), tmp_path / f"{robot}_{kind}.hdf5"
    data, sheet = load_dataset(task, str(file)), json.loads(file.with_suffix(".json").read_text())
    with h5py.File(file) as f:
        rows = {k: f[k][:] for k in ("actions", "rewards", "infos/qpos", "infos/qvel")}
    assert len(data) == sheet["transitions"] >= 1200 and "relabelled" in sheet["recipe"]
    assert task.reference is None and utils.normalized_score(task, 1.0) is None
    env = utils.make_env(task)
    env.reset(seed=0)
    for i in range(0, 1000, 97):
        env.unwrapped.set_state(rows["infos/qpos"][i].astype(float), rows["infos/qvel"][i].astype(float))
        obs, rew, *_ = env.step(rows["actions"][i])
        assert rew == pytest.approx(rows["rewards"][i].item(), abs=0.05)  # states are recorded in float32
        assert rew == pytest.approx(utils.relabelled_reward(kind, rows["actions"][i], obs))
    with h5py.File(file, "r+") as f:  # the rewards that the robot itself pays would teach another task than the one evaluated
        f["rewards"][...] += 1
    with pytest.raises(UserError, match=f"not those of {robot}-{kind}"):
        load_dataset(task, str(file))
    with pytest.raises(UserError, match="not of hopper"):
        run(collector, kinds=(kind,), out=tmp_path)


def test_a_replay_without_an_evaluation_says_so(collector, tmp_path):
    run(collector, env="ant", kinds=("angle",), out=tmp_path, total_steps=800, eval_every=9_999)
    sheet = json.loads((tmp_path / "ant_angle.json").read_text())
    assert "return was not measured" in sheet["recipe"] and "medium_at" not in sheet
    with pytest.raises(UserError, match="--total-steps 600: must exceed --random-steps 600"):
        run(collector, env="ant", kinds=("angle",), out=tmp_path / "other", total_steps=600)


def test_the_agent_of_jump_is_trained_on_a_reward_of_its_own(collector, tmp_path, monkeypatch):
    seen, plain = [], collector.SAC.update
    monkeypatch.setattr(collector.SAC, "update", lambda self, *batch: (seen.append(batch), plain(self, *batch))[1])
    run(collector, env="halfcheetah", kinds=("jump",), out=tmp_path, medium_band=(8, 9), total_steps=1200, random_steps=1100)
    for _, act, rew, next_obs, *_ in seen:
        torch.testing.assert_close(rew, utils.relabelled_reward("run", act, next_obs), atol=1e-4, rtol=1e-4)
    assert seen
    with pytest.raises(UserError, match="by itself"):
        run(collector, env="halfcheetah", kinds=("jump", "random"), out=tmp_path)


def test_rewards_of_the_relabelled_tasks_by_hand():
    act, cheetah, ant = np.full(6, 0.5), np.zeros(17), np.zeros(27)
    cheetah[0], cheetah[8] = 0.2, 5.0  # height, speed: 3 + 3 - 0.1 * 1.5
    assert utils.relabelled_reward("jump", act, cheetah) == pytest.approx(5.85)
    assert utils.relabelled_reward("run", act, cheetah) == pytest.approx(2.85)
    cheetah[8] = -1.0
    assert utils.relabelled_reward("jump", act, cheetah) == pytest.approx(1.85)
    ant[13], ant[14] = 2.0, 4.0  # 1 + 2 cos 30 + 4 sin 30 - 0.5 * 2
    assert utils.relabelled_reward("angle", np.full(8, 0.5), ant) == pytest.approx(2 + 3**0.5)


# --- the bundled file ---


def test_bundled_file_is_what_its_sheet_says(collector):
    path = utils.BUNDLED / "hopper_medium_replay.hdf5"
    sheet = json.loads(path.with_suffix(".json").read_text())
    data = load_dataset(parse_task("hopper-medium-replay"), "bundled")
    assert data.sha256 == sheet["sha256"] and path.stat().st_size == sheet["bytes"] < 16 * 2**20
    with h5py.File(path) as f:
        flat = {k: f[k][:] for k in ("rewards", "terminals", "timeouts")}
    returns, lengths = collector.episode_returns(flat)
    statistics = {"mean": returns.mean(), "std": returns.std(), "min": returns.min(), "max": returns.max()}
    assert {k: sheet[f"return_{k}"] for k in statistics} == pytest.approx(statistics) and sheet["length_mean"] == lengths.mean()
    counts = {"episodes": len(returns), "terminals": flat["terminals"].sum(), "timeouts": flat["timeouts"].sum()}
    assert {k: sheet[k] for k in counts} == counts
    assert flat["terminals"][-1] or flat["timeouts"][-1]
    assert not (flat["terminals"] & flat["timeouts"]).any()
    assert len(data) == sheet["transitions"] == sheet["medium_at"] and data.has_next.all()
    torch.testing.assert_close(data.trajectory_returns().unique().numpy(), np.unique(returns))
    low, high = sheet["args"]["medium_band"]
    assert low <= utils.normalized_score(parse_task("hopper-medium-replay"), sheet["medium_eval_return"]) / 100 <= high
    assert sheet["environment"] == "Hopper-v4" and sheet["kind"] == "medium-replay"
