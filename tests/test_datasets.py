"""datasets/mujoco.py: what it records and writes, that a killed run is resumed exactly; and the bundled file."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import gymnasium
import h5py
import minari.utils
import numpy as np
import pytest
import torch
from conftest import ROOT

import plumbing
import utils
from envs.relabelled import relabelled_reward
from utils import UserError, load_dataset, parse_task

FACTS = {"kind": "random", "seed": 0, "recipe": "by hand"}
TINY = {"steps": 50, "total_steps": 700, "random_steps": 600, "updates_per_step": 0.1, "batch_size": 8, "hidden": 8}
TINY |= {"eval_every": 500, "eval_episodes": 1, "medium_band": (-9, 9), "minari": False}  # medium at once


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(collector, **flags):
    """The command without a process of its own."""
    collector.main(collector.Args(**TINY | flags))


def by_hand():
    """Three episodes of 2, 1 and 3 rows: terminal, time limit, terminal. Episode e observes 10 e, 10 e + 1, ..."""
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


def arrays(path):
    with h5py.File(path) as f:
        return {k: f[k][:] for k in by_hand()}


def assert_same_arrays(a, b):
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- recording and writing ---


def test_collected_rows_are_whole_episodes_of_the_environment(collector):
    def collect():
        rng = np.random.default_rng(0)
        return collector.collect("hopper", lambda obs: rng.uniform(-1, 1, (len(obs), 3)).astype("f4"), 150, 5, "", 3)

    data = collect()
    ends = data["terminals"] | data["timeouts"]
    assert len(ends) >= 150 and ends[-1] and not (data["terminals"] & data["timeouts"]).any()
    inside = np.flatnonzero(~ends)
    assert np.array_equal(data["next_observations"][inside], data["observations"][inside + 1])
    starts = np.flatnonzero(np.r_[True, ends[:-1]])
    assert np.abs(data["infos/qpos"][starts] - [0, 1.25, 0, 0, 0, 0]).max() < 0.0051  # starts are resets, all different
    assert len(np.unique(data["observations"][starts], axis=0)) == len(starts)
    assert_same_arrays(data, collect())
    env = utils.make_env("hopper")  # qpos and qvel are the state before the action
    env.reset(seed=0)
    for i in (0, len(ends) // 2):
        env.unwrapped.set_state(data["infos/qpos"][i].astype(float), data["infos/qvel"][i].astype(float))
        obs, rew, terminated, *_ = env.unwrapped.step(data["actions"][i])
        assert np.allclose(obs, data["next_observations"][i], atol=1e-4) and terminated == data["terminals"][i]
        assert np.isclose(rew, data["rewards"][i], atol=1e-3)


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
    assert data["terminals"].tolist() == [True, False, True] * 2
    assert data["timeouts"].tolist() == [False, True, False] * 2


def test_written_file_is_read_back_and_its_sheet_is_right(collector, tmp_path):
    data, path = by_hand(), tmp_path / "new" / "hopper_random.hdf5"
    collector.write(path, data, FACTS, collector.Args(minari=False, seed=3))
    assert sorted(p.name for p in path.parent.iterdir()) == ["hopper_random.hdf5", "hopper_random.json"]
    assert_same_arrays(arrays(path), data)
    loaded = load_dataset(parse_task("hopper-random"), str(path))
    names = {"obs": "observations", "act": "actions", "rew": "rewards", "next_obs": "next_observations"}
    assert all(np.array_equal(getattr(loaded, name), data[key]) for name, key in names.items())
    assert loaded.terminated.tolist() == [0, 1, 0, 0, 0, 1] and loaded.trajectory.tolist() == [0, 0, 1, 2, 2, 2]
    sheet = json.loads(path.with_suffix(".json").read_text())
    facts = {"transitions": 6, "episodes": 3, "terminals": 2, "timeouts": 1, "bytes": path.stat().st_size}
    facts |= {"return_mean": 21, "return_min": 3, "return_max": 56, "length_mean": 2, "environment": "Hopper-v4"}
    assert (FACTS | facts).items() <= sheet.items() and sheet["return_std"] == pytest.approx(np.std([3, 4, 56]))
    assert sheet["sha256"] == loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "halved" in sheet["margins"] and sheet["args"]["seed"] == 3
    assert sheet["versions"]["gymnasium"] == gymnasium.__version__
    with h5py.File(path) as f:
        assert f.attrs["recipe"] == "by hand" and f.attrs["environment"] == "Hopper-v4"

    collector.write(path, data, FACTS, collector.Args(minari=False, infos=False))
    with h5py.File(path) as f:
        assert "infos" not in f and "observations" in f


def cut(*_):
    raise KeyboardInterrupt


def test_sheet_is_written_last(collector, tmp_path, own_folders, monkeypatch):
    """Its presence means "done": a run that was cut while it wrote Minari data does it again, over what is left."""
    path = tmp_path / "hopper_random.hdf5"
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(minari.utils, "_generate_dataset_metadata", cut)
        collector.write(path, by_hand(), FACTS, collector.Args())
    assert not path.with_suffix(".json").exists() and (own_folders / "minari/rewind/hopper/random-v0").exists()
    for _ in range(2):
        collector.write(path, by_hand(), FACTS, collector.Args())
        assert path.with_suffix(".json").exists()
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
    assert act.shape == (7, 2) and torch.equal(mean_act, mean.tanh())
    torch.testing.assert_close(log_prob, squashed.log_prob(act).sum(-1))


def test_sac_target_bootstraps_through_time_limits_only(collector):
    """The Q loss of a row is (Q - r - gamma (1 - terminated) V(s'))^2; V has the smaller target Q and the entropy."""
    torch.manual_seed(0)
    agent = collector.SAC(4, 2, collector.Args(hidden=8))
    obs, next_obs, act, rew = torch.randn(2, 4), torch.randn(2, 4), torch.rand(2, 2), torch.tensor([1.0, 2.0])
    agent.log_alpha.data.fill_(np.log(0.5))
    torch.manual_seed(1)
    loss = agent.qf_loss(obs, act, rew, next_obs, torch.tensor([1.0, 0.0]))
    torch.manual_seed(1)
    with torch.no_grad():
        next_act, next_log_prob, _ = agent.policy(next_obs)
        next_v = agent.target_qf(next_obs, next_act).min(0).values - 0.5 * next_log_prob
        target = torch.stack([rew[0], rew[1] + 0.99 * next_v[1]])
        torch.testing.assert_close(loss, sum(((q - target) ** 2).mean() for q in agent.qf(obs, act)))


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


@pytest.mark.parametrize("checkpoint_every, eval_every", [(520, 250), (700, 1000)], ids=["random steps", "learning"])
def test_run_cut_after_its_first_checkpoint_ends_alike(collector, tmp_path, monkeypatch, checkpoint_every, eval_every):
    """Checkpoint 520 lies between the evaluation due at 500 and the end of the random steps, for which that waits."""
    sizes = TINY | {"total_steps": 1100, "eval_every": eval_every, "checkpoint_every": checkpoint_every}
    args = collector.Args(**sizes, min_replay=900, keep_policies=True)
    made, plain = [], plumbing.write_file

    def train(folder):
        agent, run, replay, medium = collector.train(args, folder)
        policies = {p.name: torch.load(p, weights_only=True)["agent"]["policy"] for p in folder.glob("policy_*.pt")}
        return asdict(run), [x[: run.step] for x in replay], agent.state_dict(), medium, policies

    def write_then_die(path, content):
        plain(path, content)
        made.append(path.name)
        if path.name == "checkpoint.pt":
            cut()

    torch.manual_seed(0)
    facts, replay, agent, medium, policies = train(tmp_path / "whole")
    torch.manual_seed(0)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(plumbing, "write_file", write_then_die)
        train(tmp_path / "cut")
    assert len(made) == 2 and made[0].startswith("policy_")  # before the checkpoint, not after
    torch.manual_seed(1)  # the random numbers come from the checkpoint
    facts_2, replay_2, *rest = train(tmp_path / "cut")
    assert facts == facts_2 and facts["medium_at"] >= 900 and facts["updates"] > 0
    assert all(np.array_equal(a, b) for a, b in zip(replay, replay_2, strict=True))
    assert torch.equal(agent["log_alpha"], rest[0]["log_alpha"])
    nets = [(agent["target_qf"], rest[0]["target_qf"]), (medium, rest[1])]
    for a, b in [*nets, *((policies[name], rest[2][name]) for name in policies | rest[2])]:
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    last = policies[f"policy_{facts['step']}.pt"]
    assert all(torch.equal(last[k], agent["policy"][k]) for k in last) and len(policies) >= 2


def test_keeping_policies_is_no_other_run(collector, tmp_path):
    run(collector, kinds=("expert",), out=tmp_path)
    (folder,) = tmp_path.glob("sac-*")
    (tmp_path / "hopper_expert.hdf5").unlink()
    run(collector, kinds=("expert",), out=tmp_path, keep_policies=True)
    assert [*tmp_path.glob("sac-*")] == [folder] and len([*folder.glob("policy_*.pt")]) == 1
    run(collector, kinds=("expert",), out=tmp_path)  # nor another dataset
    (tmp_path / "hopper_expert.hdf5").unlink()
    checkpoint = folder / "checkpoint.pt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint\.pt: cannot be read"):
        run(collector, kinds=("expert",), out=tmp_path)


def test_killed_command_gives_the_same_data(collector, tmp_path, capsys):
    flags = {"kinds": ("random", "medium-replay"), "steps": 200, "total_steps": 6000, "random_steps": 300}
    flags |= {"eval_every": 1000, "eval_episodes": 2, "updates_per_step": 0.2, "checkpoint_every": 300}
    words = ["--env", "hopper", "--no-minari", "--out", str(tmp_path / "cut")]
    for k, v in (TINY | flags).items():
        words += [f"--{k.replace('_', '-')}", *map(str, v if isinstance(v, tuple) else (v,))] * (k != "minari")
    killed = subprocess.Popen([sys.executable, ROOT / "datasets" / "mujoco.py", *words], cwd=tmp_path)
    while killed.poll() is None and not list((tmp_path / "cut").glob("sac-*/checkpoint.pt")):
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not list((tmp_path / "cut").glob("*.hdf5"))
    for folder, resumed in (("whole", False), ("cut", True)):
        run(collector, out=tmp_path / folder, **flags)
        assert ("resumed at step" in capsys.readouterr().out) == resumed

    for kind in ("random", "medium_replay"):
        assert_same_arrays(*(arrays(tmp_path / folder / f"hopper_{kind}.hdf5") for folder in ("whole", "cut")))
        path = tmp_path / "cut" / f"hopper_{kind}.hdf5"
        sheets = [json.loads((tmp_path / f / f"hopper_{kind}.json").read_text()) for f in ("whole", "cut")]
        data = load_dataset(parse_task(f"hopper-{kind.replace('_', '-')}"), str(path))
        assert sheets[0]["evaluations"] == sheets[1]["evaluations"] and data.has_next.all()
        assert (len(data), data.trajectory[-1] + 1) == (sheets[1]["transitions"], sheets[1]["episodes"])  # whole ones
    assert len(data) == sheets[1]["medium_at"] >= 1000
    assert sheets[1]["evaluations"][-1][1] == sheets[1]["medium_eval_return"]
    before = path.stat().st_mtime_ns
    messages = {"medium-replay": "with --updates-per-step 0.2, --random-steps 300, ", "random": "with --steps 200;"}
    for kind, message in messages.items():
        with pytest.raises(UserError, match=message):  # a trial is not the real data
            run(collector, kinds=(kind,), out=tmp_path / "cut")
    run(collector, out=tmp_path / "cut", **flags)
    assert capsys.readouterr().out.count("exists") == 2 and path.stat().st_mtime_ns == before


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
    (tmp_path / "random" / "hopper_random.hdf5").unlink()  # made again, although its sheet is there
    run(collector, kinds=("random",), out=tmp_path / "random")
    assert_same_arrays(arrays(tmp_path / "random" / "hopper_random.hdf5"), made["random"])


def test_flags_that_lead_nowhere_are_refused(collector, tmp_path):
    wrong = {"--medium-band": {"kinds": ("medium-replay",), "medium_band": (8, 9)}, "of hopper": {"kinds": ("jump",)}}
    wrong |= {"--total-steps 600: must exceed --random-steps 600": {"total_steps": 600}, "--steps 0": {"steps": 0}}
    wrong |= {"generate it alone": {"env": "halfcheetah", "kinds": ("jump", "random")}}
    for message, flags in wrong.items():
        with pytest.raises(UserError, match=message):
            run(collector, out=tmp_path, **flags)
    assert not list(tmp_path.glob("*.hdf5")) and not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("robot, kind", [("halfcheetah", "jump"), ("ant", "angle")])
def test_relabelled_replay_has_the_reward_of_its_environment(collector, tmp_path, monkeypatch, robot, kind):
    """One step of the task's environment from a recorded state pays what the file says for the recorded action. The
    agent of jump is trained on a reward of its own."""
    seen, plain = [], collector.SAC.update
    monkeypatch.setattr(collector.SAC, "update", lambda self, *batch: (seen.append(batch), plain(self, *batch))[1])
    flags = {"medium_band": (8, 9), "total_steps": 1200, "random_steps": 1100, "eval_every": 9_999, "minari": True}
    run(collector, env=robot, kinds=(kind,), out=tmp_path, **flags)
    task, file = parse_task(f"{robot}-{kind}"), tmp_path / f"{robot}_{kind}.hdf5"
    data, sheet = load_dataset(task, str(file)), json.loads(file.with_suffix(".json").read_text())
    assert len(data) == sheet["transitions"] >= 1200 and "relabelled" in sheet["recipe"]
    assert "return was not measured" in sheet["recipe"] and "medium_at" not in sheet
    assert task.reference is None and utils.normalized_score(task, 1.0) is None
    rows, env = arrays(file), utils.make_env(task)
    env.reset(seed=0)
    for i in range(0, 1000, 97):
        env.unwrapped.set_state(rows["infos/qpos"][i].astype(float), rows["infos/qvel"][i].astype(float))
        obs, rew, *_ = env.step(rows["actions"][i])
        assert rew == pytest.approx(rows["rewards"][i].item(), abs=0.05)  # states are recorded in float32
        assert rew == pytest.approx(relabelled_reward(kind, rows["actions"][i], obs))
    for _, act, rew, next_obs, *_ in seen if kind == "jump" else ():
        torch.testing.assert_close(rew, relabelled_reward("run", act, next_obs), atol=1e-4, rtol=1e-4)
    assert seen
    with h5py.File(file, "r+") as f:  # the robot's own rewards would teach another task than the one evaluated
        f["rewards"][...] += 1
    with pytest.raises(UserError, match=f"not those of {robot}-{kind}"):
        load_dataset(task, str(file))


def test_rewards_of_the_relabelled_tasks_by_hand():
    act, cheetah, ant = np.full(6, 0.5), np.zeros(17), np.zeros(27)
    cheetah[0], cheetah[8] = 0.2, 5.0  # height, speed: 3 + 3 - 0.1 * 1.5
    assert relabelled_reward("jump", act, cheetah) == pytest.approx(5.85)
    assert relabelled_reward("run", act, cheetah) == pytest.approx(2.85)
    cheetah[8] = -1.0
    assert relabelled_reward("jump", act, cheetah) == pytest.approx(1.85)
    ant[13], ant[14] = 2.0, 4.0  # 1 + 2 cos 30 + 4 sin 30 - 0.5 * 2
    assert relabelled_reward("angle", np.full(8, 0.5), ant) == pytest.approx(2 + 3**0.5)


# --- the bundled file ---


def test_bundled_file_is_what_its_sheet_says(collector):
    path = utils.BUNDLED / "hopper_medium_replay.hdf5"
    task, sheet = parse_task("hopper-medium-replay"), json.loads(path.with_suffix(".json").read_text())
    data = load_dataset(task, "bundled")
    assert data.sha256 == sheet["sha256"] and path.stat().st_size == sheet["bytes"] < 16 * 2**20
    with h5py.File(path) as f:
        flat = {k: f[k][:] for k in ("rewards", "terminals", "timeouts")}
    returns, lengths = collector.episode_returns(flat)
    statistics = {k: getattr(returns, k)() for k in ("mean", "std", "min", "max")}
    assert {k: sheet[f"return_{k}"] for k in statistics} == pytest.approx(statistics)
    counts = {"episodes": len(returns), "terminals": flat["terminals"].sum(), "timeouts": flat["timeouts"].sum()}
    assert {k: sheet[k] for k in counts} == counts and sheet["length_mean"] == lengths.mean()
    assert (flat["terminals"] ^ flat["timeouts"])[-1] and not (flat["terminals"] & flat["timeouts"]).any()
    assert len(data) == sheet["transitions"] == sheet["medium_at"] and data.has_next.all()
    torch.testing.assert_close(data.trajectory_returns().unique().numpy(), np.unique(returns))
    low, high = sheet["args"]["medium_band"]
    assert low <= utils.normalized_score(task, sheet["medium_eval_return"]) / 100 <= high
    assert sheet["environment"] == "Hopper-v4" and sheet["kind"] == "medium-replay"
