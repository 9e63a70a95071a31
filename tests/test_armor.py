"""Facts about ARMOR: losses, rollouts, reference policies and resumed runs against numbers worked by hand."""

import json
import math
from dataclasses import replace

import armor as m
import h5py
import numpy as np
import pytest
import torch
import tyro
from torch.distributions import Normal

from utils import Dataset, UserError, parse_task

CPU, VALUES = torch.device("cpu"), (-50.0, 50.0)
ARGS = m.Args(dynamics_hidden=16, hidden=(16, 16), horizon=5, pairs_kept=100, bellman_weight=4.0, fit_weight=1.0)
ATAC = replace(ARGS, model_ratio=0.0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def never(obs, act, next_obs):
    return torch.zeros(len(obs), dtype=torch.bool)


def ends_right(obs, act, next_obs):
    return next_obs[:, 0] > 1


def batch(n=10):
    return torch.randn(n, 2), 2 * torch.rand(n, 2) - 1, torch.randn(n), torch.randn(n, 2), (torch.rand(n) < 0.3).float()


def some_reference(hidden=(16, 16)):
    return m.Reference({"policy": m.Policy(2, 2, hidden).state_dict()})


def game(args=ARGS, terminates=never, n=10):
    """Both players over two-dimensional states and actions, with a reference, and what an update takes."""
    agent = m.ARMOR(2, 2, args, CPU, VALUES)
    agent.begin_game(some_reference(args.hidden), m.Dynamics(2, 2, args), terminates)
    return agent, (*batch(n), torch.ones(n), (torch.randn(n, 2), torch.randn(n, 2)))


def atac(args=ATAC, values=VALUES, reference=None):
    agent = m.ARMOR(2, 2, args, CPU, values)
    agent.begin_game(reference)
    return agent


def copies(agent):
    nets = {k: getattr(agent, k) for k in ("policy", "qf", "target_qf", "log_alpha", "model")}
    return {f"{k}.{name}": p.detach().clone() for k, net in nets.items() for name, p in net.named_parameters()}


def constant_model(mean, logvar=-30.0):
    """M says (r, s' - s) = mean everywhere, almost without noise."""
    model = m.Dynamics(2, 2, ARGS)
    with torch.no_grad():
        model.weight[-1].zero_()
        model.bias[-1].copy_(torch.cat([torch.tensor(mean), torch.full((3,), logvar)]))
        model.min_logvar.fill_(-40.0)
        model.max_logvar.fill_(20.0)
    return model


def slope(k):
    """A policy: tanh of the state times k, almost without noise."""
    return lambda obs: (k * obs, torch.full_like(obs, -30.0))


@pytest.mark.parametrize("beta, value", [(16.0, 3 / 16 + 2), (0.5, 3 + 0.5 * 2), (1.0, 5.0)])
def test_normalized_sum_points_where_the_plain_sum_does(beta, value):
    x = torch.tensor([3.0, 2.0], requires_grad=True)
    out = m.normalized_sum(x[0], x[1], torch.tensor(beta))
    assert out.item() == pytest.approx(value)
    (gradient,) = torch.autograd.grad(out, x)
    assert gradient[1] / gradient[0] == pytest.approx(beta) and gradient.max() == 1


def test_data_fit_is_the_likelihood_of_known_successors_and_a_scaled_reward_error():
    mean, logvar, obs, next_obs = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)
    rew, known = torch.randn(4), torch.tensor([True, False, True, True])
    log_p = Normal(obs + mean[:, 1:], (0.5 * logvar[:, 1:]).exp()).log_prob(next_obs).sum(-1)
    expected = (-log_p + ((mean[:, 0] - rew) / 5) ** 2)[known].mean()
    torch.testing.assert_close(m.data_fit(mean, logvar, obs, rew, next_obs, known, 5.0), expected)
    assert m.data_fit(mean, logvar, obs, rew, next_obs, torch.zeros(4), 5.0) == 0  # no known row: no gradient, no NaN


def test_projection_shrinks_long_weights_and_nothing_else():
    agent = atac()
    for p, norm in zip(agent.qf.parameters(), (250.0, 250.0, 50.0, 1.0) * 3, strict=True):
        torch.nn.init.ones_(p).data.mul_(norm / p.numel() ** 0.5)
    before = [p.detach().clone() for p in agent.qf.parameters()]
    agent.adversary_opt.param_groups[0]["lr"] = 0.0
    assert agent.step_critics(agent.qf(*batch()[:2]).mean()).item() == pytest.approx(250)
    shrinks = [p.ndim == 2 and p.norm().item() > 100 for p in before]
    for p, old, shrunk in zip(agent.qf.parameters(), before, shrinks, strict=True):
        torch.testing.assert_close(p, old * 100 / old.norm() if shrunk else old)
    assert 2 <= sum(shrinks) < len(shrinks)


def test_values_are_clipped_to_what_rewards_allow():
    assert m.value_range(torch.tensor([-1.0, 3.0]), 0.9) == pytest.approx((-10, 30))
    assert m.value_range(torch.tensor([-3.0, -2.0]), 0.9) == pytest.approx((-30, 0))
    assert m.value_range(torch.tensor([0.0, 0.2]), 0.9) == pytest.approx((-8, 2))  # not narrower than 1 / (1 - gamma)
    obs, act, rew, next_obs, _ = batch()
    for value, clipped, clip_v in ((9.0, 2.0, True), (-9.0, -1.0, True), (1.5, 1.5, True), (9.0, 9.0, False)):
        agent = atac(replace(ATAC, gamma=0.5, target_weight=1.0, clip_v=clip_v), (-1.0, 2.0))
        for q, more in ((agent.target_qf.q1, 0.1), (agent.target_qf.q2, 0.0)):  # the smaller one counts
            torch.nn.init.zeros_(q[-1].weight)
            torch.nn.init.constant_(q[-1].bias, value + more)
        error, q = agent.bellman(obs, act, rew, next_obs, torch.tensor([1.0] + [0.0] * 9))
        target = rew + 0.5 * clipped * torch.tensor([0.0] + [1.0] * 9)  # the first row is terminal
        torch.testing.assert_close(error, (q - target).square().mean(1))


@pytest.mark.parametrize("made", [game, atac], ids=["armor", "atac"])
def test_loss_of_the_adversary_and_its_gradients_by_hand(made):
    """Eq. 4 for beta = 4, lambda = 1: signs, means over D_M, model or data, what is differentiated through what."""
    w, fit = 0.3, 0
    agent, (obs, act, rew, next_obs, terminated, known, more) = game(replace(ARGS, target_weight=w), ends_right)
    for p in agent.target_qf.parameters():  # else they are the critics, and which of the two is asked would not matter
        p.data.add_(0.1 * torch.randn_like(p))
    learnt, outcome = [*agent.qf.parameters()], (rew, next_obs, terminated, known)
    if made is atac:
        agent.begin_game(None)
    else:
        obs, act = torch.cat([obs, more[0]]), torch.cat([act, more[1]])
        learnt += [*agent.model.weight, *agent.model.bias]
    pi_act, ref_act = 2 * torch.rand(len(obs), 2) - 1, 2 * torch.rand(len(obs), 2) - 1
    torch.manual_seed(1)
    loss, metrics = agent.adversary_loss(obs, act, pi_act, None if made is atac else ref_act, *outcome)
    torch.manual_seed(1)
    if made is atac:
        ref_act = act
    else:
        mean, logvar = m.gaussian(agent.model, obs, act)
        fit = m.data_fit(mean[:10], logvar[:10], obs[:10], rew, next_obs, known, 1.0)
        rew, next_obs = mean[:, 0], obs + mean[:, 1:] + (0.5 * logvar[:, 1:]).exp() * torch.randn_like(obs)
        terminated = (next_obs[:, 0] > 1).float()
    assert 0 < terminated.sum() < len(obs)
    next_act, _ = m.sample_action(agent.policy, next_obs)
    discount, expected = 0.99 * (1 - terminated), 0
    target = rew + discount * agent.target_qf(next_obs, next_act).amin(0)
    for q in (agent.qf.q1, agent.qf.q2):
        value = lambda s, a, q=q: q(torch.cat([s, a], -1)).squeeze(-1)  # noqa: E731
        residual = value(obs, act) - rew - discount * value(next_obs, next_act)
        error = (1 - w) * residual.square().mean() + w * (value(obs, act) - target).square().mean()
        expected += (value(obs, pi_act) - value(obs, ref_act)).mean() / 4 + error + fit
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(x, learnt, retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    gap = agent.qf(obs, pi_act)[0].mean() - agent.qf(obs, ref_act)[0].mean()
    torch.testing.assert_close(metrics["losses/relative"], gap.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("alpha, of_q, of_entropy", [(3.0, 1 / 3, 1.0), (0.5, 1.0, 0.5)])
def test_policies_are_paid_for_entropy_and_climb_the_first_critic(alpha, of_q, of_entropy, monkeypatch):
    agent, rows = game()
    obs, act, log_prob = rows[0], rows[1], torch.randn(10, requires_grad=True)
    loss = agent.policy_loss(obs, act, log_prob, torch.tensor(alpha))
    torch.testing.assert_close(loss, -of_q * agent.qf(obs, act)[0].mean() + of_entropy * log_prob.mean())
    seen = []
    monkeypatch.setattr(agent, "step_alpha", lambda log_prob: torch.tensor(alpha))
    monkeypatch.setattr(m, "descend", lambda opt, loss: seen.append((opt, loss)))
    torch.manual_seed(1)
    agent.warm_start_update(*rows[:5], act)
    torch.manual_seed(1)
    torch.randn(10, 2)  # the critics' next actions
    sampled = m.sample_action(agent.policy, obs)[1].mean()
    cloned = -m.squashed_log_prob(*agent.policy(obs), act).mean()
    assert seen[-1][0] is agent.policy_opt
    torch.testing.assert_close(seen[-1][1], of_q * cloned + of_entropy * sampled)


def test_players_move_their_own_networks_only(monkeypatch):
    agent, rows = game(replace(ARGS, slow_lr=1e-3))
    bounds = agent.model.max_logvar.detach().clone(), agent.model.min_logvar.detach().clone()
    moved, plain = [], m.descend

    def descend(opt, loss):
        before = copies(agent)
        plain(opt, loss)
        moved.append({k.split(".")[0] for k, p in copies(agent).items() if not torch.equal(p, before[k])})

    monkeypatch.setattr(m, "descend", descend)
    for _ in range(3):
        before = [p.clone() for p in agent.target_qf.parameters()]
        agent.update(*rows)
        for old, target, online in zip(before, agent.target_qf.parameters(), agent.qf.parameters(), strict=True):
            torch.testing.assert_close(target, 0.995 * old + 0.005 * online.detach())
    assert moved == 3 * [{"qf", "model"}, {"log_alpha"}, {"policy"}]
    assert torch.equal(bounds[0], agent.model.max_logvar) and torch.equal(bounds[1], agent.model.min_logvar)
    # targets follow outside of every graph, or every update would lengthen it
    assert all(p.grad_fn is None and p.grad is None and not p.requires_grad for p in agent.target_qf.parameters())
    assert all(p.grad is None for p in agent.reference.parameters())


def test_bfloat16_is_close_update_after_update():
    """Large steps: no update works with stale copies of weights. The model stays float32 without its own flag."""
    args, losses = replace(ARGS, hidden=(16, 16, 16), fast_lr=0.01, slow_lr=0.01, tau=0.5), []
    for bf16 in (False, True):
        torch.manual_seed(0)
        agent, rows = game(replace(args, bf16=bf16), n=64)
        losses.append([agent.update(*rows) for _ in range(5)])
    out = [torch.tensor([list(x.values()) for x in each]) for each in losses]
    torch.testing.assert_close(*out, rtol=0.05, atol=0.05)
    assert (out[0] != out[1]).any() and losses[0][0]["losses/data_fit"] == losses[1][0]["losses/data_fit"]
    with agent.autocast():
        q = agent.qf(*rows[:2])
    assert q.dtype == torch.float32 and (q != q.bfloat16()).any()  # the last layer is not rounded


def test_temperature_rises_when_entropy_is_below_its_target():
    for target, sign in ((50.0, 1), (-50.0, -1)):
        alpha = atac(replace(ATAC, target_entropy=target)).step_alpha(torch.zeros(3))
        assert math.copysign(1, alpha.log()) == sign


def test_the_game_begins_with_a_slow_policy_a_new_temperature_and_a_resting_model():
    agent, (_, rows) = m.ARMOR(2, 2, ARGS, CPU, VALUES), game()
    for _ in range(3):
        agent.warm_start_update(*rows[:5], rows[1])
    assert agent.policy_opt.param_groups[0]["lr"] == 5e-4 and agent.log_alpha["sac"] != 0 and agent.policy_opt.state
    agent.begin_game(some_reference(), m.Dynamics(2, 2, ARGS), never)
    assert agent.policy_opt.param_groups[0]["lr"] == 5e-7 and agent.log_alpha["sac"].exp() == 1
    assert not agent.policy_opt.state and not agent.alpha_opt.state and agent.alpha_opt.param_groups[0]["lr"] == 5e-4
    assert agent.adversary_opt.state[agent.qf.q1[0].weight]["step"] == 3  # the critics' part goes on
    decays = [g["weight_decay"] for g in agent.adversary_opt.param_groups]
    assert decays == [0, *(3 * wd for wd in ARGS.dynamics_weight_decay), 0]  # 3 outputs
    for beta, weight in ((4.0, 100.0), (0.5, 50.0)):  # as the data fit, which counts lambda min(1, beta)
        groups = game(replace(ARGS, fit_weight=100.0, bellman_weight=beta))[0].adversary_opt.param_groups
        assert [g["weight_decay"] for g in groups] == pytest.approx([weight * d for d in decays])
    groups = game(replace(ARGS, bellman_weight=0.0))[0].adversary_opt.param_groups
    assert len(groups) == 1  # without E^w the model rests
    for step, rate in ((250, 2.5e-4), (500, 5e-4), (10_000, 5e-4), (1, 1e-6)):
        agent.ramp_model(step)
        assert [g["lr"] for g in agent.adversary_opt.param_groups] == [5e-4, *[pytest.approx(rate)] * 6]
    before = copies(agent)
    agent.update(*rows)
    moved = {k: (p - before[k]).abs().max().item() for k, p in copies(agent).items()}
    assert 0 < moved["policy.net.0.weight"] < 6e-7 and 0 < moved["model.weight.0"] < 1.1e-6


def test_fit_of_the_model_by_hand():
    model = constant_model([1.0, 0.5, 0.0], 2 * math.log(0.5))
    next_obs = torch.tensor([[0.5, 0.0]]).expand(4, 2)
    fit = m.model_fit(model, torch.zeros(4, 2), torch.zeros(4, 2), torch.tensor([1.0, 1.0, 1.0, 3.0]), next_obs)
    nll = 2 * (math.log(0.5) + 0.5 * math.log(2 * math.pi))
    assert fit["reward_error"].item() == pytest.approx(1.0, rel=1e-4)  # root of 2^2 / 4
    assert fit["state_error"].item() == pytest.approx(0, abs=1e-4) and fit["nll"].item() == pytest.approx(nll, rel=1e-4)


def rollouts(terminates=never, rollout_margin=1e6, **flags):
    """Rollouts from 3 starts in data that spans [-1, 1]^2."""
    args = replace(ARGS, rollout_margin=rollout_margin, **flags)
    made = m.Rollouts(torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]), 2, terminates, args)
    made.states = torch.zeros(6, 2)
    return made


def test_rollouts_restart_every_h_updates_and_follow_the_model_between():
    r, model = rollouts(horizon=4), constant_model([7.0, 0.25, 0.0])
    for k in range(9):
        starts = torch.rand(3, 2) + 10 * k
        r.states[3:] += 0.1  # the two sets of states need not agree
        old = r.states.clone()
        r.advance(k + 1, starts, slope(0.5), slope(-0.25), model)
        pairs = r.pairs[6 * k : 6 * k + 6]
        begin = starts.repeat(2, 1) if k % 4 == 0 else old
        assert torch.equal(pairs[:, :2], begin)  # the states that the actions were taken in; pi first, then pi_ref
        torch.testing.assert_close(pairs[:, 2:], torch.cat([0.5 * begin[:3], -0.25 * begin[3:]]).tanh())
        torch.testing.assert_close(r.states, begin + torch.tensor([0.25, 0.0]))
    assert r.added == 54 and not r.states.requires_grad
    r.terminates = ends_right  # of the warm start, on pairs of D_model
    obs, act, rew, next_obs, terminated = r.transitions(50, model)
    torch.testing.assert_close(next_obs, obs + torch.tensor([0.25, 0.0]))
    assert torch.equal(terminated, ends_right(obs, act, next_obs).float()) and 0 < terminated.sum() < 50
    assert {*map(tuple, torch.cat([obs, act], 1).tolist())} <= {*map(tuple, r.pairs.tolist())} and (rew == 7).all()


def test_rollouts_that_ended_overflowed_or_left_the_data_begin_again_in_the_minibatch():
    r, model = rollouts(ends_right, rollout_margin=0.1), constant_model([0.0, 0.9, 0.0])
    starts = torch.tensor([[0.0, 0.5], [-0.2, 0.0], [-0.2, -1.3]])
    r.states = torch.tensor([[0.0, 0.0], [0.5, 0.0], [-0.5, -1.25]] + [[-1.0, 0.0], [math.nan, 0.0], [math.inf, 0.0]])
    stats = r.advance(2, starts, slope(0.5), slope(0.5), model)
    after = torch.tensor([[0.9, 0.0], [-0.2, 0.0], [-0.2, -1.3]] + [[-0.1, 0.0], [-0.2, 0.0], [-0.2, -1.3]])
    torch.testing.assert_close(r.states, after)  # the range, 2 wide, goes from -1.2 to 1.2; a start may lie outside
    assert stats["model/rollout_ended"].item() == pytest.approx(3 / 6)
    assert stats["model/rollout_left"].item() == pytest.approx(1 / 6)


def test_a_constant_column_of_the_data_cannot_be_left():
    """The noise of the model would end every rollout at its first step."""
    r = m.Rollouts(torch.tensor([[-1.0, 7.0], [1.0, 7.0]]), 2, never, replace(ARGS, rollout_margin=0.0))
    stats = r.advance(1, torch.tensor([[0.0, 7.0]]).expand(3, 2), slope(0.5), slope(0.5), constant_model([0, 0.1, 0.1]))
    assert stats["model/rollout_left"] == 0
    torch.testing.assert_close(r.states, torch.tensor([[0.1, 7.1]]).expand(6, 2))


def test_the_buffer_keeps_the_last_pairs():
    r, model = rollouts(pairs_kept=20, horizon=100), constant_model([0.0, 0.25, 0.0])
    assert [x.shape for x in r.sample(10)] == [(0, 2), (0, 2)]  # D_model is empty at first
    for k in range(5):  # 30 pairs, in states that say when they were made
        r.states.fill_(k)
        r.advance(k + 2, torch.zeros(3, 2), slope(0.5), slope(0.5), model)
        assert [x.shape for x in r.sample(50)] == [(50, 2), (50, 2)]
        assert len(r.state_dict()["pairs"]) == min(6 * k + 6, 20)  # the filled part
    drawn = r.sample(6000)[0][:, 0].int().bincount(minlength=5)  # the oldest ten are gone
    assert drawn[0] == 0 and abs(drawn[1] - 600) < 150 and (drawn[2:] - 1800).abs().max() < 200
    other = rollouts(pairs_kept=20, horizon=100)
    other.load_state_dict(r.state_dict())
    for a in (r, other):
        torch.manual_seed(1)
        a.advance(6, torch.zeros(3, 2), slope(0.5), slope(0.5), model)
    assert torch.equal(r.pairs, other.pairs) and torch.equal(r.states, other.states) and r.added == other.added == 36


# --- reference policies ---


def run_folder(folder, **state):
    """A finished run of these scripts."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "agent.pt")
    (folder / "result.json").write_text("{}")
    return folder


def load(path, domain="", dims=(2, 2)):
    data = Dataset(torch.randn(9, dims[0]), torch.rand(9, dims[1]), *[torch.zeros(9)] * 5)
    return m.given_reference(replace(ARGS, reference=str(path)), data, domain), data


def test_a_reference_is_loaded_from_a_run_of_another_script(tmp_path):
    policy, obs = m.Policy(2, 2, (16, 8, 4)), torch.randn(500, 2)
    folder = run_folder(tmp_path / "run", policy=policy.state_dict(), step=7)
    reference, data = load(folder)
    torch.testing.assert_close(reference(obs), policy(obs), rtol=0, atol=0)
    assert len(data.facts()["reference"]) == 64 and load(folder / "agent.pt")[1].facts() == data.facts()  # its sha256
    (folder / "result.json").unlink()
    with pytest.raises(UserError, match="finished run"):
        load(folder)


def test_the_data_collectors_sac_is_a_reference(tmp_path, collector):
    sac, obs = collector.Policy(2, 2, 16), torch.randn(100, 2)
    torch.nn.init.constant_(sac.head.bias[2:], -9.0)  # log std: below the clamp of the scripts' own policies
    state = {"agent": {"policy": sac.state_dict(), "qf": {}}, "replay": [torch.zeros(9)], "medium_policy": None}
    torch.save(state, tmp_path / "checkpoint.pt")
    torch.save({"agent": {"policy": sac.state_dict()}}, tmp_path / "policy_7.pt")  # as --keep-policies does
    for path in (tmp_path, tmp_path / "checkpoint.pt", tmp_path / "policy_7.pt"):
        reference, _ = load(path)
        torch.manual_seed(1)
        act, _, mean = sac(obs)
        torch.manual_seed(1)
        torch.testing.assert_close(m.sample_action(reference, obs)[0], act)
        torch.testing.assert_close(reference(obs)[0].tanh(), mean)


def test_a_policy_of_standardised_states_is_a_reference(tmp_path):
    policy, mean, std = m.Policy(2, 2, (8, 8)), torch.tensor([3.0, -1.0]), torch.tensor([0.1, 5.0])
    policy.net[-1].weight.data.mul_(50)
    run_folder(tmp_path, normalizer={"mean": mean, "std": std}, policy=policy.state_dict())
    obs = mean + std * torch.randn(100, 2)
    center, log_std = policy((obs - mean) / std)
    assert (center > 9).any() and (log_std == 2).any()  # SRA clamps the mean
    torch.testing.assert_close(load(tmp_path)[0](obs), (center.clamp(-9, 9), log_std), atol=1e-3, rtol=1e-3)


def test_what_is_no_reference_is_refused(tmp_path):
    policy = m.Policy(2, 2, (4,)).state_dict()
    run, sac = run_folder(tmp_path / "a run", policy=policy), tmp_path / "sac-walker2d-0-0123abcd"
    (run / "config.json").write_text(json.dumps({"task": "walker2d-medium-v2"}))
    sac.mkdir()
    torch.save({"agent": {"policy": policy}}, sac / "policy_7.pt")
    for path in (run, run / "agent.pt", sac / "policy_7.pt"):  # widths are no help: both have (17, 6)
        with pytest.raises(UserError, match="is a policy for walker2d, not for halfcheetah"):
            load(path, "halfcheetah")
        assert load(path, "walker2d") and load(path)
    with pytest.raises(UserError, match="another task"):
        load(run, dims=(3, 2))
    (tmp_path / "text").write_text("no checkpoint")
    bcq = run_folder(tmp_path / "bcq", vae={}, perturb={})
    words = {"nowhere": "no policy there", ".": "no policy there", "text": "no Gaussian", bcq.name: "no Gaussian"}
    for name, word in words.items():
        with pytest.raises(UserError, match=word):
            load(tmp_path / name)


def test_entropy_of_a_policy_by_hand():
    """Uniform in [-1, 1]: log 2; a Gaussian of deviation 0.01 in the middle: log(0.01 sqrt(2 pi e)), each output."""
    narrow = math.log(0.01) + 0.5 * math.log(2 * math.pi * math.e)
    for log_std, expected in ((math.log(0.01), 2 * narrow), (-0.14, 2 * math.log(2))):
        policy = lambda obs, log_std=log_std: (obs, torch.full_like(obs, log_std))  # noqa: E731
        entropies = {m.entropy(policy, torch.zeros(20_000, 2)) for _ in range(2)}
        assert len(entropies) == 1 and entropies.pop() == pytest.approx(expected, abs=0.06)


# --- runs ---


def test_settings():
    def resolved(flags):
        args = tyro.cli(m.Args, args=flags.split())
        return m.resolve(args, parse_task(args.env))

    a = resolved("")
    assert (a.horizon, a.reference, a.exp_name, a.fast_lr / a.slow_lr) == (1000, "bc", "armor", pytest.approx(1000))
    assert resolved("--env maze2d-umaze").horizon == 300 and resolved("--model-buffer-size 256").pairs_kept == 256
    a = resolved("--model-ratio 0")
    assert (a.reference, a.exp_name, a.clone) == ("data", "atac", "data")
    assert resolved("--model-ratio 0 --reference bc").reference == "bc"
    assert resolved("--warm-start-updates 0 --reference runs/x").clone == "copy"
    bad = "--model-ratio 1; --model-ratio 0.001; --reference data; --clone copy; --pairs-kept 255; "
    bad += "--warm-start-updates 0; --warm-start-updates 0 --reference runs/x --clone data; --target-weight 1.1; "
    bad += "--beta -1; --v-max 0; --slow-lr nan; --dynamics-weight-decay 1"
    for flags in bad.split("; "):
        with pytest.raises(UserError):
            resolved(flags)


SMALL = """--env hopper-medium-replay --total-updates 40 --batch-size 20 --hidden 16 16 --dynamics-hidden 16 --horizon 7
--dynamics-max-epochs 2 --warm-start-updates 30 --pairs-kept 330 --eval-every 20 --eval-episodes 2 --num-threads 1
--log-every 10 --checkpoint-every 20"""  # D_model gets 20 pairs an update, and is overwritten from the 17th on
NETS = ("policy", "qf", "target_qf")


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """40 episodes of 50 steps; every other one ends by a terminal without a successor."""
    rng, path, n = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "small.hdf5", np.arange(2000)
    obs = rng.normal(size=(2000, 11)).cumsum(0) * 0.01
    obs[:, 0], obs[:, 1], terminals = 1.2, 0.0, n % 100 == 99
    with h5py.File(path, "w") as f:
        f["observations"], f["actions"] = obs.astype("f4"), rng.uniform(-1, 1, (2000, 3)).astype("f4")
        f["rewards"], f["terminals"], f["timeouts"] = rng.normal(size=2000).astype("f4"), terminals, n % 100 == 49
    return path


@pytest.fixture(scope="module")
def train(data_file):
    def run(folder, flags=""):
        m.main(tyro.cli(m.Args, args=f"{SMALL} --dataset {data_file} --run-dir {folder} {flags}".split()))
        return max(folder.iterdir(), key=lambda run: run.stat().st_mtime)

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The run that nothing interrupts."""
    return train(tmp_path_factory.mktemp("whole"))


def state(folder, phase="agent"):
    return torch.load(folder / f"{phase}.pt", weights_only=True)


def lines(folder, key):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in row]


def same(x, y, *names):
    return all(torch.equal(v, y[name][k]) for name in names for k, v in x[name].items() if torch.is_tensor(v))


def test_a_run_compares_the_policy_with_its_reference(whole):
    evals, losses = lines(whole, "eval/return"), lines(whole, "q/alpha")
    result = json.loads((whole / "result.json").read_text())
    assert [e["update"] for e in evals] == [20, 40] and [r["update"] for r in losses] == [10, 20, 30, 40]
    assert evals[0]["reference/return"] == evals[1]["reference/return"] == result["reference_return"]
    for gain, name in (("improvement", "return"), ("discounted_improvement", "discounted_return")):
        for e in evals:
            assert e[f"reference/{gain}"] == pytest.approx(e[f"eval/{name}"] - e[f"reference/{name}"])
        assert e[f"reference/{gain}"] == result[gain]
    assert 0 < losses[0]["q/policy_shift"] < 0.1
    assert len({r["model/nll_fitted"] for r in losses}) == 1 < len({r["model/nll"] for r in losses})
    assert [r["model/warm_start_update"] for r in lines(whole, "losses/clone")] == [10, 20, 30]


def test_a_run_killed_in_every_phase_ends_in_the_same_weights(train, whole, tmp_path, monkeypatch):
    def killed(key, value, flags=""):
        def log(self, update, metrics):
            plain(self, update, metrics)
            if ({"update": update} | metrics).get(key) == value:
                self.metrics.close()  # as the end of the process does
                raise KeyboardInterrupt

        plain = m.Run.log
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(m.Run, "log", log)
            train(tmp_path, flags)

    for key, value in (("model/epoch", 2), ("model/warm_start_update", 30), ("update", 30)):
        killed(key, value)
    assert same(state(whole), state(train(tmp_path)), *NETS, "model", "rollouts")
    given = f"--reference {whole} --exp-name second --eval-episodes 0"  # with rollouts in its warm start
    once = train(tmp_path / "once", given)
    for key, value in (("model/warm_start_update", 30), ("update", 30)):
        killed(key, value, given)
    assert same(state(once), state(train(tmp_path, given)), *NETS, "model", "rollouts")


def test_atac_begins_where_armor_begins_and_may_take_its_warm_start(train, whole, tmp_path, monkeypatch):
    own = train(tmp_path / "own", flags := "--model-ratio 0 --eval-episodes 0")
    assert same(state(own, "warm_start"), state(whole, "warm_start"), *NETS)
    assert not {"model", "rollouts"} & state(own).keys()
    monkeypatch.setattr(m.ARMOR, "warm_start_update", None)  # nothing is trained before the game
    given = f"--warm-start-from {whole}/warm_start.pt"
    assert same(state(own), state(train(tmp_path / "taken", f"{flags} {given}")), *NETS)
    mopos = state(whole, "dynamics")
    mopos["config"]["decides"]["dynamics"]["ensemble_size"] = 7
    torch.save(mopos, tmp_path / "mopo.pt")
    wrong = {"gamma": f"{given} --gamma 0.9", "cloned": f"{given} --reference {whole}"}
    for word, flags in (wrong | {"ensemble_size": f"--dynamics-from {tmp_path}/mopo.pt"}).items():
        with pytest.raises(UserError, match=f"differs in .*{word}"):
            train(tmp_path / word, flags)


def test_a_run_improves_on_another_run(train, whole, tmp_path, monkeypatch):
    theirs, fitted, seen, steps = state(whole)["policy"], state(whole, "dynamics")["dynamics"], [], []
    warm_up, advance = m.ARMOR.warm_start_update, m.Rollouts.advance

    def spy(self, step, starts, policy, reference, model):
        steps.append((step, starts, same({"M": fitted}, {"M": model.state_dict()}, "M")))
        assert same({"net": theirs}, {"net": reference.state_dict()}, "net")
        return advance(self, step, starts, policy, reference, model)

    monkeypatch.setattr(m.ARMOR, "warm_start_update", lambda self, *a: (seen.append(a), warm_up(self, *a))[1])
    monkeypatch.setattr(m.Rollouts, "advance", spy)
    folder = train(tmp_path, f"--reference {whole} --exp-name second")
    assert [len(a[0]) for a in seen] == [10] + 29 * [20] and {a[-1] for a in seen} == {None}  # nothing is cloned
    assert [step for step, *_ in steps] == [*range(1, 31), *range(1, 41)]
    assert all(as_fitted for *_, as_fitted in steps[:30]) and not steps[-1][-1]
    assert all(torch.equal(a[0][:10], s) for a, (_, s, _) in zip(seen, steps, strict=False))  # rollouts from data rows
    assert same({"policy": theirs}, state(folder, "warm_start"), "policy")  # pi begins as the reference itself
    assert not same({"policy": theirs}, state(folder), "policy") and state(folder)["rollouts"]["added"] == 40 * 20
    evals, given = lines(folder, "eval/return"), lines(whole, "eval/return")[-1]  # as that run evaluated itself
    assert all(e[f"reference/{k}"] == given[f"eval/{k}"] for e in evals for k in ("return", "discounted_return"))
    assert train(tmp_path, f"--reference {whole}/agent.pt --exp-name second") == folder  # the same by another name
    with pytest.raises(UserError, match="--reference"):
        train(tmp_path, "--exp-name second")


def test_a_copied_policy_is_allowed_by_its_target_entropy(train, tmp_path, collector):
    sac, own = collector.Policy(11, 3, 16), 3 * (-3 + 0.5 * math.log(2 * math.pi * math.e))
    with torch.no_grad():
        sac.head.bias[3:] = -3.0  # of the log standard deviation
        sac.head.weight.mul_(0.01)
    torch.save({"agent": {"policy": sac.state_dict()}}, tmp_path / "policy_7.pt")
    given = f"--reference {tmp_path}/policy_7.pt --total-updates 1 --model-ratio 0 --eval-episodes 0 --exp-name x"
    for more, expected in (("", pytest.approx(own, abs=0.2)), ("--target-entropy -2", -2), ("--clone data", -3)):
        folder = train(tmp_path / str(len(more)), f"{given} --warm-start-updates 1 {more}")
        assert lines(folder, "q/alpha")[0]["q/target_entropy"] == expected


def test_the_game_holds_out_what_the_fit_held_out_and_ramps_the_model(train, data_file, tmp_path, monkeypatch):
    seen, ramps, update = [], [], m.ARMOR.update
    monkeypatch.setattr(m.ARMOR, "ramp_model", lambda self, step: ramps.append(step))
    monkeypatch.setattr(m.ARMOR, "update", lambda self, *a: (seen.append((*a, self.v_max)), update(self, *a))[1])
    flags = "--batch-size 2000 --model-ratio 0.7 --pairs-kept 2000 --warm-start-updates 1"
    folder = train(tmp_path, f"{flags} --total-updates 3")
    assert ramps == [1, 2, 3] and [(len(a[0]), len(a[6][0])) for a in seen] == [(600, 0), (600, 1400), (600, 1400)]
    with h5py.File(data_file) as f:
        act = torch.tensor(f["actions"][:])[np.arange(2000) % 50 != 49]
    order = torch.randperm(len(act), generator=torch.Generator().manual_seed(0))
    held_out = {tuple(row) for row in act[order[: int(0.2 * len(act))]].tolist()}
    for _, act, _, _, terminated, known, *_ in seen:
        out = torch.tensor([tuple(row) in held_out for row in act.tolist()])
        assert torch.equal(~known, out | (terminated > 0)) and 0 < out.sum() < len(out)
    assert seen[0][-1].item() == lines(folder, "q/alpha")[0]["model/reward_error_fitted"]  # V_max
