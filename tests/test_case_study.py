"""The case study's measures by hand, closed-form motion and brute force; and as a whole on small runs."""

import importlib
import json
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
import tyro
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from benchmark import case_study as study
from benchmark import report
from envs.maze2d import Maze2d
from utils import Dataset, UserError

H, M = 0.01, 4.18879020478639  # s, kg


# --- discrepancy ---


def test_discrepancy_by_hand():
    data = np.array([[0.0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 9]])
    far = np.array([[0, 1.0, 0, 0], [3, 0, 2, 0], [1, 0, 0, 9]])  # 1, 2 and 1 away
    near = np.array([[0, 0, 0, 5.0], [1.4, 0, 0, 0]])  # 4 away from the third, not 5 from the first; 1.4, not 1.6
    np.testing.assert_allclose(study.discrepancy(cKDTree(data), [far, data, near]), [4 / 3, 0, 2.7])
    assert study.mean_se([1.0, 3.0]) == [2, pytest.approx(1)] and study.mean_se([1.0]) == [1, None]


def test_discrepancy_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    data, trajectories = rng.normal(size=(500, 4)), [rng.normal(size=(n, 4)) for n in (1, 7, 30)]
    expected = [cdist(t, data).min(1).mean() for t in trajectories]
    np.testing.assert_allclose(study.discrepancy(cKDTree(data, balanced_tree=False), trajectories), expected)


# --- accuracy ---


class KnownModel:
    """The ball's free motion, forward or in reverse, as two elites with given errors (2, 1, 5) of reward and state."""

    elites = torch.arange(2)

    def __init__(self, backward, errors):
        self.backward, self.errors = backward, torch.as_tensor(errors, dtype=torch.float64).view(2, 1, 5)

    def inputs(self, cond, act):
        return torch.cat([cond, act], -1)

    def __call__(self, x, elites):
        cond, act = x.split([4, 2], -1)
        if self.backward:
            v = (cond[..., 2:] * (M + H) - 100 * H * act) / M
            pred = torch.cat([cond[..., :2] - H * cond[..., 2:], v], -1)
        else:
            v = cond[..., 2:] + H * (100 * act - cond[..., 2:]) / (M + H)  # no speed is clipped here
            pred = torch.cat([cond[..., :2] + H * v, v], -1)
        speed = (pred if self.backward else cond)[..., 2:].norm(dim=-1, keepdim=True)
        return torch.cat([speed, pred - cond], -1) + self.errors, None


@pytest.fixture(scope="module")
def free_motion():
    """8 trajectories of 25 transitions amid the bottom corridor, from the simulator; the row's speed is its reward."""
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


@pytest.mark.parametrize("backward", [False, True])
def test_known_errors_of_a_model_come_out_as_they_are(free_motion, backward):
    perfect = study.accuracy(KnownModel(backward, torch.zeros(10)), free_motion, torch.arange(200), backward)
    assert perfect["rows"] == 200 and max(perfect["rmse_state"], perfect["rmse_reward"]) < 1e-12
    errors = [[0, 0.03, -0.04, 0, 0], [0.5, 0, 0, 0.1, 0]]  # 0.05 m; 0.1 m/s and 0.5 of the reward
    out = study.accuracy(KnownModel(backward, errors), free_motion, torch.arange(200), backward)
    assert out["rmse_state"] == pytest.approx(((0.05**2 + 0.1**2) / 2) ** 0.5)
    assert out["rmse_reward"] == pytest.approx(0.5 / 2**0.5, rel=0.1)  # in reverse the reward is of the state predicted


# --- runs ---

TINY = (
    "--env maze2d-umaze --total-updates 30 --batch-size 20 --hidden 16 16 --vae-hidden 16 --dynamics-hidden 16"
    " --dynamics-max-epochs 2 --model-buffer-size 2000 --rollout-batch-size 500 --rollout-policy-updates 20"
    " --bcq-samples 2 --eval-samples 4 --eval-episodes 1 --num-threads 1"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """romi_bcq, fomi_bcq and bcq on 2000 steps of random motion, 10 segments."""
    folder, env, rng = tmp_path_factory.mktemp("runs"), Maze2d("umaze"), np.random.default_rng(0)
    obs, act = np.zeros((2000, 4)), rng.uniform(-1, 1, (2000, 2)).astype("f4")
    state, _ = env.reset(seed=0)
    for t in range(2000):
        obs[t], state = state, env.step(act[t])[0]
    with h5py.File(folder / "small.hdf5", "w") as f:
        f["observations"], f["actions"], f["rewards"] = obs.astype("f4"), act, env.reward(obs[:, :2]).astype("f4")
        f["terminals"], f["timeouts"] = np.zeros(2000, bool), np.arange(2000) % 200 == 199
    for script, *flags in (
        ["romi_bcq", "--rollout-policy", "cvae"],
        ["fomi_bcq"],
        ["romi_bcq", "--model-ratio", "0"],
    ):
        m = importlib.import_module(script)
        flags += ["--dataset", str(folder / "small.hdf5"), "--run-dir", str(folder)]
        m.main(tyro.cli(m.Args, args=[*TINY.split(), *flags]))
    return [folder / f"maze2d-umaze-v1__{name}__0__small" for name in ("romi_bcq", "fomi_bcq", "bcq")]


def test_settings_are_read_as_the_script_reads_them(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["args"] |= {"latent_clip": "inf", "of_an_old_version": 1}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    args = study.FinishedRun(tmp_path / "run").args
    assert args.latent_clip == float("inf") and args.hidden == (16, 16)


def test_a_case_study_of_three_runs(runs, tmp_path):
    study.case_study(tuple(runs), out=tmp_path, episodes=2, chains=40)
    file = tmp_path / "case_study_maze2d-umaze-v1__small.json"
    result = json.loads(file.read_text())
    assert file.with_suffix(".png").stat().st_size > 10_000 and str(tmp_path) not in json.dumps(result)
    assert [*result["runs"]] == ["romi_bcq 0", "fomi_bcq 0", "bcq 0"] and "imagined" not in result["runs"]["bcq 0"]
    for folder, run in zip(runs, result["runs"].values(), strict=True):
        assert run["updates"] == 30 and run["executed"]["trajectories"] == 2 and run["executed"]["discrepancy"][0] > 0
        if "imagined" in run:
            assert run["imagined"]["trajectories"] == 40 and run["imagined"]["horizon"] == 5
            # these are the rows that the run held out: the error that it logged, a mean over reward and four dimensions
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            logged = [line["model/elite_mse"] for line in lines if "model/elite_mse" in line][-1]
            ours = run["held_out"]["1"]
            assert (ours["rmse_state"] ** 2 + ours["rmse_reward"] ** 2) / 5 == pytest.approx(logged, rel=1e-4)
    titles, _, *rows = report.case_study_table(tmp_path).splitlines()
    assert "Eq. 5 executed" in titles and len(rows) == 3 and "| umaze, small | romi_bcq 0 | 30 |" in rows[0]
    study.case_study((runs[0],), out=tmp_path, episodes=2, chains=40)
    assert json.loads(file.read_text())["runs"]["romi_bcq 0"] == result["runs"]["romi_bcq 0"]  # everything is seeded


def test_chains_are_imagined_in_the_runs_direction(runs):
    first = []
    for folder in runs[:2]:
        run = study.FinishedRun(folder)
        run.args = replace(run.args, rollout_policy="uniform")
        data = study.load_dataset(run.task, run.args.dataset)
        run.load(data)
        obs, act, next_obs = run.imagine(data, 30, seed=0)
        assert obs.shape == next_obs.shape == (30, 5, 4) and act.shape == (30, 5, 2)
        assert (obs[:, 1:] == next_obs[:, :-1]).all()
        rows = {tuple(x) for x in data.obs.tolist()}
        ends, others = (next_obs[:, -1], obs[:, 0]) if run.reverse else (obs[:, 0], next_obs[:, -1])
        assert {tuple(x) for x in ends} <= rows and not {tuple(x) for x in others} & rows
        first.append(ends)
    assert (first[0] == first[1]).all()


def test_what_cannot_be_used_is_said(runs, tmp_path):
    def error(*folders, **more):
        with pytest.raises(UserError) as e:
            study.case_study(folders, out=tmp_path, episodes=1, chains=10, **more)
        return str(e.value)

    assert "is no run of these scripts" in error(tmp_path / "nothing")
    assert "give the folders" in error()
    other = tmp_path / "other"
    shutil.copytree(runs[2], other)
    config = json.loads((other / "config.json").read_text())
    (other / "agent.pt").unlink()
    assert "does not exist; has the run reached this phase?" in error(other)
    (other / "config.json").write_text(json.dumps(config | {"dataset": {"sha256": "another"}}))
    assert "not all are runs on" in error(runs[0], other)
    (other / "config.json").write_text(json.dumps(config | {"task": "hopper-medium-v2"}))
    assert "on maze2d" in error(other)
    (other / "config.json").write_text("{}")
    assert "is no run of these scripts" in error(other)
