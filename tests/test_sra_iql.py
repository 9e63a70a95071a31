"""Facts about SRA-IQL: confidence, goals, reverse rounds and IQL by hand; its data; its runs, killed and resumed."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import sra_iql as m
import torch
import tyro
from test_runs import assert_same_run, data_file, leaves, metrics, weights  # noqa: F401 - a fixture among them
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import utils
from utils import Dataset, UserError, load_dataset, load_expert, parse_task

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT.parent / "shared" / "data" / "maze2d_expert"
CPU = torch.device("cpu")
ARGS = m.Args(
    exp_name="test", hidden=(16, 16), dynamics_layers=(32,), batch_size=12, horizon=3, rollout_rows=600, rollout_batch_size=100,
    learning_rate=1e-3, learning_rate_drop=0, cosine_updates=0, dynamics_learning_rate=1e-3, dynamics_optimizer="adam", ensemble_size=3,
    model_ratio=0.7, rollout_policy="uniform", weight_decay=0.0, vae_hidden=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class FixedConfidence:
    """A policy whose log Conf is the first entry of the state."""

    def log_confidence(self, obs):
        return obs[:, 0]


class FakeRun:
    """As much of a Run as phases need, without a folder."""

    task = parse_task("hopper-medium")

    def __init__(self):
        self.state, self.rows = {}, []

    def log(self, update, row):
        self.rows.append(row)

    def save(self, phase, step, **parts):
        self.state |= parts | {"phase": phase}


def states(*log_conf):
    return torch.stack([torch.tensor(log_conf), torch.arange(len(log_conf)).float()], 1)


def as_set(rows):
    return {tuple(row) for row in rows.tolist()}


# --- labels ---


def test_labels_are_1_for_the_expert_and_0_for_all_others_whatever_the_rewards():
    n = 6
    data = Dataset(
        torch.arange(2.0 * n).view(n, 2), torch.rand(n, 1), torch.randn(n), torch.randn(n, 2), torch.tensor([0, 0, 1.0, 0, 0, 0]),
        torch.tensor([True, True, True, False, True, True]), torch.zeros(n).long(),
    )  # fmt: skip
    normalizer = m.Normalizer(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))  # mean (1, 1), std (1, 0) + 0.001
    used = [0, 1, 4, 5]  # row 2 ended the MDP, the successor of row 3 is unknown
    for label in (1.0, 0.0):
        obs, act, rew, next_obs, terminated = m.unpack(m.labelled(data, label, normalizer, CPU), 2, 1)
        assert rew.tolist() == [label] * 4 and not terminated.any() and act.equal(data.act[used])
        by_hand = torch.tensor([[(x - 1) / 1.001, (y - 1) / 0.001] for x, y in data.obs[used].tolist()])
        torch.testing.assert_close(obs, by_hand)
        torch.testing.assert_close(normalizer.inverse(next_obs), data.next_obs[used], atol=1e-5, rtol=1e-5)


# --- confidence and goals ---


def constant_policy(mean, log_std):
    policy = m.ClampedPolicy(3, 2, (16, 16))
    policy.net[-1].weight.data.zero_()
    policy.net[-1].bias.data = torch.tensor([*mean, *log_std])
    return policy


def test_log_confidence_by_hand():
    mean, log_std = (0.5, -1.2), (-0.3, 0.4)
    by_hand = sum(-s - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(mu) ** 2) for mu, s in zip(mean, log_std, strict=True))
    log_conf = constant_policy(mean, log_std).log_confidence(torch.randn(4, 3))
    torch.testing.assert_close(log_conf, torch.full((4,), by_hand))
    squashed = TransformedDistribution(Normal(torch.tensor(mean), torch.tensor(log_std).exp()), TanhTransform())
    torch.testing.assert_close(log_conf[0], squashed.log_prob(torch.tensor(mean).tanh()).sum())


def test_confidence_of_saturated_actions_is_bounded():
    """Mean clamped to 9, log std to -5: 5 - log sqrt(2 pi) - log(1 - tanh(9)^2) each, where float32's tanh is 1 already."""
    log_conf = constant_policy((50.0, -1000.0), (-40.0, -6.0)).log_confidence(torch.randn(1, 3))
    bound = 5 - 0.5 * math.log(2 * math.pi) - (2 * math.log(2) - 18 - 2 * math.log1p(math.exp(-18)))
    torch.testing.assert_close(log_conf, torch.tensor([2 * bound]))


def test_confidence_does_not_depend_on_the_size_of_chunks():
    policy, obs, some = m.ClampedPolicy(3, 2, (16, 16)), torch.randn(25_000, 3), [0, 9_999, 10_000, 24_999]
    torch.testing.assert_close(policy.log_confidence(obs)[some], policy.log_confidence(obs[some]))


def test_goals_exceed_a_quantile_of_the_expert_states_and_are_capped():
    expert, supplementary = states(0.0, 1.0, 2.0, 3.0, 4.0), states(3.2, 3.1, 9.0, -1.0, 5.0, 3.3)
    goals, threshold = m.confident_states(FixedConfidence(), expert, supplementary, replace(ARGS, threshold_quantile=0.8))
    assert threshold == pytest.approx(3.2) and as_set(goals) == as_set(supplementary[[2, 4, 5]])  # above it, not on it
    before = as_set(supplementary) | {None}
    for quantile in (0.0, 0.2, 0.5, 0.8, 0.9, 1.0):  # a higher threshold never enlarges the set
        now = as_set(m.confident_states(FixedConfidence(), expert, supplementary, replace(ARGS, threshold_quantile=quantile))[0])
        assert now <= before
        before = now
    many = torch.stack([torch.linspace(-1, 10, 100), torch.zeros(100)], 1)[torch.randperm(100)]
    goals, _ = m.confident_states(FixedConfidence(), expert, many, replace(ARGS, goal_cap=2))
    assert as_set(goals) == as_set(many[many[:, 0].argsort()[-10:]])  # 2 x 5, the most confident


def test_goals_of_the_slides_exceed_the_mean_confidence():
    mean = replace(ARGS, threshold="mean")
    goals, threshold = m.confident_states(FixedConfidence(), states(0.0, math.log(3)), states(0.6, 0.7, math.log(2) + 1e-6), mean)
    assert threshold == pytest.approx(math.log(2)) and len(goals) == 2  # the mean of 1 and 3; of the logarithms it were 0.55
    goals, threshold = m.confident_states(FixedConfidence(), states(300.0, 310.0), states(305.0, 310.0), mean)  # Conf overflows
    assert threshold == pytest.approx(310 - math.log(2), abs=1e-3) and goals[:, 0].tolist() == [310.0]


def test_start_states_in_exact_shares_from_the_first_round_on():
    """90 % expert states, 10 % confident ones, also in the first round; later 7 % of these from earlier rounds and 3 % new."""
    pools = dict(expert=torch.full((7, 2), 1.0), older=torch.full((3, 2), 2.0), new=torch.full((5, 2), 3.0))
    none = torch.empty(0, 2)
    for missing, shares in (({}, (900, 70, 30)), ({"older": none}, (900, 0, 100)), ({"new": none}, (900, 100, 0)),
                            ({"older": none, "new": none}, (1000, 0, 0))):  # fmt: skip
        starts = m.start_states(1000, args=ARGS, **(pools | missing))
        assert tuple((starts[:, 0] == i).sum().item() for i in (1, 2, 3)) == shares
    assert len(m.start_states(7, args=ARGS, **pools)) == 7  # and whatever the rounding, the number that was asked for


# --- rounds ---


def test_resampling_prefers_the_unsure_with_odds_1_over_confidence():
    log_conf, n = torch.tensor([0.0, math.log(3)]), 20_000
    first = sum(m.resample(log_conf, 1).item() == 0 for _ in range(n)) / n
    assert first == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / n) ** 0.5)  # Conf 1 against Conf 3: odds 3 to 1
    assert sorted(m.resample(torch.randn(50), 50).tolist()) == list(range(50))  # without replacement


def test_resampling_weights_are_computed_in_log_space():
    sure = torch.tensor([300.0, 200.0])  # exp overflows float32, and 1 / inf = 0 for both would leave no odds
    assert all(m.resample(sure, 1).item() == 1 for _ in range(100))
    unsure, n = torch.tensor([-100.0, -50.0]), 4_000  # both weigh 1e5: the 1e-5 in the denominator
    first = sum(m.resample(unsure, 1).item() == 0 for _ in range(n)) / n
    assert first == pytest.approx(0.5, abs=4 * (0.25 / n) ** 0.5)


def small_round(args=ARGS, goals=None):
    goals = torch.randn(50, 3) if goals is None else goals
    models = m.ReverseDynamics(3, 2, args), m.UniformPolicy(3, 2, args)
    asked = []

    def starts(n):
        asked.append(n)
        return goals[torch.randint(len(goals), (n,))]

    rows, stats = m.augment(starts, m.ClampedPolicy(3, 2, (16, 16)), *models, args)
    return goals, models, asked, m.unpack(rows, 3, 2), stats


def test_every_row_of_a_round_leads_to_a_goal_or_to_a_kept_state():
    goals, (dynamics, _), asked, (obs, act, rew, next_obs, terminated), stats = small_round()
    assert len(obs) == 600 and asked == [400]  # 2 x 600 / 3 candidates for the first step, and only it starts at goals
    obs, act, next_obs = (x.view(3, 200, -1) for x in (obs, act, next_obs))
    assert as_set(next_obs[0]) <= as_set(goals)
    for i in (1, 2):
        assert as_set(next_obs[i]) <= as_set(obs[i - 1]) and not as_set(next_obs[i]) & as_set(goals)
    assert not rew.any() and not terminated.any() and act.abs().max() <= 1 and act.min() < -0.9
    torch.testing.assert_close(obs, dynamics.predict(next_obs.flatten(0, 1), act.flatten(0, 1)).view_as(obs))
    assert len(as_set(torch.cat([obs, act], -1).flatten(0, 1))) == 600  # no candidate is kept twice
    assert stats["model/log_confidence_kept"] < stats["model/log_confidence_imagined"]


def test_a_round_does_not_depend_on_the_batches_of_its_rollouts():
    rows = []
    for size in (100, 7):
        torch.manual_seed(1)
        *_, (obs, _, _, next_obs, _), _ = small_round(replace(ARGS, rollout_batch_size=size), torch.ones(1, 3))
        rows.append(len(obs))
        assert next_obs[:200].unique() == 1
    assert rows == [600, 600]


def augmented(args, expert, supplementary, rounds, run=None):
    models = m.ReverseDynamics(3, 2, args), m.UniformPolicy(3, 2, args)
    data = m.AugmentedData(expert, supplementary, models, m.ClampedPolicy(3, 2, args.hidden), m.Normalizer(expert), args, run or FakeRun())
    for i in range(rounds):
        torch.manual_seed(100 + i)
        data.add(10 * i, m.ClampedPolicy(3, 2, args.hidden).state_dict())
    return data


def test_rounds_fill_the_budget_and_a_batch_mixes_old_and_new_rows_70_to_30():
    args = replace(ARGS, rollout_rows=605)
    expert, supplementary = torch.randn(20, 3), torch.randn(100, 3)
    first, third = (augmented(args, expert, supplementary, n) for n in (1, 3))
    assert first.older is None and len(first.new) == 603 and len(first(100)) == 100  # S // h h rows a round
    assert len(third.older) + len(third.new) == 3 * 603
    third.older[:], third.new[:] = 1.0, 2.0
    batch = third(179)[:, 0]
    assert len(batch) == 179 and (batch == 2).sum() == 54 and (batch == 1).sum() == 125  # round(0.3 x 179)
    run = third.run.rows
    assert [row["model/goals"] for row in run] and all(0 < row["model/goals"] <= 100 for row in run)
    assert len(third.goals) == sum(row["model/goals"] for row in run)  # every selection stays in the start pool


def test_a_round_starts_at_expert_states_at_goals_of_earlier_rounds_and_at_its_own(monkeypatch):
    goals = iter([torch.full((5, 3), 10.0), torch.full((4, 3), 20.0)])
    monkeypatch.setattr(m, "confident_states", lambda *_: (next(goals), torch.tensor(0.0)))
    args = replace(ARGS, horizon=1, rollout_rows=1000, oversampling=1)  # every candidate is kept
    data, seen = augmented(args, torch.full((20, 3), 1.0), torch.full((100, 3), 2.0), 1), []
    for _ in range(2):
        ends = m.unpack(data.new, 3, 2)[3][:, 0]
        seen.append([(ends == x).sum().item() for x in (1, 2, 10, 20)])
        if len(seen) < 2:
            data.add(10, data.policies[0][1])
    assert seen == [[900, 0, 100, 0], [900, 0, 70, 30]]


def test_model_and_policy_learn_to_go_back_on_both_data_sets(monkeypatch):
    seen = {}
    monkeypatch.setattr(m, "train_reverse_dynamics", lambda net, *x: seen.update(model=x[:3]))
    monkeypatch.setattr(m, "train_rollout_policy", lambda net, *x: seen.update(policy=x[:2]))
    sizes = (30, 50)
    expert, rows = (m.pack(torch.randn(n, 3), torch.rand(n, 2), torch.zeros(n), torch.randn(n, 3), torch.zeros(n)) for n in sizes)
    m.reverse_models(expert, rows, 3, 2, replace(ARGS, rollout_policy="cvae"), FakeRun(), "key", None)
    obs, act, _, next_obs, _ = m.unpack(torch.cat([expert, rows]), 3, 2)
    assert all(torch.equal(x, y) for x, y in zip(seen["model"], (obs, act, next_obs), strict=True))  # s from s' and a
    assert all(torch.equal(x, y) for x, y in zip(seen["policy"], (next_obs, act), strict=True))  # a from s'


def test_rounds_are_made_again_from_their_policies():
    expert, supplementary = torch.randn(20, 3), torch.randn(100, 3)
    torch.manual_seed(1)
    data, run = augmented(ARGS, expert, supplementary, 3), FakeRun()
    run.state = {"rollout_policies": [(step, {k: v.clone() for k, v in weights.items()}) for step, weights in data.policies]}
    state = torch.get_rng_state()
    again = m.AugmentedData(expert, supplementary, data.models, m.ClampedPolicy(3, 2, ARGS.hidden), data.normalizer, ARGS, run)
    assert again.new.equal(data.new) and again.older.equal(data.older) and again.goals.equal(data.goals) and not run.rows
    assert not as_set(again.new) & as_set(again.older)  # each round has random numbers of its own
    torch.set_rng_state(state)
    m.ClampedPolicy(3, 2, ARGS.hidden)
    before = torch.get_rng_state()
    data.add(30, data.policies[0][1])
    assert torch.get_rng_state().equal(before)  # and none of the learner's
    data.add(40, data.policies[0][1])
    assert not as_set(data.new) & as_set(data.older[-600:])  # not even with the same policy


def test_a_diverged_model_ends_the_run():
    with pytest.raises(UserError, match="diverged") as e:
        augmented(ARGS, torch.full((20, 3), 3e38), torch.randn(100, 3), 1)
    assert e.value.status == 3


# --- reverse model ---


def linear_system(n=2000):
    obs, act = torch.randn(n, 2), 2 * torch.rand(n, 1) - 1
    return obs, act, obs @ torch.tensor([[1.0, 0.1], [0.0, 0.9]]) + act * torch.tensor([0.3, -0.2])


def test_prediction_is_next_state_plus_the_mean_of_the_members():
    dynamics, next_obs, act = m.ReverseDynamics(3, 2, replace(ARGS, dynamics_layers=(8, 8))), torch.randn(5, 3), torch.randn(5, 2)
    by_hand = torch.zeros(5, 3)
    for e in range(3):
        x = torch.cat([next_obs, act], 1)
        for i in range(3):
            x = x @ dynamics.weight[i][e] + dynamics.bias[i][e]
            x = x.relu() if i < 2 else x
        by_hand += x / 3
    torch.testing.assert_close(dynamics.predict(next_obs, act), next_obs + by_hand)


def test_reverse_model_undoes_the_step_of_a_linear_system():
    args, run = replace(ARGS, dynamics_epochs=60, dynamics_batch_size=64), FakeRun()
    obs, act, next_obs = linear_system()
    dynamics = m.ReverseDynamics(2, 1, args)
    before = m.one_step_error(dynamics, obs, act, next_obs)
    m.train_reverse_dynamics(dynamics, obs, act, next_obs, args, run)
    error = m.one_step_error(dynamics, obs, act, next_obs)
    assert error["one_step_rmse"] < 0.03 < 0.1 < before["one_step_rmse"] and error["explained_variance"] > 0.98
    torch.testing.assert_close(error["one_step_rmse"], (dynamics.predict(next_obs, act) - obs).square().mean().sqrt())


def test_bfloat16_model_is_close_and_learns_with_float32_weights():
    _, act, next_obs = linear_system(256)
    small = replace(ARGS, dynamics_layers=(64, 64))
    full, half = m.ReverseDynamics(2, 1, small), m.ReverseDynamics(2, 1, replace(small, dynamics_bf16=True))
    half.load_state_dict(full.state_dict())
    changes = []
    for dynamics in (full, half):
        dynamics(torch.cat([next_obs, act], 1).expand(3, -1, -1)).square().mean().backward()
        changes.append([w.grad for w in dynamics.weight])
        assert all(p.dtype == torch.float32 == p.grad.dtype for p in dynamics.parameters())
    for a, b in zip(*changes, strict=True):
        assert 0 < (a - b).norm() < 0.05 * a.norm()
    a, b = (dynamics.predict(next_obs, act) for dynamics in (full, half))
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.01 * a.abs().max()


def test_each_member_ends_with_a_copy_of_its_own_best_epoch():
    args, seen = replace(ARGS, dynamics_epochs=3, dynamics_batch_size=200), {}

    class Spoiler(FakeRun):
        def save(self, phase, step, **parts):
            seen[step] = [p.detach().clone() for p in dynamics.parameters()]
            if step == 1:  # from now on member 0 is lost, the others go on as before
                for p in dynamics.parameters():
                    p.data[0] = 100.0

    dynamics = m.ReverseDynamics(2, 1, args)
    m.train_reverse_dynamics(dynamics, *linear_system(), args, Spoiler())
    for i, p in enumerate(dynamics.parameters()):
        assert p[0].equal(seen[1][i][0]) and p[1:].equal(seen[3][i][1:])
    assert not dynamics.weight[0][1].equal(seen[1][0][1])


def test_each_member_sees_the_rows_in_an_order_of_its_own():
    args = replace(ARGS, dynamics_epochs=1, dynamics_batch_size=200)
    dynamics = m.ReverseDynamics(2, 1, args)
    for p in dynamics.parameters():
        p.data[:] = p.data[:1]  # members that differ in nothing else
    m.train_reverse_dynamics(dynamics, *linear_system(), args, FakeRun())
    assert all(not dynamics.weight[0][i].equal(dynamics.weight[0][j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_gradients_are_clipped_member_by_member():
    parameters = [torch.zeros(2, 1, 2), torch.zeros(2, 1, 1)]
    parameters[0].grad, parameters[1].grad = torch.tensor([[[3.0, 0.0]], [[0.3, 0.0]]]), torch.tensor([[[4.0]], [[0.4]]])
    m.clip_member_gradients(parameters, 1.0)  # norms 5 and 0.5
    torch.testing.assert_close(parameters[0].grad, torch.tensor([[[0.6, 0.0]], [[0.3, 0.0]]]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([[[0.8]], [[0.4]]]))


def test_optimizers_of_the_reverse_model():
    task = parse_task("maze2d-umaze")
    for name, kind, rate in (("sgd", torch.optim.SGD, 1e-4), ("adam", torch.optim.Adam, 1e-3)):
        opt = m.ReverseDynamics(2, 1, m.resolve(m.Args(dynamics_optimizer=name), task)).optimizer()
        assert type(opt) is kind and opt.param_groups[0]["lr"] == rate
        assert name == "adam" or (opt.param_groups[0]["nesterov"] and opt.param_groups[0]["momentum"] == 0.9)


# --- IQL ---


def agent(**changes):
    normalizer = m.Normalizer(torch.zeros(2, 4))  # mean 0, std 0.001
    normalizer.mean.fill_(5.0)
    normalizer.std.fill_(2.0)
    agent = m.IQL(normalizer, 4, 2, replace(ARGS, **changes), CPU)
    for p in agent.target_qf.parameters():
        p.add_(0.1)  # targets of their own
    return agent


def batch(n=12, terminated=0.0):
    rew = torch.cat([torch.ones(n // 2), torch.zeros(n - n // 2)])
    return torch.randn(n, 4), 2 * torch.rand(n, 2) - 1, rew, torch.randn(n, 4), torch.full((n,), terminated)


def test_expectile_loss_by_hand():
    assert m.expectile_loss(torch.tensor([2.0, -2.0]), 0.7).tolist() == pytest.approx([2.8, 1.2])
    u = torch.randn(100)
    torch.testing.assert_close(m.expectile_loss(u, 0.5), 0.5 * u.square())
    v = torch.tensor(0.7, requires_grad=True)
    m.expectile_loss(torch.tensor([0.0, 1.0]) - v, 0.7).mean().backward()
    assert v.grad.abs() < 1e-7  # the minimiser over a constant V of samples 0 and 1 is tau


def test_value_loss_by_hand():
    a, (obs, act, *_) = agent(), batch(3)
    loss, advantage = a.value_loss(obs, act)
    by_hand = 0.0
    for i in range(3):
        q = [f(torch.cat([obs[i], act[i]])).item() for f in (a.target_qf.q1, a.target_qf.q2)]
        u = min(q) - a.vf(obs[i]).item()
        assert advantage[i].item() == pytest.approx(u, abs=1e-5) and not advantage.requires_grad
        by_hand += (0.7 if u > 0 else 0.3) * u**2 / 3
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)


def test_critic_loss_by_hand_and_a_terminal_row_does_not_bootstrap():
    a, (obs, act, rew, _, terminated), next_v = agent(), batch(4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    terminated[3] = 1
    loss, _ = a.critic_loss(obs, act, rew, next_v, terminated)
    target = [1 + 0.99 * 1, 1 + 0.99 * 2, 0.99 * 3, 0.0]
    by_hand = sum((f(torch.cat([obs[i], act[i]])).item() - target[i]) ** 2 for i in range(4) for f in (a.qf.q1, a.qf.q2)) / 8
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)  # the mean of the two mean squares


def test_policy_loss_clones_the_expert_half_and_weighs_all_rows_by_advantage():
    a, (obs, act, *_) = agent(), batch()
    advantage = torch.linspace(-2, 5, 12)
    loss, clone = a.policy_loss(obs, act, advantage)
    mean, log_std = a.policy(obs)
    log_prob = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()).log_prob(act).sum(1).tolist()
    weight = [min(math.exp(3 * u), 100) for u in advantage.tolist()]
    assert weight[-1] == 100 and weight[0] < 0.01
    assert clone.item() == pytest.approx(-sum(log_prob[:6]) / 6, rel=1e-4)  # rows 0 to 5 are the expert's
    assert loss.item() == pytest.approx(clone.item() - sum(w * p for w, p in zip(weight, log_prob, strict=True)) / 12, rel=1e-4)
    double = agent(iql_weight=2.0)
    double.policy.load_state_dict(a.policy.state_dict())
    torch.testing.assert_close(double.policy_loss(obs, act, advantage)[0] - clone, 2 * (loss - clone))
    plain = agent(bc_weight=0.0)
    plain.policy.load_state_dict(a.policy.state_dict())
    torch.testing.assert_close(plain.policy_loss(obs, act, advantage)[0], loss - clone)
    loss.backward()
    assert a.policy.net[0].weight.grad.any()
    assert all(p.grad is None for p in [*a.qf.parameters(), *a.vf.parameters(), *a.target_qf.parameters()])


def test_update_is_v_q_target_policy_with_the_values_from_before():
    a, b, rows = agent(weight_decay=5e-3, learning_rate=0.05), agent(), batch()
    b.load_state_dict(a.state_dict())
    adam = {k: torch.optim.Adam(getattr(b, k).parameters(), lr=0.05, weight_decay=5e-3, fused=True) for k in ("vf", "qf", "policy")}
    obs, act, rew, next_obs, terminated = rows
    for step in range(3):
        next_v = b.vf(next_obs).squeeze(1).detach()
        advantage = (b.target_qf(obs, act).amin(0) - b.vf(obs).squeeze(1)).detach()
        target = [p.clone() for p in b.target_qf.parameters()]
        m.descend(adam["vf"], b.value_loss(obs, act)[0])
        m.descend(adam["qf"], b.critic_loss(obs, act, rew, next_v, terminated)[0])
        m.descend(adam["policy"], b.policy_loss(obs, act, advantage)[0])
        for old, new, slow in zip(target, b.qf.parameters(), b.target_qf.parameters(), strict=True):
            slow.copy_(old + 0.005 * (new.detach() - old))
        out = a.update(*rows, step)
    for name in ("vf", "qf", "policy", "target_qf"):
        for p, q in zip(getattr(a, name).parameters(), getattr(b, name).parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)
    assert {f"losses/{k}" for k in ("value", "critic", "policy", "clone")} <= out.keys() and not any(v.requires_grad for v in out.values())


def test_every_optimizer_moves_its_own_parameters():
    names = ("policy", "vf", "qf")
    for frozen in names:
        a = agent()
        a.set_rates = lambda step: None
        getattr(a, f"{frozen}_opt").param_groups[0]["lr"] = 0.0
        before = {k: [p.detach().clone() for p in getattr(a, k).parameters()] for k in names}
        a.update(*batch(), 0)
        moved = {k for k in names if any(not x.equal(y) for x, y in zip(before[k], getattr(a, k).parameters(), strict=True))}
        assert moved == set(names) - {frozen}


def test_without_iql_the_policy_only_clones_expert_rows():
    a, rows = agent(iql_weight=0.0), batch()
    others = [p.detach().clone() for p in [*a.qf.parameters(), *a.vf.parameters(), *a.target_qf.parameters()]]
    b = agent(iql_weight=0.0)
    b.load_state_dict(a.state_dict())
    a.update(*rows, 0)
    b.update(*(torch.cat([x[:6], torch.rand_like(x[6:])]) for x in rows), 0)  # another second half
    assert all(x.equal(y) for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True))
    assert all(x.equal(y) for x, y in zip(others, [*a.qf.parameters(), *a.vf.parameters(), *a.target_qf.parameters()], strict=True))


def test_acting_normalises_what_the_environment_shows():
    a, obs = agent(), torch.randn(3, 4)
    torch.testing.assert_close(a.act(obs), a.policy.net((obs - 5) / 2)[:, :2].tanh())
    b = m.IQL(m.Normalizer(torch.randn(9, 4)), 4, 2, ARGS, CPU)
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(b.act(obs), a.act(obs))  # the statistics are part of the state


def test_learning_rates_follow_the_codes_scheduler_and_its_drop():
    """The code steps a cosine multiplicatively, and at half-time writes a tenth of the policy's rate into all three optimizers."""
    a = agent(cosine_updates=50, learning_rate_drop=10)
    policy, q = (torch.optim.SGD([torch.zeros(1)], lr=1e-3) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(policy, 50)
    for step in range(20):
        if step == 10:
            policy.param_groups[0]["lr"] /= 10
            q.param_groups[0]["lr"] = policy.param_groups[0]["lr"]
        a.set_rates(step)
        have = [opt.param_groups[0]["lr"] for opt in (a.policy_opt, a.qf_opt, a.vf_opt)]
        assert have == pytest.approx([policy.param_groups[0]["lr"], q.param_groups[0]["lr"], q.param_groups[0]["lr"]])
        policy.step()
        scheduler.step()
    a = agent()  # no cosine, no drop
    a.set_rates(10**6)
    assert {opt.param_groups[0]["lr"] for opt in (a.policy_opt, a.qf_opt, a.vf_opt)} == {1e-3}


# --- settings ---


def resolved(env, **changes):
    return m.resolve(m.Args(**changes), parse_task(env))


def test_settings_of_the_tasks():
    for env, updates, rate, eta, h, policy, warmup, drop, rows in (
        ("maze2d-umaze", 200_000, 1e-3, 0.7, 5, "uniform", 0, 100_000, 1_000_000),  # 4 rounds
        ("maze2d-medium", 200_000, 1e-3, 0.5, 5, "uniform", 0, 100_000, 1_000_000),
        ("maze2d-large-dense", 200_000, 1e-3, 0.5, 5, "uniform", 0, 100_000, 1_000_000),
        ("hopper-medium", 500_000, 1e-4, 0.5, 5, "uniform", 200_000, 0, 666_666),  # 6 rounds
        *((f"{robot}-medium", 500_000, 1e-4, 0.1, 1, "cvae", 200_000, 0, 666_666) for robot in ("halfcheetah", "walker2d", "ant")),
    ):
        a = resolved(env)
        assert (a.total_updates, a.learning_rate, a.model_ratio, a.horizon, a.rollout_policy) == (updates, rate, eta, h, policy)
        assert (a.warmup, a.learning_rate_drop, a.rollout_rows, a.exp_name) == (warmup, drop, rows, "sra_iql")
    assert resolved("maze2d-umaze", total_updates=120_000).rollout_rows == 4_000_000 // 3  # rounds at 0, 50 000 and 100 000


def test_names_of_runs_without_the_model(capsys):
    assert resolved("maze2d-umaze", model_ratio=0.0).exp_name == "uds_iql"
    assert resolved("maze2d-umaze", iql_weight=0.0).exp_name == "bc_expert" and resolved("maze2d-umaze", iql_weight=0.0).model_ratio == 0
    assert not capsys.readouterr().err
    late = resolved("hopper-medium", total_updates=200_000)
    assert late.exp_name == "uds_iql" and "note: --warmup 200000 covers all" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, flag",
    [
        (dict(batch_size=511), "--batch-size 511"),
        (dict(total_updates=-5), "--total-updates -5"),
        (dict(rollout_every=0), "--rollout-every 0"),
        (dict(threshold_quantile=1.1), "--threshold-quantile 1.1"),
        (dict(expectile=1.0), "--expectile 1.0"),
        (dict(bc_weight=0.0, iql_weight=0.0), "--bc-weight 0 --iql-weight 0"),
        (dict(iql_weight=0.0, model_ratio=0.5), "--iql-weight 0"),
        (dict(total_updates=500_001), "--total-updates 500001: the policy stands still"),
        (dict(model_ratio=0.001), "--model-ratio 0.001"),
        (dict(augmented_rows=10), "--rollout-rows 2"),
        (dict(expert_trajectories=0), "--expert-trajectories 0"),
        (dict(dynamics_layers=(32, 0)), "--dynamics-layers 0"),
    ],
)
def test_settings_that_cannot_work(changes, flag):
    with pytest.raises(UserError, match=flag.replace("-", "[-]")):
        resolved("maze2d-umaze", **changes)


# --- demonstrations ---


def few_steps(monkeypatch):
    plain = utils._generate_maze2d
    monkeypatch.setattr(utils, "_generate_maze2d", lambda *args: plain(*args, "--steps", "3000"))


def test_maze_demonstrations_are_made_on_first_use(monkeypatch, capsys):
    few_steps(monkeypatch)
    task = parse_task("maze2d-umaze")
    data = load_dataset(task, "generated")
    expert = load_expert(task, "auto", 5, data)
    assert "making maze2d_umaze_expert.hdf5" in capsys.readouterr().err and expert.source == "generated"
    assert len(expert) == 1500 and int(expert.trajectory[-1]) == 4 and expert.has_next.all()  # the last successor is recorded, too
    facts = data.facts()
    assert facts["expert"]["trajectories"] == 5 and facts["expert"]["sha256"] == expert.sha256 != facts["sha256"]
    assert facts["transitions"] == len(data) and facts["expert"]["transitions"] == 1500
    monkeypatch.setattr(utils, "_generate_maze2d", None)  # not made a second time
    assert len(load_expert(task, "auto", 2, data)) == 600
    with pytest.raises(UserError, match=r"--expert-trajectories 11: .* has 10"):
        load_expert(task, "auto", 11, data)


@pytest.mark.skipif(not RECORDED.exists(), reason="recorded demonstrations are not shipped")
@pytest.mark.parametrize("name, mean", [("umaze", 226.90), ("umaze-dense", 238.49), ("medium", 420.43), ("medium-dense", 435.30)])
def test_recorded_demonstrations_load(name, mean):
    task, rows = parse_task(f"maze2d-{name}"), 300 if "umaze" in name else 600
    expert = load_expert(task, str(RECORDED / f"{name}.npz"), 100, load_expert_like(4, 2))
    assert len(expert) == 100 * (rows - 1)  # successors of last rows are not recorded
    assert expert.has_next.all() and not expert.terminated.any()
    assert len(load_expert(task, str(RECORDED / f"{name}.npz"), 5, load_expert_like(4, 2))) == 5 * (rows - 1)
    returns = torch.zeros(100).index_add_(0, expert.trajectory, expert.rew)
    assert returns.mean() == pytest.approx(mean - 1, abs=0.1)  # on the last row, which is dropped, every episode earns about 1
    gap = (expert.next_obs[:-1] - expert.obs[1:]).abs().amax(1)
    assert (gap > 0).sum() == 99 and not gap[expert.trajectory[:-1] == expert.trajectory[1:]].any()  # none crosses an episode's end


def load_expert_like(obs_dim, act_dim):
    """A data set of these widths, to stand beside."""
    return Dataset(torch.zeros(1, obs_dim), torch.zeros(1, act_dim), *[torch.zeros(1)] * 5, path="supplementary.hdf5")


@pytest.mark.skipif(not RECORDED.exists(), reason="recorded demonstrations are not shipped")
def test_made_demonstrations_are_like_the_recorded_ones():
    task = parse_task("maze2d-umaze")
    made = load_expert(task, "auto", 100, load_expert_like(4, 2))
    recorded = load_expert(task, str(RECORDED / "umaze.npz"), 100, load_expert_like(4, 2))
    returns = [torch.zeros(100).index_add_(0, x.trajectory, x.rew) for x in (made, recorded)]
    assert (made.trajectory.bincount() == 300).all()
    assert returns[0].mean() == pytest.approx(returns[1].mean().item(), abs=25)  # 3 standard errors of the difference; std 57
    seen = [{tuple(x) for x in (d.obs[:, :2] / 0.25).floor().int().tolist()} for d in (made, recorded)]
    assert len(seen[0] & seen[1]) / len(seen[0] | seen[1]) > 0.85  # cells of 0.25 m


def test_demonstrations_that_do_not_fit(tmp_path, data_file):  # noqa: F811
    hopper, maze = parse_task("hopper-medium"), parse_task("maze2d-umaze")
    with pytest.raises(UserError, match=r"observations of the expert have 11 entries, those of supplementary.hdf5 12"):
        load_expert(hopper, str(data_file), 5, load_expert_like(12, 3))
    with pytest.raises(UserError, match=r"observations have 11 entries, maze2d-umaze-v1 has 4"):
        load_expert(maze, str(data_file), 5, load_expert_like(4, 2))
    with pytest.raises(UserError, match=r"--expert-dataset auto: no data for hopper-expert .*--env hopper --kinds expert"):
        load_expert(hopper, "auto", 5, load_expert_like(11, 3))
    with pytest.raises(UserError, match="--expert-dataset auto: there are no demonstrations for antmaze-umaze"):
        load_expert(parse_task("antmaze-umaze"), "auto", 5, load_expert_like(29, 8))
    with pytest.raises(UserError, match=r"--expert-dataset none\.hdf5: no such file"):
        load_expert(hopper, "none.hdf5", 5, load_expert_like(11, 3))
    broken = tmp_path / "broken.npz"
    for content in (b"", b"<html>403 Forbidden</html>", b"PK\x03\x04 half an archive"):
        broken.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as npz"):
            load_expert(hopper, str(broken), 5, load_expert_like(11, 3))
    np.savez(broken, observations=np.zeros((3, 11)))
    with pytest.raises(UserError, match="has no array 'actions'"):
        load_expert(hopper, str(broken), 5, load_expert_like(11, 3))


def test_an_npz_file_is_read_like_an_hdf5_file(tmp_path, data_file):  # noqa: F811
    with h5py.File(data_file) as f:
        np.savez(tmp_path / "same.npz", **{k: f[k][()] for k in f})
    task = parse_task("hopper-medium")
    a, b = load_dataset(task, str(data_file)), load_dataset(task, str(tmp_path / "same.npz"))
    columns = [f.name for f in fields(a) if isinstance(getattr(a, f.name), torch.Tensor)]
    assert len(columns) == 7 and all(getattr(a, c).equal(getattr(b, c)) for c in columns)


def without_rewards(data_file, path):  # noqa: F811
    with h5py.File(data_file) as f, h5py.File(path, "w") as g:
        for k in f.keys() - {"rewards"}:
            g[k] = f[k][()]
    return path


def test_files_without_rewards_are_read(tmp_path, data_file):  # noqa: F811
    bare, task = str(without_rewards(data_file, tmp_path / "bare.hdf5")), parse_task("hopper-medium")
    a, b = load_dataset(task, str(data_file)), load_dataset(task, bare, rewards=False)
    assert a.rew.any() and not b.rew.any() and len(a) == len(b) and a.next_obs.equal(b.next_obs)
    assert load_dataset(task, str(data_file), rewards=False).rew.equal(a.rew)
    assert len(load_expert(task, bare, 2, b)) == len(load_expert(task, str(data_file), 2, a))
    with pytest.raises(UserError, match="has no array 'rewards'"):  # what learns from rewards does not take zeros for them
        load_dataset(task, bare)


# --- runs ---

SMALL = [
    "--env", "hopper-medium", "--total-updates", "60", "--batch-size", "20", "--hidden", "16", "--warmup", "0", "--rollout-every", "15",
    "--dynamics-hidden", "16", "--dynamics-max-epochs", "4", "--model-buffer-size", "4000", "--horizon", "3",
    "--rollout-policy", "cvae", "--vae-hidden", "16", "--rollout-policy-updates", "60", "--rollout-policy-batch-size", "20",
    "--eval-every", "30", "--eval-episodes", "2", "--log-every", "10", "--checkpoint-every", "20", "--num-threads", "1",
]  # fmt: skip
NAME = "hopper-medium-v2__{}__0__small"


def flags_for(data_file, run_dir, *flags):  # noqa: F811
    return [*SMALL, "--dataset", str(data_file), "--expert-dataset", str(data_file), "--run-dir", str(run_dir), *flags]


def here(data_file, run_dir, *flags):  # noqa: F811
    """The run in this process; its folder."""
    args = tyro.cli(m.Args, args=flags_for(data_file, run_dir, *flags))
    m.main(args)
    return Path(run_dir) / NAME.format(m.resolve(args, parse_task("hopper-medium")).exp_name)


def script(data_file, run_dir, *flags, patch=""):  # noqa: F811
    """The run through the command line, with a patch of the script before it starts."""
    head = f"import os, signal, sys, tyro; sys.path.insert(0, {str(ROOT / 'algorithms')!r}); import sra_iql as m\n"
    tail = "try: m.main(tyro.cli(m.Args))\nexcept m.UserError as e: sys.exit(e.report())"
    start = ["-c", head + patch + tail] if patch else [str(ROOT / "algorithms" / "sra_iql.py")]
    return subprocess.run([sys.executable, *start, *flags_for(data_file, run_dir, *flags)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(data_file, tmp_path_factory):  # noqa: F811
    """The run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole")
    done = script(data_file, run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir / NAME.format("sra_iql")


def test_smoke_run_leaves_what_the_contract_names(whole):
    config, result = (json.loads((whole / f"{n}.json").read_text()) for n in ("config", "result"))
    assert config["args"]["rollout_rows"] == 1000 and config["args"]["learning_rate"] == 1e-4  # resolved values
    assert result["updates"] == 60 and result["task"] == "hopper-medium-v2" and result["algorithm"] == "sra_iql"
    assert math.isfinite(result["normalized_score"]) and result["dataset"] == config["dataset"]
    expert = result["dataset"]["expert"]
    assert (expert["id"], expert["source"], expert["transitions"], expert["trajectories"]) == ("small", "file", 5 * 49 + 2, 5)
    rows = metrics(whole)
    assert [r["update"] for r in rows if "eval/return" in r] == [30, 60]
    assert [r["update"] for r in rows if "model/goals" in r] == [0, 15, 30, 45]
    assert [r["update"] for r in rows if "losses/policy" in r] == [10, 20, 30, 40, 50, 60]
    assert sum("model/epoch" in r for r in rows) == 4 and sum("model/expert_one_step_rmse" in r for r in rows) == 1
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert [step for step, _ in state["rollout_policies"]] == [0, 15, 30, 45]
    assert (whole / "checkpoint.pt").stat().st_size < 1_000_000  # policies of the rounds, not their rows
    assert not list(whole.glob("*.part"))


def test_a_run_killed_in_every_phase_equals_a_run_left_alone(whole, data_file, tmp_path):  # noqa: F811
    """One folder; every process kills itself a phase further on, after a checkpoint, with work done since that is lost."""
    die = "die = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
    log = "def log(self, u, x, plain=m.Run.log):\n    plain(self, u, x)\n    {} and die()\nm.Run.log = log\n"
    third = "n, plain = [], m.augment\ndef augment(*a):\n    n.append(1)\n    return plain(*a) if len(n) < 3 else die()\n"
    folder = tmp_path / whole.name
    for phase, patch in (
        ("dynamics", log.format("x.get('model/epoch') == 3")),
        ("rollout_policy", log.format("x.get('model/rollout_policy_update') == 50")),
        ("policy", third + "m.augment = augment\n"),  # in the round after update 30
        ("policy", log.format("u == 50")),
    ):
        killed = script(data_file, tmp_path, patch=die + patch)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["phase"] == phase and not (folder / "result.json").exists()
    done = script(data_file, tmp_path)
    assert done.returncode == 0 and "resumed at step 40 of policy" in done.stderr, done.stderr
    assert_same_run(whole, folder)


def test_finished_run_is_left_alone_and_another_one_is_not_overwritten(whole, data_file, capsys):  # noqa: F811
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    here(data_file, whole.parent)
    assert "finished" in capsys.readouterr().out
    for flag, value in (("--gamma", "0.9"), ("--expert-trajectories", "4"), ("--threshold", "mean")):
        with pytest.raises(UserError, match=f"another .*{flag}"):
            here(data_file, whole.parent, flag, value)
    with pytest.raises(UserError, match="another --rollout-rows"):  # more rounds would share the budget
        here(data_file, whole.parent, "--total-updates", "90")
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before


def test_more_updates_carry_a_run_on(whole, data_file, tmp_path):  # noqa: F811
    here(data_file, tmp_path, "--total-updates", "30", "--rollout-rows", "1000")
    folder = here(data_file, tmp_path, "--rollout-rows", "1000")
    x, y = weights(whole), weights(folder)
    assert x.keys() == y.keys() and not [k for k in x if not torch.equal(x[k], y[k])]


def test_control_without_augmentation_bit_for_bit(data_file, tmp_path):  # noqa: F811
    """eta = 0, a warm-up over all updates, and the learner alone, fed from both data sets, are the same."""
    flags = ("--eval-episodes", "0")
    control = here(data_file, tmp_path, *flags, "--model-ratio", "0")
    assert control.name == NAME.format("uds_iql") and not any(k.startswith(("model/", "eval/")) for row in metrics(control) for k in row)
    late = here(data_file, tmp_path / "late", *flags, "--warmup", "60")
    assert_same_run_of_the_learner(control, late)
    args = m.resolve(tyro.cli(m.Args, args=flags_for(data_file, tmp_path, *flags, "--model-ratio", "0")), parse_task("hopper-medium"))
    data = load_dataset(parse_task("hopper-medium"), str(data_file))
    expert = load_expert(parse_task("hopper-medium"), str(data_file), 5, data)
    normalizer = m.Normalizer(torch.cat([d.obs[d.has_next & (d.terminated == 0)] for d in (expert, data)]))
    torch.manual_seed(3)
    agent = m.IQL(normalizer, 11, 3, args, CPU)
    rows = [m.labelled(d, label, normalizer, CPU) for d, label in ((expert, 1.0), (data, 0.0))]
    for step in range(60):
        agent.update(*m.unpack(torch.cat([x[torch.randint(len(x), (10,))] for x in rows]), 11, 3), step)
    saved = leaves(torch.load(control / "checkpoint.pt", weights_only=True)["agent"])
    mine = {k: v for k, v in leaves(agent.state_dict()).items() if isinstance(v, torch.Tensor)}
    assert len(mine) > 40 and all(torch.equal(v, saved[k]) for k, v in mine.items())


def assert_same_run_of_the_learner(a, b):
    x, y = ({k: v for k, v in weights(f).items() if k.startswith("/agent")} for f in (a, b))
    assert x.keys() == y.keys() and len(x) > 40 and not [k for k in x if not torch.equal(x[k], y[k])]


def test_augmented_runs_share_the_warm_up_with_the_control(data_file, tmp_path):  # noqa: F811
    flags = ("--eval-episodes", "0", "--checkpoint-every", "100")
    logs = [metrics(here(data_file, tmp_path, *flags, *more)) for more in (("--model-ratio", "0"), ("--warmup", "30"))]
    control, late = ([r for r in rows if "losses/policy" in r] for rows in logs)
    assert control[:3] == late[:3] and control[3] != late[3]


@pytest.mark.parametrize("ratio, imagined", [(0.7, 179), (0.6, 154)])
def test_batches_are_split_exactly(data_file, tmp_path, monkeypatch, ratio, imagined):  # noqa: F811
    """256 expert rows, and of the others exactly round(256 eta) imagined; at 0.7 the code has 76 + 179."""
    counts, plain = set(), m.IQL.update

    def update(self, obs, act, rew, *rest):
        assert (rew[:256] == 1).all() and (rew[-imagined:] == 7).all()
        counts.add(tuple((rew == label).sum().item() for label in (1, 0, 7)))
        return plain(self, obs, act, rew, *rest)

    monkeypatch.setattr(m.IQL, "update", update)
    monkeypatch.setattr(m.AugmentedData, "__call__", lambda self, size: torch.full((size, 27), 7.0))
    here(data_file, tmp_path, "--batch-size", "512", "--model-ratio", str(ratio), "--eval-episodes", "0", "--rollout-policy", "uniform")
    assert counts == {(256, 256 - imagined, imagined)}


def test_a_model_is_taken_from_another_run(whole, data_file, tmp_path, capsys):  # noqa: F811
    flags = ("--dynamics-from", str(whole), "--exp-name", "borrowed")
    folder = here(data_file, tmp_path, *flags)
    assert not any("model/epoch" in row for row in metrics(folder.with_name(NAME.format("borrowed"))))
    assert_same_run_of_the_learner(whole, folder)
    with pytest.raises(UserError, match="its model has another data"):  # it has seen other demonstrations
        here(data_file, tmp_path / "other", *flags, "--expert-trajectories", "4")


def test_rounds_after_a_warm_up_and_batches_without_supplementary_rows(data_file, tmp_path, monkeypatch):  # noqa: F811
    asked, plain = [], m.confident_states
    monkeypatch.setattr(m, "confident_states", lambda policy, *a: (asked.append(a[:2]), plain(policy, *a))[1])
    flags = ("--warmup", "10", "--rollout-every", "15", "--model-ratio", "1", "--rollout-policy", "uniform", "--eval-episodes", "0")
    rows = metrics(here(data_file, tmp_path, *flags))
    assert [r["update"] for r in rows if "model/goals" in r] == [10, 25, 40, 55]
    last = rows[-1]
    assert any(k.startswith("q/") and k.endswith("_imagined") for k in last)
    assert not any(k.endswith("_supplementary") for k in last) and all(math.isfinite(v) for r in rows for v in r.values())
    task = parse_task("hopper-medium")
    data = load_dataset(task, str(data_file))
    expert = load_expert(task, str(data_file), 5, data)
    usable = [m.transitions(d).sum().item() for d in (expert, data)]
    assert [tuple(map(len, a)) for a in asked] == 4 * [tuple(usable)] and usable[0] < usable[1]


def test_denormal_numbers_are_flushed(data_file, tmp_path):  # noqa: F811
    torch.set_flush_denormal(False)
    tiny = torch.full((1000,), 1e-30)
    assert (tiny * 1e-10).all()
    here(data_file, tmp_path, "--model-ratio", "0", "--eval-episodes", "0", "--total-updates", "2")
    assert not (tiny * 1e-10).any()


def test_behaviour_cloning_run(data_file, tmp_path):  # noqa: F811
    flags = ("--iql-weight", "0", "--eval-episodes", "0")
    folder = here(without_rewards(data_file, tmp_path / data_file.name), tmp_path, *flags)
    last = metrics(folder)[-1]
    assert folder.name == NAME.format("bc_expert") and {k for k in last if "/" in k} == {"losses/policy", "losses/clone"}
    torch.manual_seed(3)
    args = m.resolve(tyro.cli(m.Args, args=flags_for(data_file, tmp_path, *flags)), parse_task("hopper-medium"))
    first, last = m.IQL(m.Normalizer(torch.zeros(2, 11)), 11, 3, args, CPU).state_dict(), torch.load(folder / "checkpoint.pt")["agent"]
    moved = {part: any(not x.equal(last[part][k]) for k, x in first[part].items()) for part in ("policy", "qf", "vf", "target_qf")}
    assert moved == {"policy": True, "qf": False, "vf": False, "target_qf": False}


def test_a_loss_that_is_not_finite_ends_the_run_with_status_3(data_file, tmp_path, monkeypatch):  # noqa: F811
    flags = ("--model-ratio", "0", "--eval-episodes", "0")
    folder = here(data_file, tmp_path, *flags, "--learning-rate-drop", "0", "--total-updates", "40")
    good, plain = (folder / "checkpoint.pt").read_bytes(), m.IQL.critic_loss
    monkeypatch.setattr(m.IQL, "critic_loss", lambda *args: (plain(*args)[0] * float("nan"), {}))
    with pytest.raises(UserError, match=r"losses/critic.* not finite at update 50") as e:
        here(data_file, tmp_path, *flags, "--learning-rate-drop", "0")
    assert e.value.status == 3 and (folder / "checkpoint.pt").read_bytes() == good


def test_missing_demonstrations_are_an_error_without_a_folder(data_file, tmp_path):  # noqa: F811
    done = script(data_file, tmp_path / "runs", "--expert-dataset", "auto")
    assert done.returncode == 2 and done.stderr.count("error: --expert-dataset auto") == 1 and "Traceback" not in done.stderr
    with pytest.raises(UserError, match=r"^--dataset absent\.hdf5"):  # the first thing that is wrong
        here(data_file, tmp_path / "runs", "--expert-dataset", "auto", "--dataset", "absent.hdf5")
    assert not (tmp_path / "runs").exists()


def test_a_run_on_a_maze_draws_where_it_imagines(tmp_path, monkeypatch):
    from PIL import Image

    few_steps(monkeypatch)
    flags = ["--env", "maze2d-umaze", "--dataset", "generated", "--run-dir", str(tmp_path), "--eval-every", "60"]
    m.main(tyro.cli(m.Args, args=[*SMALL[2:], "--rollout-policy", "uniform", *flags]))
    folder = tmp_path / "maze2d-umaze-v1__sra_iql__0__generated"
    drawn = sorted(p.name for p in folder.glob("*.png"))
    assert drawn == ["augmentation_0.png", "augmentation_15.png", "augmentation_30.png", "augmentation_45.png", "execution.png"]
    picture = np.asarray(Image.open(folder / "augmentation_0.png"))  # expert, supplementary, imagined: 5 cells of 60 pixels each
    assert picture.shape == (300, 900, 3)
    for i, colour in enumerate(((0, 0, 255), (105, 105, 105), (255, 0, 0))):
        dots = (picture == colour).all(-1)
        assert dots[:, 300 * i : 300 * (i + 1)].sum() > 200 and dots.sum() == dots[:, 300 * i : 300 * (i + 1)].sum()
    replayed = [row["model/replay_error_1"] for row in metrics(folder) if "model/replay_error_1" in row]
    assert len(replayed) == 4 and all(0 < x < 5 for x in replayed)
