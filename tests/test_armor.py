"""Facts about ARMOR: losses, rollouts, reference policies and resumed runs against numbers worked by hand (spec 8d)."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import armor as m
import pytest
import torch
import tyro
from test_runs import ROOT, assert_same_run, data_file, folder_of, metrics  # noqa: F401 - data_file is a fixture
from test_sra_siblings import compute_losses_twice
from torch.distributions import Normal

from utils import Dataset, UserError, parse_task

CPU = torch.device("cpu")
HOPPER = parse_task("hopper-medium-replay")
ARGS = m.Args(
    exp_name="test", dynamics_hidden=16, hidden=(16, 16), batch_size=20, horizon=5, pairs_kept=100, reference="bc", bellman_weight=4.0,
    fit_weight=1.0, num_threads=1,
)  # fmt: skip
ATAC = replace(ARGS, model_ratio=0.0, reference="data")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def never(obs, act, next_obs):
    return torch.zeros(len(obs), dtype=torch.bool)


def batch(n=10):
    return torch.randn(n, 2), 2 * torch.rand(n, 2) - 1, torch.randn(n), torch.randn(n, 2), (torch.rand(n) < 0.3).float()


def game(args=ARGS, terminates=never, v_max=1.0):
    """Both players over two-dimensional states and actions, with a reference, and what an update takes."""
    agent = m.ARMOR(2, 2, args, CPU, (-50.0, 50.0), m.Dynamics(2, 2, args), terminates, v_max)
    agent.reference = m.Reference({"policy": m.Policy(2, 2, args.hidden).state_dict()})
    return agent, (*batch(), torch.ones(10), torch.randn(10, 4))


def copies(agent):
    nets = {"policy": agent.policy, "qf": agent.qf, "target_qf": agent.target_qf, "log_alpha": agent.log_alpha, "dynamics": agent.dynamics}
    return {f"{k}.{name}": p.detach().clone() for k, net in nets.items() for name, p in net.named_parameters()}


def changed(before, agent):
    return {k.split(".")[0] for k, p in copies(agent).items() if not torch.equal(p, before[k])}


def adversary_gradients(agent, rows, noise=3):
    """Gradients of l^adversary for critics and model, on fixed noise: {name: gradient or None}."""
    obs, act, rew, next_obs, terminated, known, pairs = rows
    obs, act = torch.cat([obs, pairs[:, :2]]), torch.cat([act, pairs[:, 2:]])
    torch.manual_seed(noise)
    pi_act, ref_act = 2 * torch.rand(20, 2) - 1, 2 * torch.rand(20, 2) - 1
    loss, metrics = agent.adversary_loss(obs, act, pi_act, ref_act, rew, next_obs, terminated, known)
    names, params = zip(*[*agent.qf.named_parameters(prefix="qf"), *agent.dynamics.named_parameters(prefix="dynamics")], strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params, allow_unused=True), strict=True)), metrics


def of_model(gradients):
    return torch.cat([g.flatten() for k, g in gradients.items() if k.startswith("dynamics.") and g is not None])


def constant_model(dynamics, mean, logvar=-30.0):
    """M says (r, s' - s) = mean everywhere, almost without noise."""
    with torch.no_grad():
        dynamics.weight[-1].zero_()
        dynamics.bias[-1].copy_(torch.cat([torch.tensor(mean), torch.full((3,), logvar)]))
        dynamics.min_logvar.fill_(-40.0)


# --- losses (spec 8d) ---


@pytest.mark.parametrize("beta, value", [(16.0, 3 / 16 + 2), (0.5, 3 + 0.5 * 2), (1.0, 5.0)])
def test_normalized_sum_points_where_the_plain_sum_does(beta, value):
    x = torch.tensor([3.0, 2.0], requires_grad=True)
    out = m.normalized_sum(x[0], x[1], torch.tensor(beta))
    assert out.item() == pytest.approx(value)
    (gradient,) = torch.autograd.grad(out, x)
    assert gradient[1] / gradient[0] == pytest.approx(beta) and gradient.max() == 1


def test_bellman_error_halves_by_hand():
    q, backup = torch.tensor([[2.0], [5.0]], requires_grad=True), torch.tensor([[1.0], [5.0]], requires_grad=True)
    error = m.bellman_error(q, backup, torch.tensor([4.0]), 0.5)
    assert error.tolist() == [2.5, 0.5]  # 1/2 (2-1)^2 + 1/2 (2-4)^2, and 0 + 1/2 (5-4)^2
    gradients = torch.autograd.grad(error.sum(), (q, backup))
    assert gradients[0].flatten().tolist() == [1 - 2, 0 + 1] and gradients[1].flatten().tolist() == [-1, 0]
    assert m.bellman_error(q, backup, torch.tensor([4.0]), 1.0).tolist() == [4.0, 1.0]  # w weighs the target half


def test_data_fit_is_the_likelihood_of_known_successors_and_a_scaled_reward_error():
    mean, logvar, obs, next_obs = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)
    rew, known = torch.randn(4), torch.tensor([1.0, 0.0, 1.0, 1.0])
    log_p = Normal(obs + mean[:, 1:], (0.5 * logvar[:, 1:]).exp()).log_prob(next_obs).sum(-1)
    expected = (-log_p + ((mean[:, 0] - rew) / 5) ** 2)[[0, 2, 3]].mean()
    torch.testing.assert_close(m.data_fit(mean, logvar, obs, rew, next_obs, known, 5.0), expected)
    assert m.data_fit(mean, logvar, obs, rew, next_obs, torch.zeros(4), 5.0) == 0  # no known row: no gradient, no NaN


def test_projection_shrinks_long_weights_and_nothing_else():
    agent, _ = game()
    for p, norm in zip(agent.qf.parameters(), (250.0, 250.0, 50.0, 1.0) * 3, strict=True):
        torch.nn.init.ones_(p).data.mul_(norm / p.numel() ** 0.5)
    before = [p.detach().clone() for p in agent.qf.parameters()]
    agent.adversary_opt.param_groups[0]["lr"] = 0.0
    largest = agent.step_critics(agent.qf(*batch()[:2]).mean(), list(agent.qf.parameters()))
    assert largest.item() == pytest.approx(250)
    for i, (p, old) in enumerate(zip(agent.qf.parameters(), before, strict=True)):
        if p.ndim == 2 and old.norm() > 100:
            assert p.norm().item() == pytest.approx(100, rel=1e-6)
            torch.testing.assert_close(p / p.norm(), old / old.norm())
        else:
            assert torch.equal(p, old), i
    assert sum(p.ndim == 2 and old.norm() > 100 for p, old in zip(agent.qf.parameters(), before, strict=True)) >= 2


def test_values_are_clipped_to_what_rewards_allow():
    assert m.value_range(torch.tensor([-1.0, 3.0]), 0.9) == pytest.approx((-10, 30))
    assert m.value_range(torch.tensor([-3.0, -2.0]), 0.9) == pytest.approx((-30, 0))
    assert m.value_range(torch.tensor([0.0, 0.2]), 0.9) == pytest.approx((-8, 2))  # not narrower than 1 / (1 - gamma)
    agent = m.ARMOR(2, 2, replace(ATAC, gamma=0.5, target_weight=1.0), CPU, (-1.0, 2.0))
    obs, act, rew, next_obs, _ = batch()
    for value, clipped in ((9.0, 2.0), (-9.0, -1.0), (1.5, 1.5)):
        for q in (agent.target_qf.q1, agent.target_qf.q2):
            torch.nn.init.zeros_(q[-1].weight)
            torch.nn.init.constant_(q[-1].bias, value)
        torch.nn.init.constant_(agent.target_qf.q1[-1].bias, value + 0.1)  # the smaller one counts
        bellman, q = agent.bellman(obs, act, rew, next_obs, torch.tensor([1.0] + [0.0] * 9))
        target = rew + 0.5 * clipped * torch.tensor([0.0] + [1.0] * 9)  # the first row is terminal
        torch.testing.assert_close(bellman, (q - target).square().mean(1))


def test_atac_loss_by_hand_uses_the_datas_rewards_successors_and_actions():
    agent, rows = m.ARMOR(2, 2, ATAC, CPU, (-50.0, 50.0)), batch(20)
    obs, act, rew, next_obs, terminated = rows
    pi_act = 2 * torch.rand(20, 2) - 1
    torch.manual_seed(1)
    loss, metrics = agent.adversary_loss(obs, act, pi_act, None, *rows[2:], None)
    torch.manual_seed(1)
    mean, log_std = agent.policy(next_obs)
    next_act = (mean + log_std.exp() * torch.randn(20, 2)).tanh()
    expected = 0
    for q, target_q in ((agent.qf.q1, 0), (agent.qf.q2, 1)):
        value = lambda s, a, q=q: q(torch.cat([s, a], -1)).squeeze(-1)  # noqa: E731
        backup = rew + 0.99 * (1 - terminated) * value(next_obs, next_act)
        target_q = rew + 0.99 * (1 - terminated) * agent.target_qf(next_obs, next_act).min(0).values
        error = 0.5 * (value(obs, act) - backup).square().mean() + 0.5 * (value(obs, act) - target_q).square().mean()
        expected += (value(obs, pi_act) - value(obs, act)).mean() / 4 + error  # beta = 4
    torch.testing.assert_close(loss, expected)
    assert metrics["q/reference"] == metrics["q/data"]
    agent.reference = m.Reference({"policy": m.Policy(2, 2, (8,)).state_dict()})  # ATAC against another policy
    metrics = agent.update(*rows)
    assert metrics["q/reference"] != metrics["q/data"]


def test_armor_loss_and_its_gradients_by_hand():
    """The adversary's whole loss (Eq. 4) against one written out: signs, means over all of D_M, what is differentiated through what."""
    agent, rows = game()  # beta = 4, lambda = 1
    for p in agent.target_qf.parameters():  # else they are the critics, and which of the two is asked would not matter
        p.data.add_(0.1 * torch.randn_like(p))
    obs, act = torch.cat([rows[0], rows[-1][:, :2]]), torch.cat([rows[1], rows[-1][:, 2:]])
    pi_act, ref_act = 2 * torch.rand(20, 2) - 1, 2 * torch.rand(20, 2) - 1
    torch.manual_seed(1)
    loss, metrics = agent.adversary_loss(obs, act, pi_act, ref_act, *rows[2:6])
    torch.manual_seed(1)
    mean, logvar = m.gaussian(agent.dynamics, obs, act)
    next_obs = obs + mean[:, 1:] + (0.5 * logvar[:, 1:]).exp() * torch.randn(20, 2)
    pre_tanh, log_std = agent.policy(next_obs)
    next_act = (pre_tanh + log_std.exp() * torch.randn(20, 2)).tanh()
    target = mean[:, 0] + 0.99 * agent.target_qf(next_obs, next_act).amin(0)
    fit = m.data_fit(mean[:10], logvar[:10], *(rows[i] for i in (0, 2, 3, 5)), 1.0)
    expected = 0
    for q in (agent.qf.q1, agent.qf.q2):
        value = lambda s, a, q=q: q(torch.cat([s, a], -1)).squeeze(-1)  # noqa: E731
        backup = mean[:, 0] + 0.99 * value(next_obs, next_act)
        error = 0.5 * (value(obs, act) - backup).square().mean() + 0.5 * (value(obs, act) - target).square().mean()
        expected += (value(obs, pi_act) - value(obs, ref_act)).mean() / 4 + error + fit
    params = [*agent.qf.parameters(), *agent.dynamics.weight, *agent.dynamics.bias]
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(x, params, retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    q1 = agent.qf.q1(torch.cat([torch.cat([obs, obs]), torch.cat([pi_act, ref_act])], -1)).squeeze(-1)
    assert metrics["losses/relative"].item() == pytest.approx((q1[:20].mean() - q1[20:].mean()).item(), abs=1e-6)


@pytest.mark.parametrize("alpha, of_q, of_entropy", [(3.0, 1 / 3, 1.0), (0.5, 1.0, 0.5)])
def test_policies_are_paid_for_entropy(alpha, of_q, of_entropy, monkeypatch):
    agent, rows = game()
    obs, act = rows[0], rows[1]
    log_prob = torch.randn(10, requires_grad=True)
    loss = agent.policy_loss(obs, act, log_prob, torch.tensor(alpha))
    expected = -of_q * agent.qf.q1(torch.cat([obs, act], -1)).mean() + of_entropy * log_prob.mean()
    torch.testing.assert_close(loss, expected)
    assert (torch.autograd.grad(loss, log_prob)[0] > 0).all()  # a less certain policy is a better one
    seen = []
    monkeypatch.setattr(agent, "step_alpha", lambda log_prob: torch.tensor(alpha))
    monkeypatch.setattr(m, "descend", lambda opt, loss, inputs=None: seen.append((opt, loss)))
    torch.manual_seed(1)
    agent.warm_up(*rows[:5], act)
    torch.manual_seed(1)
    torch.randn(10, 2)  # the critics' next actions
    mean, log_std = agent.policy(obs)
    sampled = m.squash(mean, log_std, torch.randn(10, 2))[1].mean()
    cloned = -m.squashed_log_prob(mean, log_std, act).mean()
    assert seen[-1][0] is agent.policy_opt
    torch.testing.assert_close(seen[-1][1], of_q * cloned + of_entropy * sampled)


# --- the guard on the model ---


def test_fit_and_shift_of_the_model_by_hand():
    dynamics, original = m.Dynamics(2, 2, ARGS), m.Dynamics(2, 2, ARGS)
    constant_model(dynamics, [1.0, 0.5, 0.0], 2 * math.log(0.5))
    constant_model(original, [0.8, 0.5, 0.3], 2 * math.log(0.5))
    with torch.no_grad():
        for net in (dynamics, original):
            net.max_logvar.fill_(20.0)
    obs, act = torch.zeros(4, 2), torch.zeros(4, 2)
    fit = m.model_fit(dynamics, obs, act, torch.tensor([1.0, 1.0, 1.0, 3.0]), torch.tensor([[0.5, 0.0]]).expand(4, 2))
    assert fit["model/reward_error"].item() == pytest.approx(1.0, rel=1e-4)  # root of 2^2 / 4
    assert fit["model/state_error"].item() == pytest.approx(0, abs=1e-4)
    assert fit["model/nll"].item() == pytest.approx(2 * (math.log(0.5) + 0.5 * math.log(2 * math.pi)), rel=1e-4)
    r = m.Rollouts(torch.tensor([[0.0, 7.0], [4.0, 7.0]]), 2, 3, never, ARGS, CPU)  # second column: constant, not divided by 0
    r.advance(0, torch.zeros(3, 2), Slope(0.5), Slope(0.5), dynamics)
    f_1 = SimpleNamespace(q1=lambda x: x[:, :2] @ torch.tensor([[2.0], [10.0]]) + 100)
    critic = SimpleNamespace(qf=f_1, policy=Slope(0.5), terminates=never, args=replace(ARGS, gamma=0.9))
    shift = m.model_shift(dynamics, original, r, critic)
    assert shift["model/reward_shift"].item() == pytest.approx(0.2, rel=1e-4)
    assert shift["model/state_shift"].item() == pytest.approx((0.3**2 / 2) ** 0.5, rel=1e-4)
    assert shift["model/backup_shift"].item() == pytest.approx(0.2 - 0.9 * 10 * 0.3, rel=1e-4)
    critic.terminates = lambda obs, act, next_obs: next_obs[:, 1] > 0.2  # under the fitted model alone
    assert m.model_shift(dynamics, original, r, critic)["model/backup_shift"].item() == pytest.approx(0.2 + 0.9 * (2 * 0.5 + 100), rel=1e-4)


def test_return_shift_by_hand():
    dynamics, original = m.Dynamics(2, 2, ARGS), m.Dynamics(2, 2, ARGS)
    constant_model(dynamics, [1.0, 0.5, 0.0], -20.0)
    constant_model(original, [0.8, 0.5, 0.3], -20.0)
    agent = SimpleNamespace(policy=Slope(0.5), terminates=never, args=replace(ARGS, gamma=0.9, horizon=1000))
    obs, before = torch.zeros(4, 2), torch.get_rng_state()
    value = lambda steps: (1 - 0.9**steps) / 0.1  # of a reward of 1 a step  # noqa: E731
    shift = lambda: m.return_shift(dynamics, original, obs, agent, (-20.0, 20.0))["model/return_shift"].item()  # noqa: E731
    assert shift() == pytest.approx(0.2 * value(20), rel=1e-4)
    assert torch.equal(torch.get_rng_state(), before)  # looking changes no run
    agent.terminates = lambda obs, act, next_obs: next_obs[:, 1] > 0.5  # under the fitted model alone, with its second step
    assert shift() == pytest.approx(value(20) - 0.8 * value(2), rel=1e-4)
    agent.args = replace(agent.args, horizon=5)
    assert shift() == pytest.approx(value(5) - 0.8 * value(2), rel=1e-4)
    constant_model(dynamics, [1e9, 0.5, 0.0], -20.0)  # a rollout that runs away
    assert shift() == pytest.approx(20 - 0.8 * value(2), rel=1e-4)
    constant_model(dynamics, [math.nan, 0.5, 0.0], -20.0)
    assert shift() == pytest.approx(-20 - 0.8 * value(2), rel=1e-4)


# --- who gets which gradient ---


def test_relative_pessimism_gives_the_model_no_gradient():
    agent, rows = game(replace(ARGS, bellman_weight=0.0))
    gradients, _ = adversary_gradients(agent, rows)
    assert (of_model(gradients) == 0).all() and gradients["qf.q1.0.weight"].abs().sum() > 0


def test_the_bellman_error_reaches_the_model_through_reward_state_and_noise():
    agent, rows = game(replace(ARGS, fit_weight=0.0))
    last = adversary_gradients(agent, rows)[0]["dynamics.bias.4"].flatten()  # mean of r, s' (2), then log-variance of r, s' (2)
    assert (last[[0, 1, 2, 4, 5]] != 0).all() and last[3] == 0  # R_M is a mean: its variance does not matter
    agent.args = replace(agent.args, gamma=0.0)  # nothing but the reward is left
    last = adversary_gradients(agent, rows)[0]["dynamics.bias.4"].flatten()
    assert last[0] != 0 and (last[1:] == 0).all()


def test_with_a_large_lambda_the_model_steps_where_maximum_likelihood_does():
    agent, rows = game(v_max=0.7)
    obs, act, rew, next_obs = rows[:4]
    fit = m.data_fit(*m.gaussian(agent.dynamics, obs, act), obs, rew, next_obs, torch.ones(10), 0.7)
    likelihood = torch.autograd.grad(fit, [*agent.dynamics.weight, *agent.dynamics.bias])
    likelihood = torch.cat([g.flatten() for g in likelihood])
    cosines, mine = [], None
    for fit_weight in (0.0, 1.0, 1e6):
        agent.args = replace(agent.args, fit_weight=fit_weight)
        gradients, _ = adversary_gradients(agent, rows)
        mine = torch.cat([g.flatten() for k, g in gradients.items() if k.startswith(("dynamics.weight", "dynamics.bias"))])
        cosines.append(torch.cosine_similarity(mine, likelihood, dim=0).item())
    assert cosines[0] < cosines[1] < cosines[2] and cosines[2] == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(mine / 2e6, likelihood, rtol=1e-2, atol=1e-3)  # once with either critic (Alg. 1, l. 5)


def test_the_same_actions_are_no_gap_and_no_pressure_on_the_critics():
    agent, rows = game(replace(ARGS, bellman_weight=0.0))
    obs, act = torch.cat([rows[0], rows[-1][:, :2]]), torch.cat([rows[1], rows[-1][:, 2:]])
    same = 2 * torch.rand(20, 2) - 1
    loss, metrics = agent.adversary_loss(obs, act, same, same.clone(), *rows[2:6])
    assert metrics["losses/relative"] == 0 and loss == 0
    gradients = torch.autograd.grad(loss, list(agent.qf.parameters()))
    assert all(g.abs().max() < 1e-7 for g in gradients)


def test_players_move_their_own_networks_only(monkeypatch):
    agent, rows = game(replace(ARGS, slow_lr=1e-3))
    bounds = agent.dynamics.max_logvar.detach().clone(), agent.dynamics.min_logvar.detach().clone()
    moved, plain = [], m.descend

    def descend(opt, loss, inputs=None):
        before = copies(agent)
        plain(opt, loss, inputs)
        moved.append(changed(before, agent))

    monkeypatch.setattr(m, "descend", descend)
    for _ in range(3):
        agent.update(*rows)
    assert moved == 3 * [{"qf", "dynamics"}, {"log_alpha"}, {"policy"}]
    assert torch.equal(bounds[0], agent.dynamics.max_logvar) and torch.equal(bounds[1], agent.dynamics.min_logvar)
    moved.clear()
    agent.warm_up(*rows[:5], rows[1])
    assert moved == [{"qf"}, {"log_alpha"}, {"policy"}]
    # targets follow outside of every graph: else they would carry gradients to the critics, and every update would lengthen the graph
    assert all(p.grad_fn is None and p.grad is None and not p.requires_grad for p in agent.target_qf.parameters())
    assert all(p.grad is None for p in agent.reference.parameters())


def test_targets_follow_at_rate_tau_after_the_critics_step():
    agent, rows = game()
    before = [p.clone() for p in agent.target_qf.parameters()]
    agent.update(*rows)
    for old, target, online in zip(before, agent.target_qf.parameters(), agent.qf.parameters(), strict=True):
        torch.testing.assert_close(target, 0.995 * old + 0.005 * online.detach())


def test_critics_see_the_model_instead_of_the_datas_rewards_and_successors(monkeypatch):
    ends = lambda obs, act, next_obs: next_obs[:, 0] > 0  # noqa: E731
    agent, rows = game(terminates=ends)
    constant_model(agent.dynamics, [7.0, 1.0, -2.0])
    seen = []
    monkeypatch.setattr(agent, "bellman", lambda *a: (seen.append(a), m.ARMOR.bellman(agent, *a))[1])
    agent.update(*rows)
    obs, act, rew, next_obs, terminated, others = seen[0]
    assert torch.equal(obs, torch.cat([rows[0], rows[-1][:, :2]])) and torch.equal(act, torch.cat([rows[1], rows[-1][:, 2:]]))
    assert (rew == 7).all() and len(others) == 2
    torch.testing.assert_close(next_obs, obs + torch.tensor([1.0, -2.0]))
    assert torch.equal(terminated > 0, next_obs[:, 0] > 0) and 0 < terminated.sum() < 20


@pytest.mark.parametrize("args", [ARGS, ATAC], ids=["armor", "atac"])
def test_bfloat16_is_close_update_after_update(args, monkeypatch):
    """No update works with stale copies of weights; the model stays float32 without its own flag."""
    args = replace(args, hidden=(16, 16, 16), fast_lr=0.01, slow_lr=0.01, tau=0.5)
    made = (lambda args: game(args)[0]) if args.model_ratio else (lambda args: m.ARMOR(2, 2, args, CPU))
    agents = [made(replace(args, bf16=bf16)) for bf16 in (False, True)]
    agents[1].load_state_dict(agents[0].state_dict())
    agents[1].reference = agents[0].reference
    compute_losses_twice(agents[1], monkeypatch, "bellman", "adversary_loss", "policy_loss")
    rows = (*batch(64), torch.ones(64), torch.randn(64, 4)) if args.model_ratio else batch(64)
    fit = []
    for step in range(5):
        out = []
        for agent in agents:
            torch.manual_seed(step)
            metrics = agent.update(*rows)
            fit.append(metrics.get("losses/data_fit"))
            out.append(torch.stack(list(metrics.values())))
        torch.testing.assert_close(*out, rtol=0.05, atol=0.05)
        assert (out[0] != out[1]).any() and out[1].dtype == torch.float32
    assert fit[0] == fit[1]  # the same model, and not rounded
    with agents[1].autocast():
        q = agents[1].qf(*rows[:2])
    assert q.dtype == torch.float32 and (q != q.bfloat16()).any()  # the last layer is not rounded


def test_the_actor_climbs_the_first_critic():
    agent, rows = game(replace(ARGS, slow_lr=1e-2, target_entropy=-50.0))
    for q, sign in ((agent.qf.q1, 1.0), (agent.qf.q2, -1.0)):  # Q_1 likes large first actions, Q_2 small ones
        with torch.no_grad():
            for p in q.parameters():
                p.zero_()
            q[0].weight[0, 2], q[0].bias[0], q[2].weight[0, 0], q[4].weight[0, 0] = sign, 2.0, 1.0, 30.0
    agent.adversary_opt.param_groups[0]["lr"] = 0.0
    before = agent.act(rows[0]).mean(0)
    for _ in range(60):
        agent.update(*rows)
    assert agent.act(rows[0]).mean(0)[0] > before[0] + 0.1


def test_temperature_rises_when_entropy_is_below_its_target():
    for target, sign in ((50.0, 1), (-50.0, -1)):
        agent, rows = game(replace(ARGS, target_entropy=target))
        agent.update(*rows)
        assert math.copysign(1, agent.log_alpha["sac"].item()) == sign


def test_the_game_begins_with_a_slow_policy_and_a_new_temperature():
    agent, rows = game()
    for _ in range(3):
        agent.warm_up(*rows[:5], rows[1])
    assert agent.policy_opt.param_groups[0]["lr"] == 5e-4 and agent.log_alpha["sac"] != 0 and agent.policy_opt.state
    agent.begin_game()
    assert agent.policy_opt.param_groups[0]["lr"] == 5e-7 and agent.log_alpha["sac"].exp() == 1
    assert not agent.policy_opt.state and not agent.alpha_opt.state and agent.alpha_opt.param_groups[0]["lr"] == 5e-4
    assert agent.adversary_opt.state[agent.qf.q1[0].weight]["step"] == 3  # the critics' part goes on
    assert {g["lr"] for g in agent.adversary_opt.param_groups} == {5e-4}
    decays, outputs = [g["weight_decay"] for g in agent.adversary_opt.param_groups], agent.dynamics.max_logvar.numel()
    assert decays == [0, *(outputs * wd for wd in (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)), 0]
    for beta, weight in ((4.0, 100.0), (0.5, 50.0)):  # it keeps pace with the data fit, which counts as lambda min(1, beta)
        other, _ = game(replace(ARGS, fit_weight=100.0, bellman_weight=beta))
        assert [g["weight_decay"] for g in other.adversary_opt.param_groups] == pytest.approx([weight * d for d in decays])
    before = agent.policy.net[0].weight.detach().clone()
    agent.update(*rows)
    assert 0 < (agent.policy.net[0].weight - before).abs().max() < 6e-7


def test_the_model_begins_the_game_slowly_and_rests_without_bellman_error():
    agent, rows = game()
    for update, rate in ((0, 1e-6), (249, 2.5e-4), (499, 5e-4), (9_999, 5e-4)):
        agent.ramp_model(update)
        assert [g["lr"] for g in agent.adversary_opt.param_groups] == [5e-4, *[pytest.approx(rate)] * 6]
    agent.ramp_model(0)
    before = [w.detach().clone() for w in agent.dynamics.weight]
    agent.update(*rows)
    assert 0 < max((w - b).abs().max() for w, b in zip(agent.dynamics.weight, before, strict=True)) < 1.1e-6
    agent, rows = game(replace(ARGS, bellman_weight=0.0))
    before = [w.detach().clone() for w in agent.dynamics.weight]
    agent.update(*rows)  # or the weight decay alone would take Adam's full steps
    assert all(torch.equal(w, b) for w, b in zip(agent.dynamics.weight, before, strict=True))


def test_warm_start_clones_the_given_actions_and_learns_their_values():
    agent = m.ARMOR(2, 2, replace(ATAC, fast_lr=3e-3, hidden=(32, 32)), CPU, (-50.0, 50.0))
    target = torch.tensor([0.5, -0.3])
    for _ in range(400):
        obs, _, _, next_obs, _ = batch(64)
        agent.warm_up(obs, target.expand(64, 2), torch.ones(64), next_obs, torch.ones(64), target.expand(64, 2))
    obs = torch.randn(50, 2)
    torch.testing.assert_close(agent.act(obs).mean(0), target, atol=0.1, rtol=0)
    assert agent.qf(obs, target.expand(50, 2)).mean().item() == pytest.approx(1, abs=0.1)  # every transition is terminal, reward 1


# --- rollouts ---


class Slope:
    """A policy and a reference: tanh of the state times a number, almost without noise."""

    def __init__(self, slope):
        self.slope = slope

    def __call__(self, obs):
        return self.slope * obs, torch.full_like(obs, -30.0)

    def sample(self, obs):
        return (self.slope * obs).tanh()


def rollouts(step=(0.0, 0.25, 0.0), terminates=never, **flags):
    """Rollouts from 3 starts in data that spans [-1, 1]^2; M moves every state by `step`[1:]."""
    args = replace(ARGS, rollout_margin=1e6, **flags) if "rollout_margin" not in flags else replace(ARGS, **flags)
    dynamics = m.Dynamics(2, 2, args)
    constant_model(dynamics, list(step))
    return m.Rollouts(torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]), 2, 3, terminates, args, CPU), dynamics


def test_rollouts_restart_every_h_updates_and_follow_the_model_between():
    r, dynamics = rollouts(horizon=4)
    for k in range(9):
        starts = torch.rand(3, 2) + 10 * k
        r.states[3:] += 0.1  # the two sets of states need not agree
        old = r.states.clone()
        r.advance(k, starts, Slope(0.5), Slope(-0.25), dynamics)
        pairs = r.pairs[6 * k : 6 * k + 6]
        begin = starts.repeat(2, 1) if k % 4 == 0 else old
        assert torch.equal(pairs[:, :2], begin)  # the states that the actions were taken in
        torch.testing.assert_close(pairs[:, 2:], torch.cat([0.5 * begin[:3], -0.25 * begin[3:]]).tanh())  # pi, then pi_ref
        torch.testing.assert_close(r.states, begin + torch.tensor([0.25, 0.0]))
    assert r.added == 54 and not r.states.requires_grad
    assert all(p.grad is None for p in dynamics.parameters())


def test_rollout_noise_is_the_models():
    args = replace(ARGS, rollout_margin=1e6)
    dynamics = m.Dynamics(2, 2, args)
    constant_model(dynamics, [0.0, 1.0, 0.0], 2 * math.log(0.3))
    with torch.no_grad():
        dynamics.max_logvar.fill_(10.0)
    r = m.Rollouts(torch.randn(9, 2), 2, 4000, never, args, CPU)
    r.advance(0, torch.zeros(4000, 2), Slope(0.5), Slope(0.5), dynamics)
    assert r.states.std(0).tolist() == pytest.approx([0.3, 0.3], rel=0.05) and r.states.mean(0).tolist() == pytest.approx([1, 0], abs=0.02)


def test_rollouts_that_ended_or_overflowed_begin_again_in_the_minibatch():
    ends = lambda obs, act, next_obs: next_obs[:, 0] > 2  # noqa: E731
    r, dynamics = rollouts(terminates=ends)
    first, second = torch.tensor([[1.9, 0.0], [0.0, 0.0], [math.inf, 0.0]]), torch.tensor([[5.0, 0.0], [6.0, 0.0], [7.0, 0.0]])
    r.states = first.repeat(2, 1)
    r.advance(1, second, Slope(0.5), Slope(0.5), dynamics)
    torch.testing.assert_close(r.states, torch.tensor([[5.0, 0.0], [0.25, 0.0], [7.0, 0.0]]).repeat(2, 1))
    assert r.report()["model/rollout_ended"].item() == pytest.approx(2 / 3)
    r.states[0] = math.nan  # no rule of termination sees this one
    r.advance(2, second, Slope(0.5), Slope(0.5), dynamics)
    assert r.states[0].tolist() == [5.0, 0.0]


def test_rollouts_that_leave_the_data_begin_again_and_their_drift_is_counted():
    ends = lambda obs, act, next_obs: next_obs[:, 0] > 2  # noqa: E731
    r, dynamics = rollouts(step=(0.0, 0.9, 0.0), rollout_margin=0.1, horizon=100, terminates=ends)
    starts = torch.tensor([[0.0, 0.0], [0.2, 0.0], [-0.2, -1.3]])  # the range is 2 wide, so -1.2 to 1.2; the last is outside of it
    r.advance(0, starts, Slope(0.5), Slope(0.5), dynamics)
    torch.testing.assert_close(r.states, torch.tensor([[0.9, 0.0], [1.1, 0.0], [-0.2, -1.3]]).repeat(2, 1))
    report = r.report()
    assert report["model/rollout_left"].item() == pytest.approx(1 / 3) and report["model/rollout_ended"] == 0
    drift = (torch.tensor([[0.9, 0.0], [1.1, 0.0], [-0.2, -1.3]]).square().mean(1)).mean().sqrt()
    assert report["model/rollout_drift_policy"].item() == pytest.approx(drift.item())  # the data has mean 0 and deviation 1
    r.states[2] = torch.tensor([0.25, 0.1])
    r.advance(1, starts, Slope(0.5), Slope(0.5), dynamics)
    torch.testing.assert_close(r.states[:3], torch.stack([starts[0], starts[1], torch.tensor([1.15, 0.1])]))
    r.states[0] = torch.tensor([1.15, 0.0])  # 2.05 after the step: it ends there, outside or not
    r.states[3:] = 0  # those of the reference
    r.report()
    r.advance(2, 0 * starts, Slope(0.5), Slope(0.5), dynamics)
    report = r.report()
    assert report["model/rollout_ended"].item() == pytest.approx(2 / 6) and report["model/rollout_left"] == 0
    assert report["model/rollout_drift_reference"].item() == pytest.approx(0.9 / 2**0.5)


def test_the_buffer_keeps_the_last_pairs():
    r, dynamics = rollouts(pairs_kept=20, horizon=100)
    assert r.sample(10).shape == (0, 4)  # k = 0: D_model is empty
    for k in range(5):  # 30 pairs, in states that say when they were made
        r.states.fill_(k)
        r.advance(k + 1, torch.zeros(3, 2), Slope(0.5), Slope(0.5), dynamics)
        assert r.sample(50).shape == (50, 4)
    stored = r.pairs[:, 0].int().tolist()
    assert sorted(stored) == [1] * 2 + [2] * 6 + [3] * 6 + [4] * 6  # the oldest ten are gone
    drawn = r.sample(6000)[:, 0].int().bincount(minlength=5)
    assert drawn[0] == 0 and abs(drawn[1] - 600) < 150 and (drawn[2:] - 1800).abs().max() < 200
    state = r.state_dict()
    other, _ = rollouts(pairs_kept=20, horizon=100)
    other.load_state_dict(state)
    for a in (r, other):
        torch.manual_seed(1)
        a.advance(5, torch.zeros(3, 2), Slope(0.5), Slope(0.5), dynamics)
    assert torch.equal(r.pairs, other.pairs) and torch.equal(r.states, other.states) and r.added == other.added == 36


def test_transitions_of_the_warm_start_are_the_models():
    r, dynamics = rollouts(step=(7.0, 0.25, 0.0), terminates=lambda obs, act, next_obs: next_obs[:, 0] > 1)
    assert [x.shape for x in r.transitions(5, dynamics)] == [(0, 2), (0, 2), (0,), (0, 2), (0,)]
    r.advance(0, torch.tensor([[0.9, 0.0], [0.5, 0.0], [-0.5, 0.0]]), Slope(0.5), Slope(-0.25), dynamics)
    obs, act, rew, next_obs, terminated = r.transitions(100, dynamics)
    torch.testing.assert_close(next_obs, obs + torch.tensor([0.25, 0.0]))
    assert (rew == 7).all() and torch.equal(terminated, (obs[:, 0] == 0.9).float()) and 0 < terminated.sum() < 100
    pairs = {tuple(row) for row in torch.cat([obs, act], 1).tolist()}
    assert pairs == {tuple(row) for row in r.pairs[:6].tolist()} and not any(x.requires_grad for x in (rew, next_obs))


# --- reference policies ---


def saved(folder, state):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "checkpoint.pt")
    return str(folder)


def data(obs_dim=2, act_dim=2):
    return Dataset(torch.randn(9, obs_dim), torch.rand(9, act_dim), *[torch.zeros(9)] * 5)


def test_a_reference_is_loaded_from_a_run_of_another_script(tmp_path):
    import romi_cql

    policy = romi_cql.Policy(2, 2, (16, 8, 4))
    path, d = saved(tmp_path / "run", {"phase": "policy", "agent": {"policy": policy.state_dict()}}), data()
    reference = m.given_reference(replace(ARGS, reference=path), d)
    obs = torch.randn(5000, 2)
    mean, log_std = policy(obs)
    assert torch.equal(reference.best(obs), mean.tanh())
    torch.manual_seed(1)
    sample = reference.sample(obs)
    torch.manual_seed(1)
    assert torch.equal(sample, (mean + log_std.exp() * torch.randn(5000, 2)).tanh())
    assert len(d.facts()["reference"]) == 64  # its sha256: a run does not go on with another one
    assert m.given_reference(replace(ARGS, reference=f"{path}/checkpoint.pt"), data())


def test_the_data_collectors_sac_is_a_reference(tmp_path, collector):
    agent = collector.SAC(2, 2, collector.Args(hidden=16))
    torch.nn.init.constant_(agent.policy.head.bias[2:], -9.0)  # log std -9: below the clamp of the scripts' own policies
    path = saved(tmp_path / "sac", {"agent": agent.state_dict(), "replay": [torch.zeros(9)], "medium_policy": None})
    reference = m.given_reference(replace(ARGS, reference=path), data())
    obs = torch.randn(100, 2)
    torch.manual_seed(1)
    act, _, mean = agent.policy(obs)
    torch.manual_seed(1)
    torch.testing.assert_close(reference.sample(obs), act)
    torch.testing.assert_close(reference.best(obs), mean)
    torch.save({"agent": {"policy": agent.policy.state_dict()}}, tmp_path / "policy_7.pt")  # as --keep-policies does
    kept = m.given_reference(replace(ARGS, reference=str(tmp_path / "policy_7.pt")), data())
    assert torch.equal(kept.best(obs), reference.best(obs))


def test_a_policy_of_standardised_states_is_a_reference(tmp_path):
    import sra_iql

    policy, mean, std = sra_iql.ClampedPolicy(2, 2, (8, 8)), torch.tensor([3.0, -1.0]), torch.tensor([0.1, 5.0])
    policy.net[-1].weight.data.mul_(50)
    path = saved(tmp_path, {"phase": "policy", "agent": {"normalizer": {"mean": mean, "std": std}, "policy": policy.state_dict()}})
    obs = mean + std * torch.randn(100, 2)
    reference, (center, log_std) = m.given_reference(replace(ARGS, reference=path), data()), policy((obs - mean) / std)
    torch.testing.assert_close(reference.best(obs), center.tanh(), atol=1e-4, rtol=1e-4)
    assert (center == 9).any() and (log_std == 2).any()
    torch.manual_seed(1)
    sample = reference.sample(obs)
    torch.manual_seed(1)
    torch.testing.assert_close(sample, (center + log_std.exp() * torch.randn(100, 2)).tanh(), atol=1e-3, rtol=1e-3)


def test_a_policy_for_another_robot_is_refused(tmp_path):
    state = {"phase": "policy", "agent": {"policy": m.Policy(2, 2, (4,)).state_dict()}}
    run, sac = saved(tmp_path / "a run", state), saved(tmp_path / "sac-walker2d-0-0123abcd", state)
    (tmp_path / "a run" / "config.json").write_text(json.dumps({"task": "walker2d-medium-v2"}))
    torch.save(state, tmp_path / "sac-walker2d-0-0123abcd" / "policy_7.pt")
    (tmp_path / "a run" / "result.json").write_text("{}")
    for path in (run, f"{run}/checkpoint.pt", sac, f"{sac}/policy_7.pt"):
        args = replace(ARGS, reference=path)
        with pytest.raises(UserError, match="is a policy for walker2d, not for halfcheetah"):
            m.given_reference(args, data(), "halfcheetah")
        for domain in ("walker2d", ""):
            assert m.given_reference(args, data(), domain)
    assert m.given_reference(replace(ARGS, reference=saved(tmp_path / "any-name", state)), data(), "ant")  # nothing is known of it


def test_what_is_no_reference_is_refused(tmp_path):
    good = {"policy": m.Policy(2, 2, (4,)).state_dict()}
    (tmp_path / "text").write_text("no checkpoint")
    for path, word in (
        (str(tmp_path / "nowhere"), "no checkpoint"),
        (str(tmp_path / "text"), "no Gaussian policy"),
        (saved(tmp_path / "early", {"phase": "dynamics", "dynamics": {}}), "not trained"),
        (saved(tmp_path / "warm", {"phase": "warm_start", "agent": good}), "not trained"),
        (saved(tmp_path / "bcq", {"phase": "policy", "agent": {"vae": {}, "perturb": {}}}), "no Gaussian policy"),
        (saved(tmp_path / "list", [1]), "no Gaussian policy"),
    ):
        with pytest.raises(UserError, match=word):
            m.given_reference(replace(ARGS, reference=path), data())
    with pytest.raises(UserError, match="another task"):
        m.given_reference(replace(ARGS, reference=saved(tmp_path / "wide", {"agent": good})), data(3, 2))


# --- settings ---


def test_settings():
    def resolved(*flags):
        args = tyro.cli(m.Args, args=flags)
        return m.resolve(args, parse_task(args.env))

    a = resolved()
    assert (a.horizon, a.reference, a.exp_name, a.fast_lr / a.slow_lr) == (1000, "bc", "armor", pytest.approx(1000))
    assert resolved("--env", "maze2d-umaze").horizon == 300
    a = resolved("--model-ratio", "0")
    assert (a.reference, a.exp_name) == ("data", "atac") and resolved("--model-ratio", "0", "--reference", "bc").reference == "bc"
    for flags in (
        ("--model-ratio", "1"),
        ("--model-ratio", "0.001"),
        ("--reference", "data"),
        ("--clone", "reference"),
        ("--clone", "copy"),
        ("--warm-start-updates", "0"),
        ("--warm-start-updates", "0", "--model-ratio", "0"),
        ("--warm-start-updates", "0", "--reference", "runs/x", "--clone", "data"),
        ("--pairs-kept", "255"),
        ("--target-weight", "1.1"),
        ("--beta", "-1"),
        ("--v-max", "0"),
        ("--slow-lr", "nan"),
        ("--dynamics-weight-decay", "1"),
    ):
        with pytest.raises(UserError):
            resolved(*flags)
    assert resolved("--model-buffer-size", "256").pairs_kept == 256
    assert resolved("--warm-start-updates", "0", "--reference", "runs/x/").reference == "runs/x"
    assert resolved().clone == "data" and resolved("--reference", "runs/x").clone == "copy"


# --- runs ---

SMALL = [
    "--env", "hopper-medium-replay", "--total-updates", "40", "--batch-size", "20", "--hidden", "16", "16",
    "--dynamics-hidden", "16", "--dynamics-max-epochs", "2", "--warm-start-updates", "30",
    "--horizon", "7", "--model-buffer-size", "330",  # 20 pairs an update: overwritten from the 17th on
    "--eval-every", "20", "--eval-episodes", "2", "--log-every", "10", "--checkpoint-every", "20", "--num-threads", "1",
]  # fmt: skip


def arguments(data_file, run_dir, *flags):  # noqa: F811
    return [*SMALL, "--dataset", str(data_file), "--run-dir", str(run_dir), *flags]


def here(*arguments_):
    """The run in this process."""
    m.main(tyro.cli(m.Args, args=arguments(*arguments_)))


def killed(where, *arguments_):
    """The run in another process, which kills itself after the metrics for which `where` holds."""
    code = f"import os, signal, sys, tyro; sys.path.insert(0, {str(ROOT / 'algorithms')!r}); import armor as m\n"
    code += f"def log(self, u, x, plain=m.Run.log):\n    plain(self, u, x)\n    ({where}) and os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "m.Run.log = log\nm.main(tyro.cli(m.Args))"
    done = subprocess.run([sys.executable, "-c", code, *arguments(*arguments_)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def whole(data_file, tmp_path_factory):  # noqa: F811
    """The run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    here(data_file, run_dir)
    return folder_of(run_dir, "armor")


def test_a_run_compares_the_policy_with_its_reference(whole):
    rows, result = metrics(whole), json.loads((whole / "result.json").read_text())
    assert result["updates"] == 40 and math.isfinite(result["normalized_score"]) and not list(whole.glob("*.part"))
    evals, gaps = [r for r in rows if "eval/return" in r], [r for r in rows if "reference/return" in r]
    assert [r["update"] for r in evals] == [r["update"] for r in gaps] == [20, 40]
    assert gaps[0]["reference/return"] == gaps[1]["reference/return"]
    for e, g in zip(evals, gaps, strict=True):
        assert g["reference/improvement"] == pytest.approx(e["eval/return"] - g["reference/return"])
        gap = e["eval/discounted_return"] - g["reference/discounted_return"]
        assert g["reference/discounted_improvement"] == pytest.approx(gap) and g["reference/discounted_return"] < g["reference/return"]
    losses = [r for r in rows if "losses/policy" in r]
    assert [r["update"] for r in losses] == [10, 20, 30, 40]
    guard = {"losses/adversary", "losses/data_fit", "losses/bellman", "losses/relative", "q/weight_norm", "q/policy", "q/reference"}
    guard |= {f"model/{k}{s}" for k in ("nll", "reward_error", "state_error") for s in ("", "_fitted")}
    guard |= {f"model/rollout_{k}" for k in ("ended", "left", "drift_policy", "drift_reference")}
    guard |= {"model/reward_shift", "model/state_shift", "model/backup_shift", "q/policy_shift"}
    assert all(guard <= r.keys() for r in losses)
    shifts = [r for r in rows if "model/return_shift" in r]
    assert [r["update"] for r in shifts] == [20, 40] and 0 < abs(shifts[0]["model/return_shift"]) < 1
    assert 0 < losses[0]["model/reward_shift"] < 0.1 and 0 < losses[0]["q/policy_shift"] < 0.1
    assert len({r["model/nll_fitted"] for r in losses}) == 1 < len({r["model/nll"] for r in losses})
    assert [r["model/warm_start_update"] for r in rows if "losses/clone" in r] == [10, 20, 30]


def test_batches_hold_real_rows_and_pairs_of_the_model(data_file, tmp_path, monkeypatch):  # noqa: F811
    seen, plain = [], m.ARMOR.update

    def update(self, obs, act, rew, next_obs, terminated, known, pairs):
        seen.append((len(obs), len(pairs)))
        assert terminated.any() and not (known * terminated).any()  # in this file terminals have no successor
        seen[-1] += (((known == 0) & (terminated == 0)).any(),)  # nor does the game fit M to the rows that the fit held out
        return plain(self, obs, act, rew, next_obs, terminated, known, pairs)

    monkeypatch.setattr(m.ARMOR, "update", update)
    flags = ("--batch-size", "2000", "--model-ratio", "0.7", "--pairs-kept", "2000", "--warm-start-updates", "1", "--eval-episodes", "0")
    here(data_file, tmp_path, *flags, "--total-updates", "3")
    assert seen == [(600, 0, True), (600, 1400, True), (600, 1400, True)]


def test_a_run_killed_in_every_phase_ends_in_the_same_weights(whole, data_file, tmp_path):  # noqa: F811
    for where in ("x.get('model/epoch') == 2", "x.get('model/warm_start_update') == 30", "u == 30"):
        killed(where, data_file, tmp_path)
    here(data_file, tmp_path)
    folder = folder_of(tmp_path, "armor")
    assert_same_run(whole, folder)
    (folder / "result.json").unlink()  # killed before the last line
    here(data_file, tmp_path)
    assert_same_run(whole, folder)


def test_a_run_carried_on_equals_one_that_was_longer_at_once(whole, data_file, tmp_path, capsys):  # noqa: F811
    here(data_file, tmp_path, "--total-updates", "20")
    here(data_file, tmp_path, "--total-updates", "20")
    assert "finished" in capsys.readouterr().out
    here(data_file, tmp_path)
    x, y = (torch.load(folder_of(d, "armor") / "checkpoint.pt", weights_only=True) for d in (whole.parent, tmp_path))
    assert all(torch.equal(v, y["agent"]["policy"][k]) for k, v in x["agent"]["policy"].items())
    assert torch.equal(x["rollouts"]["pairs"], y["rollouts"]["pairs"]) and len(x["rollouts"]["pairs"]) == 330
    with pytest.raises(UserError, match="--bellman-weight"):
        here(data_file, tmp_path, "--beta", "2")


def test_atac_begins_where_armor_begins_and_is_resumed(whole, data_file, tmp_path):  # noqa: F811
    flags = ("--model-ratio", "0", "--eval-episodes", "0")
    killed("u == 30", data_file, tmp_path / "killed", *flags)
    here(data_file, tmp_path / "killed", *flags)
    here(data_file, tmp_path / "whole", *flags)
    folder = folder_of(tmp_path / "whole", "atac")
    assert metrics(folder) == metrics(folder_of(tmp_path / "killed", "atac"))
    state, other = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, whole))
    same = torch.load(folder_of(tmp_path / "killed", "atac") / "checkpoint.pt", weights_only=True)["agent"]
    assert all(torch.equal(v, same[net][k]) for net in ("policy", "qf", "target_qf") for k, v in state["agent"][net].items())
    assert all(torch.equal(v, other["clone"][k]) for k, v in state["clone"].items())  # the same warm start
    assert not {"dynamics", "rollouts"} & state.keys() and "dynamics" not in state["agent"]
    assert not any(k.startswith("model/") and k != "model/warm_start_update" for row in metrics(folder) for k in row)


def test_entropy_of_a_policy_by_hand():
    """Of a uniform action in [-1, 1]: log 2; a Gaussian of standard deviation 0.01 in the middle: log(0.01 sqrt(2 pi e)), each output."""
    obs = torch.zeros(20_000, 2)
    narrow = lambda obs: (obs, torch.full_like(obs, math.log(0.01)))  # noqa: E731
    assert m.entropy(narrow, obs) == pytest.approx(2 * (math.log(0.01) + 0.5 * math.log(2 * math.pi * math.e)), abs=0.03)
    broad = lambda obs: (obs, torch.full_like(obs, -0.14))  # noqa: E731
    assert m.entropy(broad, obs) == pytest.approx(2 * math.log(2), abs=0.06) and m.entropy(broad, obs) == m.entropy(broad, obs)


@pytest.mark.parametrize("bias, flags", [(-3.0, ()), (0.0, ()), (-3.0, ("--target-entropy", "-2")), (-3.0, ("--clone", "reference"))])
def test_a_copied_policy_is_allowed_by_its_target_entropy(data_file, tmp_path, collector, bias, flags):  # noqa: F811
    sac = collector.Policy(11, 3, 16)
    with torch.no_grad():
        sac.head.bias[3:] = bias  # of the log standard deviation
        sac.head.weight.mul_(0.01)
    torch.save({"agent": {"policy": sac.state_dict()}}, tmp_path / "policy_7.pt")
    given = ("--reference", str(tmp_path / "policy_7.pt"), "--exp-name", "second", "--total-updates", "10", "--eval-episodes", "0")
    here(data_file, tmp_path, *given, *flags)
    (seen,) = {r["q/target_entropy"] for r in metrics(folder_of(tmp_path, "second")) if "q/target_entropy" in r}
    if flags or not bias:
        assert seen == (-2 if "--target-entropy" in flags else -3)
    else:
        assert seen == pytest.approx(3 * (bias + 0.5 * math.log(2 * math.pi * math.e)), abs=0.2) and seen < -3


def test_the_policy_begins_as_the_given_reference_itself(data_file, tmp_path, collector):  # noqa: F811
    sac = collector.Policy(11, 3, 16)  # other widths than --hidden, another bound of the log standard deviation
    torch.save({"agent": {"policy": sac.state_dict()}}, tmp_path / "policy_7.pt")
    flags = ("--reference", str(tmp_path / "policy_7.pt"), "--exp-name", "second", "--slow-lr", "1e-4", "--eval-episodes", "0")
    killed("x.get('model/warm_start_update') == 30", data_file, tmp_path / "killed", *flags)  # goes on from 20
    killed("u == 30", data_file, tmp_path / "killed", *flags)
    here(data_file, tmp_path / "killed", *flags)
    here(data_file, tmp_path / "whole", *flags)
    states = [torch.load(folder_of(tmp_path / x, "second") / "checkpoint.pt", weights_only=True) for x in ("whole", "killed")]
    state, obs = states[0], torch.randn(50, 11)
    assert all(torch.equal(v, states[1]["agent"][net][k]) for net in ("policy", "qf", "dynamics") for k, v in state["agent"][net].items())
    begun, ended = m.Policy(11, 3, (16, 16)), m.Policy(11, 3, (16, 16))
    begun.load_state_dict(state["clone"])  # as the warm start left it
    ended.load_state_dict(state["agent"]["policy"])
    torch.testing.assert_close(begun(obs)[0].tanh(), sac(obs)[2])
    assert 1e-4 < (ended(obs)[0] - begun(obs)[0]).abs().max() < 0.5
    fresh = m.QFunctions(11, 3, state["warm_start"]["qf"]["q1.0.weight"].shape[:1] * 2)
    assert state["warm_start"]["qf"].keys() == fresh.state_dict().keys() and len(state["warm_start"]["critics_adam"]) > 0
    rows = metrics(folder_of(tmp_path / "whole", "second"))
    assert not any("losses/clone" in row for row in rows) and sum("model/warm_start_update" in row for row in rows) == 3
    more = (*flags[:-4], "--exp-name", "third", "--eval-episodes", "0", "--warm-start-from", str(folder_of(tmp_path / "whole", "second")))
    for flag, word in (("--dynamics-max-epochs 1", "dynamics_max_epochs"), ("--horizon 8", "horizon"), ("--model-ratio 0", "")):
        with pytest.raises(UserError, match=f"another .*{word}"):  # half of its rows are the model's
            here(data_file, tmp_path / "none", *more, *flag.split())
    assert not (tmp_path / "none").exists()


def test_a_warm_start_beside_a_given_reference_uses_the_model_as_it_was_fitted(whole, data_file, tmp_path, monkeypatch):  # noqa: F811
    fitted, seen, states = torch.load(whole / "checkpoint.pt", weights_only=True)["dynamics"], [], []
    warm_up, advance = m.ARMOR.warm_up, m.Rollouts.advance

    def spy(self, *a):
        assert all(torch.equal(v, fitted[k]) for k, v in self.dynamics.state_dict().items()) and a[-1] is None
        seen.append(a)
        return warm_up(self, *a)

    monkeypatch.setattr(m.ARMOR, "warm_up", spy)
    monkeypatch.setattr(m.Rollouts, "advance", lambda self, *a: (states.append((self, *a, self.pairs.clone())), advance(self, *a))[1])
    here(data_file, tmp_path, "--reference", str(whole), "--exp-name", "second", "--total-updates", "20", "--eval-episodes", "0")
    assert [len(a[0]) for a in seen] == [10] + 29 * [20] and [a[1] for a in states] == [*range(30), *range(20)]
    first, game = states[0][0], states[30][0]
    assert all(a[0] is first for a in states[:30]) and game is not first and game.added == 20 * 20  # D_model begins the game empty
    for a, (_, _, starts, *_) in zip(seen, states, strict=False):
        assert torch.equal(a[0][:10], starts)  # rows of the data first: they are where rollouts begin
    drawn, imagined = torch.cat(seen[29][:2], 1)[10:].tolist(), states[29][-1].tolist()
    assert all(row in imagined for row in drawn)
    here(data_file, tmp_path, "--reference", str(whole), "--exp-name", "data", "--clone", "data", "--warm-start-from", str(whole))


def test_a_run_improves_on_another_run_and_on_no_other(whole, data_file, tmp_path, monkeypatch, capsys):  # noqa: F811
    given = shutil.copytree(whole, tmp_path / "given")
    flags = ("--reference", str(given), "--exp-name", "second", "--total-updates", "20", "--clone", "reference")
    theirs, asked, cloned, used = torch.load(whole / "checkpoint.pt", weights_only=True)["agent"]["policy"], [], [], []
    sample, warm_up, loss = m.Reference.sample, m.ARMOR.warm_up, m.ARMOR.adversary_loss

    def spy(self, obs):
        assert all(torch.equal(p, q) for p, q in zip(self.net.parameters(), theirs.values(), strict=True))
        asked.append(sample(self, obs))
        return asked[-1]

    monkeypatch.setattr(m.Reference, "sample", spy)
    monkeypatch.setattr(m.ARMOR, "warm_up", lambda self, *a: (cloned.append(a[-1] is asked[-1]), warm_up(self, *a))[1])
    monkeypatch.setattr(m.ARMOR, "adversary_loss", lambda self, *a: (used.append(a[3] is asked[-1]), loss(self, *a))[1])
    here(data_file, tmp_path, *flags)
    assert cloned == 30 * [True] and used == 20 * [True] and len(asked) == 2 * 30 + 2 * 20  # to clone or for L, and for the rollouts
    monkeypatch.undo()
    folder = folder_of(tmp_path, "second")
    for k in ("return", "discounted_return"):  # as that run evaluated itself
        last = [r[f"eval/{k}"] for r in metrics(whole) if f"eval/{k}" in r][-1]
        assert [r[f"reference/{k}"] for r in metrics(folder) if f"reference/{k}" in r] == [last]
    result = json.loads((folder / "result.json").read_text())
    assert result["reference_return"] == [r["reference/return"] for r in metrics(folder) if "reference/return" in r][-1]
    assert result["improvement"] == result["return_mean"] - result["reference_return"]
    last = [r["reference/discounted_improvement"] for r in metrics(folder) if "reference/discounted_improvement" in r][-1]
    assert result["discounted_improvement"] == last
    other = folder_of(tmp_path, "second") / "checkpoint.pt"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match="another --reference"):
        here(data_file, tmp_path, *flags[:1], str(other), *flags[2:])
    state = torch.load(given / "checkpoint.pt", weights_only=True)
    saved(given, state | {"step": 41})
    (given / "result.json").unlink()
    capsys.readouterr()
    here(data_file, tmp_path, flags[0], f"{given}/checkpoint.pt", *flags[2:])  # the same policy, by another name
    said = "".join(capsys.readouterr())
    assert "second__0__small is finished" in said and "is not finished; if it trains on, this run cannot be resumed" in said
    next(iter(state["agent"]["policy"].values())).mul_(1.01)
    saved(given, state)
    with pytest.raises(UserError, match="another reference file;"):  # not: another data file
        here(data_file, tmp_path, *flags)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(UserError, match="no checkpoint"):
        here(data_file, tmp_path / "none", "--reference", str(tmp_path))
    assert not (tmp_path / "none").exists()


def test_a_model_of_another_run_must_be_the_same_single_model(whole, data_file, tmp_path):  # noqa: F811
    flags = ("--dynamics-from", str(whole), "--exp-name", "borrowed")
    here(data_file, tmp_path, *flags)
    x, y = (torch.load(f / "checkpoint.pt", weights_only=True)["agent"]["dynamics"] for f in (whole, folder_of(tmp_path, "borrowed")))
    assert all(torch.equal(v, y[k]) for k, v in x.items())  # the model as it was fitted was taken, not the adversary's last
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    state["model_key"] |= {"ensemble_size": 7}  # as mopo.py's
    with pytest.raises(UserError, match="another ensemble_size"):
        here(data_file, tmp_path / "none", "--dynamics-from", saved(tmp_path / "mopo", state))


def test_a_warm_start_of_another_run_is_the_same_as_ones_own(whole, data_file, tmp_path, monkeypatch):  # noqa: F811
    own = {}
    for name, flags in {"atac": ("--model-ratio", "0"), "strong": ("--beta", "2", "--lambda", "9")}.items():
        here(data_file, tmp_path, *flags, "--exp-name", name, "--total-updates", "20", "--eval-episodes", "0")
        own[name] = (*flags, "--exp-name", f"{name}_taken", "--total-updates", "20", "--eval-episodes", "0")
    assert metrics(folder_of(tmp_path, "strong"))[-1] != metrics(whole)[-2]
    monkeypatch.setattr(m.ARMOR, "warm_up", None)  # nothing is trained before the game
    for name, flags in own.items():
        here(data_file, tmp_path, *flags, "--warm-start-from", str(whole))
        x, y = (torch.load(folder_of(tmp_path, n) / "checkpoint.pt", weights_only=True) for n in (name, f"{name}_taken"))
        assert x["warm_start_key"] == y["warm_start_key"] and x["rng"][0].equal(y["rng"][0])
        for net in ("policy", "qf", "target_qf", "log_alpha"):
            assert all(torch.equal(v, y["agent"][net][k]) for k, v in x["agent"][net].items())
        assert all(torch.equal(v, y["clone"][k]) for k, v in x["clone"].items())
        for i, adam in x["agent"]["adversary_opt"]["state"].items():
            assert all(torch.equal(v, y["agent"]["adversary_opt"]["state"][i][k]) for k, v in adam.items())
        assert x["agent"]["adversary_opt"]["param_groups"] == y["agent"]["adversary_opt"]["param_groups"]
    chain = ("--warm-start-from", str(folder_of(tmp_path, "atac_taken")), "--exp-name", "chain", "--eval-episodes", "0")
    here(data_file, tmp_path, *chain)  # also from a run that has taken its own, and for one with a model
    for flag, word in (("--batch-size 30", "batch_size"), ("--gamma 0.9", "gamma"), (f"--clone reference --reference {whole}", "clone")):
        with pytest.raises(UserError, match=f"another {word} "):
            here(data_file, tmp_path / "none", "--warm-start-from", str(whole), *flag.split())
    before = {k: v for k, v in torch.load(whole / "checkpoint.pt", weights_only=True).items() if not k.startswith("warm_start")}
    with pytest.raises(UserError, match="not over"):
        here(data_file, tmp_path / "none", "--warm-start-from", saved(tmp_path / "early", before))
    with pytest.raises(UserError, match="no checkpoint"):
        here(data_file, tmp_path / "none", "--warm-start-from", str(tmp_path))
    assert not (tmp_path / "none").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_status_3(data_file, tmp_path, monkeypatch):  # noqa: F811
    here(data_file, tmp_path, "--model-ratio", "0", "--total-updates", "20", "--eval-episodes", "0")
    good = (folder_of(tmp_path, "atac") / "checkpoint.pt").read_bytes()
    plain = m.ARMOR.policy_loss
    monkeypatch.setattr(m.ARMOR, "policy_loss", lambda *a: plain(*a) * math.nan)
    with pytest.raises(UserError, match="not finite at update 30") as error:
        here(data_file, tmp_path, "--model-ratio", "0", "--eval-episodes", "0")
    assert error.value.status == 3 and (folder_of(tmp_path, "atac") / "checkpoint.pt").read_bytes() == good


def test_the_game_holds_out_what_the_fit_held_out_and_ramps_the_model(data_file, tmp_path, monkeypatch):  # noqa: F811
    held_out, games, ramps = [], [], []
    train, init, ramp = m.train_dynamics, m.ARMOR.__init__, m.ARMOR.ramp_model

    def trained(dynamics, cond, act, rew, pred, args, run):
        def holdout(x, members=slice(None)):
            if not torch.is_grad_enabled():  # holdout_mse is what asks without gradients
                held_out.append(x[0] * dynamics.std + dynamics.mean)
            return m.Dynamics.forward(dynamics, x, members)

        dynamics.forward = holdout
        train(dynamics, cond, act, rew, pred, args, run)
        del dynamics.forward

    def made(self, *a, **k):
        games.append(k)
        init(self, *a, **k)

    seen, update = [], m.ARMOR.update
    monkeypatch.setattr(m, "train_dynamics", trained)
    monkeypatch.setattr(m.ARMOR, "__init__", made)
    monkeypatch.setattr(m.ARMOR, "ramp_model", lambda self, step: (ramps.append(step), ramp(self, step))[1])
    monkeypatch.setattr(m.ARMOR, "update", lambda self, *a: (seen.append(a), update(self, *a))[1])
    flags = ("--eval-episodes", "0", "--batch-size", "400", "--pairs-kept", "400")
    here(data_file, tmp_path, "--total-updates", "20", *flags)
    here(data_file, tmp_path, "--total-updates", "40", *flags)
    assert ramps == list(range(40))  # a resumed run goes on with it
    fitted = {r["model/reward_error_fitted"] for r in metrics(folder_of(tmp_path, "armor")) if "model/reward_error_fitted" in r}
    assert fitted == {games[0]["v_max"].item()} == {games[1]["v_max"].item()}
    held_out = {tuple(row[:1].round(decimals=3).tolist()) + tuple(row[11:].round(decimals=3).tolist()) for row in held_out[0]}
    for obs, act, _, _, terminated, known, _ in seen[:3]:
        rows = torch.cat([obs[:, :1], act], -1).round(decimals=3)
        out = torch.tensor([tuple(row) in held_out for row in rows.tolist()])
        assert torch.equal(known == 0, out | (terminated > 0)) and 0 < out.sum() < len(out)
