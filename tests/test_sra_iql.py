"""Facts about SRA-IQL: confidence, goals, reverse rounds and IQL by hand; demonstrations; what its runs learn from."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import sra_iql as m
import torch
import tyro
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import utils
from utils import Dataset, UserError, load_dataset, load_expert, parse_task, unpack

RECORDED = Path(__file__).resolve().parents[2] / "shared" / "data" / "maze2d_expert"
CPU, HOPPER, UMAZE = torch.device("cpu"), parse_task("hopper-medium"), parse_task("maze2d-umaze")
LEARNER = dict(hidden=(16, 16), batch_size=12, learning_rate=1e-3, weight_decay=0)
LEARNER |= dict(learning_rate_drop=0, cosine_updates=0)
MODEL = dict(dynamics_layers=(32,), dynamics_learning_rate=1e-3, dynamics_optimizer="adam", ensemble_size=3)
ROUND = dict(horizon=3, rollout_rows=600, rollout_batch_size=100, model_ratio=0.7, rollout_policy="uniform")
ARGS = m.Args(exp_name="test", **LEARNER, **MODEL, **ROUND)
uniform = m.train_reverse_policy(torch.zeros(1, 3), torch.zeros(1, 2), ARGS, None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class FakeRun:
    """As much of a Run as training loops need, without a folder; `begin` and `end` are called around every step."""

    begin = end = staticmethod(lambda step, parts: None)

    def steps(self, phase, total, every, **parts):
        self.rows = []
        for step in range(1, total + 1):
            self.begin(step, parts)
            yield step
            self.end(step, parts)

    def log(self, update, row):
        self.rows.append(row)


def as_set(rows):
    return {tuple(row) for row in rows.tolist()}


def log_prob_of(mean, log_std, act):
    """Log-density of the tanh-squashed Gaussian, by torch.distributions: (B,)"""
    return TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()).log_prob(act).sum(1)


def test_labels_are_1_for_the_expert_and_0_for_all_others_whatever_the_rewards():
    obs, flags = torch.arange(12.0).view(6, 2), [torch.tensor([0, 0, 1.0, 0, 0, 0]), torch.arange(6) != 3]
    data = Dataset(obs, torch.rand(6, 1), torch.randn(6), torch.randn(6, 2), *flags, torch.zeros(6).long())
    normalizer = m.Normalizer(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))  # mean (1, 1), std 1.001; 1 if constant
    used = [0, 1, 4, 5]  # row 2 ended the MDP, the successor of row 3 is unknown
    for label in (1.0, 0.0):
        obs, act, rew, next_obs, terminated = unpack(m.labelled(data, label, normalizer, CPU), 2, 1)
        assert rew.tolist() == [label] * 4 and not terminated.any() and act.equal(data.act[used])
        torch.testing.assert_close(obs, (data.obs[used] - 1) / torch.tensor([1.001, 1.0]))
        torch.testing.assert_close(normalizer.inverse(next_obs), data.next_obs[used], atol=1e-5, rtol=1e-5)


# --- confidence and goals ---


def test_log_confidence_by_hand():
    policy = m.ClampedPolicy(3, 2, (16, 16))
    obs, some = torch.randn(25_000, 3), [0, 9_999, 10_000, 24_999]
    torch.testing.assert_close(policy.log_confidence(obs)[some], policy.log_confidence(obs[some]))  # in chunks
    policy.net[-1].weight.data.zero_()
    half_log = 0.5 * math.log(2 * math.pi)
    for mean, log_std in (((0.5, -1.2), (-0.3, 0.4)), ((50.0, -1000.0), (-40.0, -6.0))):
        policy.net[-1].bias.data = torch.tensor([*mean, *log_std])
        mean, log_std = [max(-9, min(9, x)) for x in mean], [max(-5, min(2, x)) for x in log_std]
        volume = [2 * math.log(2) - 2 * abs(x) - 2 * math.log1p(math.exp(-2 * abs(x))) for x in mean]  # 1 - tanh(x)^2
        by_hand = sum(-s - half_log - v for s, v in zip(log_std, volume, strict=True))
        torch.testing.assert_close(policy.log_confidence(obs[:4]), torch.full((4,), by_hand))


def test_goals_exceed_a_quantile_of_the_expert_states_and_are_capped():
    def goals_of(expert, supplementary, **changes):
        policy = SimpleNamespace(log_confidence=lambda obs: obs[:, 0])
        return m.confident_states(policy, expert, supplementary, replace(ARGS, **changes))

    def states(*log_conf):
        return torch.stack([torch.tensor(log_conf), torch.arange(len(log_conf)).float()], 1)

    expert, supplementary = states(0.0, 1.0, 2.0, 3.0, 4.0), states(3.2, 3.1, 9.0, -1.0, 5.0, 3.3)
    goals, threshold = goals_of(expert, supplementary)
    assert threshold == pytest.approx(3.2) and as_set(goals) == as_set(supplementary[[2, 4, 5]])  # above it, not on it
    sets = [as_set(goals_of(expert, supplementary, threshold_quantile=x)[0]) for x in (0.0, 0.2, 0.5, 0.8, 0.9, 1.0)]
    assert all(higher <= lower for lower, higher in zip(sets, sets[1:], strict=False))
    many = torch.stack([torch.linspace(-1, 10, 100), torch.zeros(100)], 1)[torch.randperm(100)]
    goals, _ = goals_of(expert, many, goal_cap=2)
    assert as_set(goals) == as_set(many[many[:, 0].argsort()[-10:]])  # 2 x 5, the most confident
    goals, threshold = goals_of(states(0.0, math.log(3)), states(0.6, 0.7, 1.0), threshold="mean")  # as on the slides
    assert threshold == pytest.approx(math.log(2)) and len(goals) == 2  # the mean of 1 and 3; of the logarithms 0.55
    goals, threshold = goals_of(states(300.0, 310.0), states(305.0, 310.0), threshold="mean")  # Conf overflows
    assert threshold == pytest.approx(310 - math.log(2), abs=1e-3) and goals[:, 0].tolist() == [310.0]


# --- rounds ---


def test_resampling_prefers_the_unsure_with_odds_1_over_confidence():
    def share_of_the_first(log_conf, n):
        return sum(m.resample(torch.tensor(log_conf), 1).item() == 0 for _ in range(n)) / n

    assert share_of_the_first([0.0, math.log(3)], 4_000) == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 4_000) ** 0.5)
    assert share_of_the_first([300.0, 200.0], 100) == 0  # exp overflows float32; 1 / inf = 0 for both were no odds
    unsure = share_of_the_first([-100.0, -50.0], 4_000)  # both weigh 1e5: the 1e-5 in the denominator
    assert unsure == pytest.approx(0.5, abs=4 * (0.25 / 4_000) ** 0.5)
    assert sorted(m.resample(torch.randn(50), 50).tolist()) == list(range(50))  # without replacement


@pytest.mark.parametrize("chunk", [100, 7])
def test_every_row_of_a_round_leads_to_a_goal_or_to_a_kept_state(chunk):
    args, goals, asked = replace(ARGS, rollout_batch_size=chunk), torch.randn(50, 3), []
    dynamics = m.ReverseDynamics(3, 2, args)

    def starts(n):
        asked.append(n)
        return m.draw(goals, n)

    rows, stats = m.augment(starts, m.ClampedPolicy(3, 2, (16, 16)), dynamics, uniform, args)
    obs, act, rew, next_obs, terminated = unpack(rows, 3, 2)
    assert len(obs) == 600 and asked == [400]  # 2 x 600 / 3 candidates for the first step, and only it starts at goals
    assert not rew.any() and not terminated.any() and act.abs().max() <= 1 and act.min() < -0.9
    torch.testing.assert_close(obs, dynamics.predict(next_obs, act))
    assert len(as_set(torch.cat([obs, act], -1))) == 600  # no candidate is kept twice
    obs, next_obs = obs.view(3, 200, -1), next_obs.view(3, 200, -1)
    assert as_set(next_obs[0]) <= as_set(goals)
    for i in (1, 2):
        assert as_set(next_obs[i]) <= as_set(obs[i - 1]) and not as_set(next_obs[i]) & as_set(goals)
    assert stats["model/log_confidence_kept"] < stats["model/log_confidence_imagined"]


def augmented(args, expert, supplementary, rounds=0):
    policy = m.ClampedPolicy(3, 2, args.hidden)
    data = m.AugmentedData(expert, supplementary, policy, m.ReverseDynamics(3, 2, args), uniform, args)
    return data, [data.add(10 * i, m.ClampedPolicy(3, 2, args.hidden).state_dict()) for i in range(rounds)]


def test_rounds_fill_the_budget_and_a_batch_mixes_old_and_new_rows_70_to_30():
    expert, supplementary, args = torch.randn(20, 3), torch.randn(100, 3), replace(ARGS, rollout_rows=605)
    (first, _), (third, stats) = (augmented(args, expert, supplementary, n) for n in (1, 3))
    assert first.older is None and len(first.new) == 603 and len(first(100)) == 100  # S // h h rows a round
    assert len(third.older) + len(third.new) == 3 * 603
    third.older[:], third.new[:] = 1.0, 2.0
    batch = third(179)[:, 0]
    assert len(batch) == 179 and (batch == 2).sum() == 54 and (batch == 1).sum() == 125  # round(0.3 x 179)
    assert all(0 < row["model/goals"] <= 100 for row in stats)
    assert len(third.goals) == sum(row["model/goals"] for row in stats)  # every selection stays in the start pool


def test_a_round_starts_at_expert_states_at_goals_of_earlier_rounds_and_at_its_own(monkeypatch):
    goals = iter([torch.full((5, 3), 10.0), torch.full((4, 3), 20.0)])
    monkeypatch.setattr(m, "confident_states", lambda *_: (next(goals), torch.tensor(0.0)))
    args = replace(ARGS, horizon=1, rollout_rows=1000, oversampling=1)  # every candidate is kept
    data, _ = augmented(args, torch.full((20, 3), 1.0), torch.full((100, 3), 2.0))
    assert (m.start_states(1000, data.expert, data.goals, data.goals, args) == 1).all()  # no goals but the expert's
    for shares in ([900, 0, 100, 0], [900, 0, 70, 30]):  # exact, and goals of its own in the first round, too
        data.add(10, data.policy.state_dict())
        ends = unpack(data.new, 3, 2)[3][:, 0]
        assert [(ends == x).sum().item() for x in (1, 2, 10, 20)] == shares


def test_rounds_are_made_again_from_their_policies():
    expert, supplementary = torch.randn(20, 3), torch.randn(100, 3)
    data, _ = augmented(ARGS, expert, supplementary, 3)
    torch.manual_seed(1)
    again = m.AugmentedData(expert, supplementary, m.ClampedPolicy(3, 2, ARGS.hidden), *data.models, ARGS)
    before = torch.get_rng_state()
    again.load_state_dict(data.state_dict())
    assert again.new.equal(data.new) and again.older.equal(data.older) and again.goals.equal(data.goals)
    assert [step for step, _ in again.state_dict()["rounds"]] == [0, 10, 20]
    assert not as_set(again.new) & as_set(again.older)  # each round has random numbers of its own
    for step in (30, 40):
        data.add(step, data.rounds[0][1])
    assert torch.get_rng_state().equal(before)  # and none of the learner's
    assert not as_set(data.new) & as_set(data.older[-600:])  # not even with the same policy
    with pytest.raises(UserError, match="not finite") as e:  # of a model that has diverged
        augmented(ARGS, torch.full((20, 3), 3e38), supplementary, 1)
    assert e.value.status == 3


def test_on_a_maze_it_is_drawn_and_replayed_where_a_round_imagines(tmp_path):
    from PIL import Image

    expert, obs = torch.rand(600, 4), torch.rand(900, 4)
    obs[:300, 2:] = 0.0
    groups = expert, expert, obs, torch.zeros(900, 2), obs, lambda x: x + torch.tensor([1.0, 1, 0, 0])
    stats = utils.describe_augmentation(UMAZE, *groups, tmp_path, 15)
    assert stats["model/imagined_at_rest"] == pytest.approx(1 / 3, abs=0.02) and 0 < stats["model/replay_error_1"] < 3
    far = torch.cdist(obs, expert).amin(1).median().item()
    assert stats["model/distance_to_expert"].item() == pytest.approx(far, abs=0.01)
    picture = np.asarray(Image.open(tmp_path / "augmentation_15.png"))
    assert picture.shape == (300, 900, 3)  # three views of 5 cells of 60 pixels each, expert, supplementary, imagined
    dots = [(picture == colour).all(-1).nonzero()[1] // 300 for colour in ((0, 0, 255), (105, 105, 105), (255, 0, 0))]
    assert [set(x.tolist()) for x in dots] == [{0}, {1}, {2}] and min(map(len, dots)) > 200


# --- reverse model ---


def linear_system(n=2000):
    obs, act = torch.randn(n, 2), 2 * torch.rand(n, 1) - 1
    return obs, act, obs @ torch.tensor([[1.0, 0.1], [0.0, 0.9]]) + act * torch.tensor([0.3, -0.2])


def test_prediction_is_next_state_plus_the_mean_of_the_members():
    dynamics = m.ReverseDynamics(3, 2, replace(ARGS, dynamics_layers=(8, 8)))
    next_obs, act, by_hand = torch.randn(205, 3), torch.randn(205, 2), torch.zeros(205, 3)
    for e in range(3):
        x = torch.cat([next_obs, act], 1)
        for i in range(3):
            x = x @ dynamics.weight[i][e] + dynamics.bias[i][e]
            x = x.relu() if i < 2 else x
        by_hand += x / 3
    torch.testing.assert_close(dynamics.predict(next_obs, act), next_obs + by_hand)
    dynamics.args = replace(dynamics.args, dynamics_bf16=True)
    error = (dynamics.predict(next_obs, act) - next_obs - by_hand).abs()
    assert error.dtype == torch.float32 and 0 < error.max() < 0.02 * by_hand.abs().max()


def test_reverse_model_undoes_the_step_of_a_linear_system():
    args, run = replace(ARGS, dynamics_epochs=40, dynamics_batch_size=64), FakeRun()
    obs, act, next_obs = linear_system()
    dynamics = m.train_reverse_dynamics(obs, act, next_obs, args, run)
    error = (dynamics.predict(next_obs, act) - obs).square().mean()
    assert error.sqrt() < 0.03 < 0.1 < (next_obs - obs).std()
    explained = run.rows[-1]["model/explained_variance"]
    torch.testing.assert_close(explained, 1 - error / (obs - next_obs).var(0, unbiased=False).mean())
    assert explained > run.rows[-1]["model/explained_variance_worst"] > 0.9


def test_each_member_keeps_its_own_best_epoch_and_has_an_order_of_its_own():
    seen = []

    def alike(epoch, parts):  # members that differ in nothing else
        for p in parts["current"].parameters():
            p.data[:] = p.data[:1] if epoch == 1 else p.data

    def spoil(epoch, parts):
        seen.append([p.detach().clone() for p in parts["current"].parameters()])
        if epoch == 1:  # from now on member 0 is lost, the others go on as before
            for p in parts["current"].parameters():
                p.data[0] = 100.0

    run, args = FakeRun(), replace(ARGS, dynamics_epochs=3, dynamics_batch_size=200)
    run.begin, run.end = alike, spoil
    dynamics = m.train_reverse_dynamics(*linear_system(), args, run)
    for i, p in enumerate(dynamics.parameters()):
        assert p[0].equal(seen[0][i][0]) and p[1:].equal(seen[2][i][1:]) and not p[1].equal(seen[0][i][1])
    assert all(not seen[0][0][i].equal(seen[0][0][j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_gradients_are_clipped_member_by_member():
    parameters = [torch.zeros(2, 1, 2), torch.zeros(2, 1, 1)]
    parameters[0].grad, parameters[1].grad = torch.tensor([[[3.0, 0]], [[0.3, 0]]]), torch.tensor([[[4.0]], [[0.4]]])
    m.clip_member_gradients(parameters, 1.0)  # norms 5 and 0.5
    torch.testing.assert_close(parameters[0].grad, torch.tensor([[[0.6, 0]], [[0.3, 0]]]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([[[0.8]], [[0.4]]]))


# --- IQL and its settings ---


def agent(learner=m.IQL, args=ARGS, **changes):
    """A small learner whose targets are targets of their own."""
    normalizer = m.Normalizer(torch.zeros(2, 4))
    normalizer.mean.fill_(5.0)
    normalizer.std.fill_(2.0)
    a = learner(normalizer, 4, 2, replace(args, **changes), CPU)
    for name in ("target_qf", "target_policy"):
        for p in getattr(a, name).parameters() if hasattr(a, name) else ():
            p.add_(0.1)
    return a


def copied(a, **changes):
    """A learner with the state of another one."""
    b = agent(type(a), a.args, **changes)
    for name, part in b.parts.items():
        part.load_state_dict(deepcopy(a.parts[name].state_dict()))
    return b


def batch(n=12, terminated=0.0):
    rew = torch.cat([torch.ones(n // 2), torch.zeros(n - n // 2)])
    return torch.randn(n, 4), 2 * torch.rand(n, 2) - 1, rew, torch.randn(n, 4), torch.full((n,), terminated)


def parameters(a, *names):
    return {name: [p.detach().clone() for p in getattr(a, name).parameters()] for name in names}


def moved(before, a):
    pairs = {k: zip(x, getattr(a, k).parameters(), strict=True) for k, x in before.items()}
    return {k for k, pair in pairs.items() if any(not p.equal(q) for p, q in pair)}


def assert_close(a, b, *names, tolerance=1e-5):
    for name in names:
        for x, y in zip(getattr(a, name).parameters(), getattr(b, name).parameters(), strict=True):
            torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


def adam(*networks):
    return [torch.optim.Adam(f.parameters(), lr=0.05, weight_decay=5e-3, fused=True) for f in networks]


def follow(target, online, tau=0.005):
    for slow, p in zip(target.parameters(), online.parameters(), strict=True):
        slow.copy_(slow + tau * (p.detach() - slow))


def test_value_and_critic_loss_by_hand_and_a_terminal_row_does_not_bootstrap():
    a, (obs, act, rew, _, terminated), next_v = agent(), batch(4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    terminated[3] = 1
    assert m.expectile_loss(torch.tensor([2.0, -2.0]), 0.7).tolist() == pytest.approx([2.8, 1.2])
    value_loss, advantage = a.value_loss(obs, act)
    critic_loss, stats = a.critic_loss(obs, act, rew, next_v, terminated)
    value = critic = 0.0
    for i, target in enumerate([1 + 0.99 * 1, 1 + 0.99 * 2, 0.99 * 3, 0.0]):
        x = torch.cat([obs[i], act[i]])
        u = min(a.target_qf.q1(x).item(), a.target_qf.q2(x).item()) - a.vf(obs[i]).item()
        assert advantage[i].item() == pytest.approx(u, abs=1e-5) and not advantage.requires_grad
        value += (0.7 if u > 0 else 0.3) * u**2 / 4
        critic += ((a.qf.q1(x).item() - target) ** 2 + (a.qf.q2(x).item() - target) ** 2) / 8
    assert value_loss.item() == pytest.approx(value, rel=1e-4) and critic_loss.item() == pytest.approx(critic, rel=1e-4)
    assert stats["q/expert"] == a.qf(obs, act)[:, :2].mean() and stats["q/others"] == a.qf(obs, act)[:, 2:].mean()


def test_policy_loss_clones_the_expert_half_and_weighs_all_rows_by_advantage():
    a, (obs, act, *_), advantage = agent(), batch(), torch.linspace(-2, 5, 12)
    _, stats = a.policy_loss(obs, act, advantage)
    log_prob, weight = log_prob_of(*a.policy(obs), act), (3 * advantage).exp().clamp(max=100)
    clone = -log_prob[:6].mean()  # rows 0 to 5 are the expert's
    assert weight[-1] == 100 and weight[0] < 0.01 and stats["q/weight"].item() == pytest.approx(weight.mean().item())
    for iql_weight in (1.0, 2.0):
        loss = copied(a, iql_weight=iql_weight).policy_loss(obs, act, advantage)[0]
        torch.testing.assert_close(loss, clone - iql_weight * (weight * log_prob).mean(), rtol=1e-4, atol=1e-4)
    loss, _ = a.policy_loss(obs, act, advantage)
    loss.backward()
    assert a.policy.net[0].weight.grad.any()
    assert all(p.grad is None for p in [*a.qf.parameters(), *a.vf.parameters(), *a.target_qf.parameters()])


def test_update_is_v_q_target_policy_with_the_values_from_before():
    a, rows = agent(weight_decay=5e-3, learning_rate=0.05), batch()
    obs, act, rew, next_obs, terminated = rows
    b = copied(a)
    vf_opt, qf_opt, policy_opt = adam(b.vf, b.qf, b.policy)
    for step in (1, 2, 3):
        next_v = b.vf(next_obs).squeeze(1).detach()
        advantage = (b.target_qf(obs, act).amin(0) - b.vf(obs).squeeze(1)).detach()
        m.descend(vf_opt, b.value_loss(obs, act)[0])
        m.descend(qf_opt, b.critic_loss(obs, act, rew, next_v, terminated)[0])
        m.descend(policy_opt, b.policy_loss(obs, act, advantage)[0])
        follow(b.target_qf, b.qf)
        a.update(*rows, step)
    assert_close(a, b, "vf", "qf", "policy", "target_qf")


def test_without_iql_the_policy_only_clones_expert_rows():
    a, rows = agent(iql_weight=0.0), batch()
    b, before = copied(a), parameters(a, "policy", "qf", "vf", "target_qf")
    a.update(*rows, 1)
    b.update(*(torch.cat([x[:6], torch.rand_like(x[6:])]) for x in rows), 1)  # another second half
    assert not moved(parameters(a, "policy"), b) and moved(before, a) == {"policy"}


def resolved(env, script=m, **changes):
    return script.resolve(script.Args(**changes), parse_task(env))


def test_settings_of_the_tasks(capsys):
    maze, robot = (200_000, 1e-3, 5, "uniform", 0, 100_000, 1_000_000), (500_000, 1e-4, 1, "cvae", 200_000, 0, 666_666)
    names = "total_updates learning_rate horizon rollout_policy warmup learning_rate_drop rollout_rows".split()
    expected = {"maze2d-umaze": (0.7, *maze), "maze2d-large-dense": (0.5, *maze), "ant-medium": (0.1, *robot)}
    for env, row in expected.items():
        a = resolved(env)  # of 4 or 6 rounds
        assert (a.model_ratio, *(getattr(a, name) for name in names)) == row and a.exp_name == "sra_iql"
    assert resolved("maze2d-umaze", total_updates=120_000).rollout_rows == 4_000_000 // 3  # after 0, 50 000 and 100 000
    assert resolved("maze2d-umaze", iql_weight=0.0).exp_name == "bc_expert" and not capsys.readouterr().err
    assert resolved("hopper-medium", total_updates=200_000).exp_name == "uds_iql"
    assert "note: --warmup 200000 covers all" in capsys.readouterr().err


WRONG = {"batch_size": 511, "total_updates": 500_001, "rollout_every": 0, "threshold_quantile": 1.1, "expectile": 1.0}
WRONG |= {"model_ratio": 0.001, "expert_trajectories": 0, "dynamics_layers": (32, 0), "inverse_temperature": math.nan}
WRONG = [({k: v}, k) for k, v in WRONG.items()] + [(dict(augmented_rows=10), "rollout_rows")]
WRONG += [(dict(iql_weight=0.0, model_ratio=0.5), "iql_weight"), (dict(iql_weight=0.0, bc_weight=0.0), "iql_weight")]


@pytest.mark.parametrize("changes, name", WRONG)
def test_settings_that_cannot_work(changes, name):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
        resolved("maze2d-umaze", **changes)


# --- demonstrations and runs ---


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """A hopper-like file: 40 episodes of 50 steps, some terminal, some cut by the clock."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "small.hdf5"
    obs, ends = rng.normal(size=(2000, 11)).cumsum(0) * 0.01, np.arange(2000) % 50 == 49
    obs[:, 0], terminals = 1.2, ends & (np.arange(2000) % 100 == 99)
    with h5py.File(path, "w") as f:
        f["observations"], f["actions"] = obs.astype("f4"), rng.uniform(-1, 1, (2000, 3)).astype("f4")
        f["rewards"], f["terminals"], f["timeouts"] = rng.normal(size=2000).astype("f4"), terminals, ends & ~terminals
    return path


def test_maze_demonstrations_are_made_on_first_use_and_are_like_the_recorded_ones(capsys):
    data = Dataset(torch.zeros(1, 4), torch.zeros(1, 2), *[torch.zeros(1)] * 5)
    sources = ["auto"] + RECORDED.exists() * [str(RECORDED / "umaze.npz")]
    made, *recorded = experts = [load_expert(UMAZE, x, 100, data) for x in sources]
    assert "generating maze2d_umaze_expert.hdf5" in capsys.readouterr().err and made.source == "generated"
    assert len(made) == 100 * 300 and all(len(d) == 100 * 299 for d in recorded)  # last successors are not recorded
    assert len(few := load_expert(UMAZE, "auto", 5, data)) == 1500 and not capsys.readouterr().err  # made once
    assert data.facts()["expert"] == few.facts() | {"trajectories": 5}
    for d in experts:
        gap = (d.next_obs[:-1] - d.obs[1:]).abs().amax(1)
        assert not gap[d.trajectory[:-1] == d.trajectory[1:]].any() and d.has_next.all()
        assert torch.zeros(100).index_add_(0, d.trajectory, d.rew).mean() == pytest.approx(220, abs=25)  # its std: 57
    with pytest.raises(UserError, match=r"--expert-trajectories 101: .* has 100"):
        load_expert(UMAZE, "auto", 101, data)


def without_rewards(data_file, path):
    with h5py.File(data_file) as f, h5py.File(path, "w") as g:
        for k in f.keys() - {"rewards"}:
            g[k] = f[k][()]
    return path


SMALL = """--env hopper-medium --total-updates 60 --batch-size 20 --hidden 16 --warmup 0 --rollout-every 15 --horizon 3
    --dynamics-hidden 16 --dynamics-max-epochs 4 --model-buffer-size 4000 --rollout-policy cvae --vae-hidden 16
    --rollout-policy-updates 60 --rollout-policy-batch-size 20 --eval-every 30 --eval-episodes 2 --log-every 10
    --checkpoint-every 20 --num-threads 1""".split()


def arguments(script, data_file, run_dir, *flags):
    own = ["--num-critics", "3"] if hasattr(script.Args, "num_critics") else []
    data = ["--dataset", str(data_file), "--expert-dataset", str(data_file), "--run-dir", str(run_dir)]
    return tyro.cli(script.Args, args=[*SMALL, *own, *data, *flags])


def here(data_file, run_dir, *flags, script=m):
    """The run in this process; its folder."""
    args = arguments(script, data_file, run_dir, *flags)
    script.main(args)
    return Path(run_dir) / f"hopper-medium-v2__{script.resolve(args, HOPPER).exp_name}__0__small"


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows]


def test_batches_are_split_exactly(data_file, tmp_path, monkeypatch):
    """256 expert rows, and of the others exactly round(256 eta) imagined; at 0.7 the code has 76 + 179."""
    counts, plain = set(), m.IQL.update

    def update(self, obs, act, rew, *rest):
        assert (rew[:256] == 1).all() and (rew[-179:] == 7).all()
        counts.add(tuple((rew == label).sum().item() for label in (1, 0, 7)))
        return plain(self, obs, act, rew, *rest)

    monkeypatch.setattr(m.IQL, "update", update)
    monkeypatch.setattr(m.AugmentedData, "__call__", lambda self, size: torch.full((size, 27), 7.0))
    flags = ("--batch-size", "512", "--model-ratio", "0.7", "--rollout-policy", "uniform", "--eval-episodes", "0")
    here(data_file, tmp_path, *flags)
    assert counts == {(256, 77, 179)}


def test_rounds_after_a_warm_up_and_what_model_and_policy_learn_from(data_file, tmp_path, monkeypatch):
    seen = {}
    for name in ("confident_states", "train_reverse_dynamics", "train_reverse_policy"):
        plain = getattr(m, name)
        monkeypatch.setattr(m, name, lambda *a, f=plain, k=name: (seen.setdefault(k, []).append(a), f(*a))[1])
    flags = ("--warmup", "10", "--model-ratio", "1", "--rollout-policy", "uniform", "--eval-episodes", "0")
    rows = metrics(here(data_file, tmp_path, *flags))  # a batch without supplementary rows
    assert [r["update"] for r in rows if "model/goals" in r] == [10, 25, 40, 55]
    data = load_dataset(HOPPER, str(data_file))
    expert = load_expert(HOPPER, str(data_file), 5, data)
    usable = [m.usable(d).sum().item() for d in (expert, data)]
    assert [tuple(map(len, a[1:3])) for a in seen["confident_states"]] == 4 * [tuple(usable)] and usable[0] < usable[1]
    (obs, act, next_obs, *_), (cond, same, *_) = seen["train_reverse_dynamics"][0], seen["train_reverse_policy"][0]
    rows = torch.cat([torch.cat([d.obs, d.act, d.next_obs], 1)[m.usable(d)] for d in (expert, data)])  # of both
    scale = m.Normalizer(rows[:, :11])
    torch.testing.assert_close(torch.cat([scale.inverse(obs), act, scale.inverse(next_obs)], 1), rows)
    assert cond.equal(next_obs) and same.equal(act)  # a from s'


def test_constant_columns_are_not_blown_up():
    obs = torch.cat([torch.randn(100, 1), torch.full((100, 1), 0.1)], 1)
    normalizer = m.Normalizer(obs)
    assert normalizer.std[1] == 1 and normalizer.std[0] == obs[:, 0].std(unbiased=False) + 1e-3
