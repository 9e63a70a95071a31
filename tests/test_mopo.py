"""Facts about MOPO and COMBO: penalties, rollouts, buffer and conservative term against numbers worked by hand."""

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch
import tyro
from test_romi_cql import toy

from utils import Dataset, UserError, parse_task

CPU = torch.device("cpu")
HOPPER = parse_task("hopper-medium-replay")
SMALL = {
    "dynamics_hidden": 16,
    "hidden": (16,),
    "rollout_starts": 200,
    "horizon": 4,
    "batch_size": 20,
    "policy_lr": 1e-3,
    "policy_lr_decay": 0,
}
OWN = {
    "mopo": {"penalty_coef": 2.0},
    "combo": {"beta": 3.0, "rollout_policy": "policy", "rho_states": "mix", "model_ratio": 0.5, "qf_lr": 1e-3, "cql_samples": 3},
}
mopo, combo = (importlib.import_module(name) for name in OWN)
MOPO, COMBO = (replace(importlib.import_module(name).Args(exp_name=name), **SMALL, **own) for name, own in OWN.items())
both = pytest.mark.parametrize("m, args", [(mopo, MOPO), (combo, COMBO)], ids=["mopo", "combo"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class FixedModel:
    """A model of 7 members whose means move state 0 by `step` and nothing else, with given standard deviations (E, 1+O)."""

    def __init__(self, std, step=0.0, reward=1.0):
        self.spread, self.step, self.reward, self.elites, self.seen = std, step, reward, torch.arange(5), []
        self.mean, self.std = torch.full((std.shape[1] - 1 + 2,), 0.5), torch.full((std.shape[1] - 1 + 2,), 2.0)  # of the inputs

    def inputs(self, cond, act):
        return (torch.cat([cond, act], -1) - self.mean) / self.std

    def raw(self, x):
        return x * self.std + self.mean

    def __call__(self, x, members=None):
        mean = torch.zeros(len(x), x.shape[1], self.spread.shape[1])
        mean[..., 0], mean[..., 1] = self.reward, self.step
        std = self.spread if members is None else self.spread[members]
        return mean, 2 * std.log()[:, None].expand(len(x), x.shape[1], -1)

    def sample(self, cond, act):
        self.seen.append(cond)
        out = cond.clone()
        out[:, 0] += self.step
        return out, torch.full((len(cond),), self.reward)


class Straight:
    """A policy that stands still."""

    def __call__(self, obs):
        return torch.zeros(len(obs), 2), torch.full((len(obs), 2), -5.0)


def never(obs, act, next_obs):
    return torch.zeros(len(obs), dtype=torch.bool)


# --- penalty (spec 6d) ---


def test_penalty_is_the_largest_norm_of_the_predicted_standard_deviations():
    std = torch.tensor([[3.0, 4.0], [1.0, 1e-6]])  # reward and one state dimension
    logvar = 2 * std.log()[:, None]  # (2, 1, 2)
    for mean in (torch.zeros(2, 1, 2), 100 * torch.randn(2, 1, 2)):  # means do not matter
        assert mopo.penalty_of("aleatoric", mean, logvar).item() == pytest.approx(5.0)


def test_other_penalties_measure_how_members_disagree_about_the_state():
    mean = torch.tensor([[[9.0, 0.0, 0.0]], [[-9.0, 6.0, 0.0]], [[0.0, 0.0, 3.0]]])  # mean state (2, 1), rewards do not matter
    logvar = torch.randn(3, 1, 3)
    # distances to (2, 1): sqrt 5, sqrt 17, sqrt 8; variances over members: 8 and 2
    assert mopo.penalty_of("pairwise_diff", mean, logvar).item() == pytest.approx(17**0.5)
    assert mopo.penalty_of("ensemble_std", mean, logvar).item() == pytest.approx(5**0.5)


def test_imagined_rewards_are_penalised_by_all_members_not_only_elites():
    std = torch.full((7, 3), 1e-6)
    std[6, :2] = torch.tensor([3.0, 4.0])  # the seventh is no elite; u = 5, r = 1, lambda = 2: -9
    rows, stats = mopo.imagine(torch.randn(50, 2), FixedModel(std), Straight(), never, MOPO)
    rew = mopo.unpack(rows, 2, 2)[2]
    assert rew.tolist() == pytest.approx([-9.0] * 800)
    assert stats["model/penalty_mean"] == pytest.approx(5.0) and stats["model/imagined_penalized_reward_mean"] == pytest.approx(-9.0)
    assert stats["model/imagined_reward_min"] == pytest.approx(1.0, abs=1e-5) == stats["model/imagined_reward_max"]  # as the data's
    for kind in ("pairwise_diff", "ensemble_std"):  # members agree here
        rew = mopo.unpack(mopo.imagine(torch.randn(50, 2), FixedModel(std), Straight(), never, replace(MOPO, penalty=kind))[0], 2, 2)[2]
        assert rew.tolist() == pytest.approx([1.0] * 800)
    rew = mopo.unpack(mopo.imagine(torch.randn(50, 2), FixedModel(std), Straight(), never, replace(MOPO, penalty_coef=0.0))[0], 2, 2)[2]
    assert rew.tolist() == [1.0] * 800


def test_penalty_is_that_of_the_state_before_the_step():
    class Foggy(FixedModel):
        """Uncertain where state 0 is large: spread = state 0."""

        def __call__(self, x, members=None):
            mean, _ = super().__call__(x)
            return mean, 2 * self.raw(x)[..., :1].abs().log().expand(-1, -1, 3)

    rows, _ = mopo.imagine(torch.full((5, 2), 2.0), Foggy(torch.ones(7, 3), step=1.0), Straight(), never, MOPO)
    rew = mopo.unpack(rows, 2, 2)[2].view(4, 200)  # states 2, 3, 4, 5: 1 - 2 sqrt(3) s
    for i in range(4):
        assert rew[i].tolist() == pytest.approx([1 - 2 * 3**0.5 * (2 + i)] * 200, rel=1e-5)


# --- rollouts ---


@both
def test_rollouts_start_in_the_data_and_follow_the_model(m, args):
    starts = torch.randn(50, 2)
    rows, _ = m.imagine(starts, FixedModel(torch.full((7, 3), 1e-3), step=0.1), Straight(), never, args)
    obs, _, _, next_obs, terminated = m.unpack(rows, 2, 2)
    assert len(rows) == 4 * 200 and not terminated.any()
    obs, next_obs = obs.view(4, 200, 2), next_obs.view(4, 200, 2)
    assert all((o == starts).all(1).any() for o in obs[0])
    assert torch.equal(obs[1:], next_obs[:-1])  # forward consistent, bit for bit


@both
def test_rollouts_draw_their_actions_from_the_policy(m, args):
    class Wide:
        def __call__(self, obs):
            return torch.full((len(obs), 2), 0.3), torch.zeros(len(obs), 2)

    wide = replace(args, rollout_starts=20_000, horizon=1)
    act = m.unpack(m.imagine(torch.randn(50, 2), FixedModel(torch.full((7, 3), 1e-3)), Wide(), never, wide)[0], 2, 2)[1].atanh()
    assert act.mean().item() == pytest.approx(0.3, abs=0.03) and act.std().item() == pytest.approx(1.0, abs=0.03)


@both
def test_a_rollout_that_ended_does_not_go_on(m, args):
    starts = torch.tensor([[0.0, 0.0], [0.25, 0.0]])
    ends = lambda obs, act, next_obs: next_obs[:, 0] > 0.35  # noqa: E731 - after 4 steps from 0, after 2 from 0.25
    model = FixedModel(torch.full((7, 3), 1e-3), step=0.1)
    rows, stats = m.imagine(starts, model, Straight(), ends, args)
    obs, _, _, next_obs, terminated = m.unpack(rows, 2, 2)
    late = (obs[:200, 0] == 0.25).sum().item()
    assert 0 < late < 200 and len(rows) == 2 * late + 4 * (200 - late)
    assert torch.equal(terminated > 0, next_obs[:, 0] > 0.35) and terminated.sum() == 200
    assert obs[:, 0].max() < 0.36
    assert stats["model/imagined_alive_at_last_step"] == (200 - late) / 200


@both
def test_all_rollouts_may_end_at_once(m, args):
    always = lambda obs, act, next_obs: torch.ones(len(obs), dtype=torch.bool)  # noqa: E731
    rows, stats = m.imagine(torch.randn(5, 2), FixedModel(torch.full((7, 3), 1e-3)), Straight(), always, args)
    assert len(rows) == 200 and m.unpack(rows, 2, 2)[4].all() and stats["model/imagined_alive_at_last_step"] == 0


@both
def test_hopper_falls_on_both_sides_of_its_bounds(m, args):
    ends, obs = m.termination_fn(HOPPER, None), torch.zeros(4, 11)
    obs[:, 0] = 1.2
    obs[1, 5], obs[2, 5], obs[3, 0] = 101, -101, 0.69
    assert ends(None, None, obs).tolist() == [False, True, True, True]


def test_uniform_rollouts_change_the_actions_only():
    args = replace(COMBO, rollout_policy="uniform", rollout_starts=20_000, horizon=1)
    acts = combo.unpack(combo.imagine(torch.randn(50, 2), FixedModel(torch.full((7, 3), 1e-3)), Straight(), never, args)[0], 2, 2)[1]
    assert acts.abs().max() <= 1 and acts.mean().abs() < 0.02 and acts.var() == pytest.approx(1 / 3, abs=0.01)
    acts = combo.unpack(combo.imagine(torch.randn(50, 2), FixedModel(torch.full((7, 3), 1e-3)), Straight(), never, COMBO)[0], 2, 2)[1]
    assert acts.abs().max() < 0.05  # of the policy, which stands still


# --- buffer ---


class Stub:
    """Stands in for a Run."""

    def __init__(self, state=None):
        self.state, self.rows = state or {}, []

    def log(self, update, metrics):
        self.rows.append((update, metrics))


def buffer(m, args, monkeypatch, run, rows_of=lambda call: 10):
    """A ModelBuffer whose rollouts are rows full of their number, 1, 2, ..."""
    calls = []
    data = Dataset(torch.randn(5, 11), torch.zeros(5, 3), *[torch.zeros(5)] * 5)

    def imagine(starts, dynamics, policy, terminates, args):
        assert torch.equal(starts, data.obs)
        calls.append((torch.rand(1).item(), {k: v.clone() for k, v in policy.state_dict().items()}))
        return torch.full((rows_of(len(calls)), 27), float(len(calls))), {"x": 0}

    monkeypatch.setattr(m, "imagine", imagine)
    return m.ModelBuffer(HOPPER, data, m.Dynamics(11, 3, args), args, CPU, run), calls


@both
def test_the_buffer_holds_the_last_rollouts_and_nothing_else(m, args, monkeypatch):
    policy, run = m.Policy(11, 3, args.hidden), Stub()
    stored, _ = buffer(m, args, monkeypatch, run, rows_of=lambda call: 10 * call)
    before = torch.get_rng_state()
    for i in range(6):
        stored.add(1_000 * i, policy.state_dict())
        assert stored.rows[:, 0].unique().tolist() == list(range(max(1, i - 3), i + 2))  # the first is gone with the sixth
    assert torch.equal(before, torch.get_rng_state())  # the learner's random numbers do not depend on rollouts
    assert len(stored.rows) == 20 + 30 + 40 + 50 + 60 and [u for u, _ in run.rows] == [0, 1000, 2000, 3000, 4000, 5000]
    drawn = stored(20_000)[:, 0]
    for i in range(2, 7):  # every row is as likely as any other
        assert (drawn == i).float().mean().item() == pytest.approx(i / 20, abs=0.02)


@both
def test_a_checkpoint_gives_the_same_rollouts_again(m, args, monkeypatch):
    run, policies = Stub(), [m.Policy(11, 3, args.hidden).state_dict() for _ in range(7)]
    stored, calls = buffer(m, args, monkeypatch, run)
    for i, policy in enumerate(policies):
        stored.add(1_000 * i, policy)
    seeds, used = zip(*calls, strict=True)
    assert len(set(seeds)) == 7  # a seed of its own each
    again = Stub({"rollout_policies": stored.policies})
    seeds_again, used_again = zip(*buffer(m, args, monkeypatch, again)[1], strict=True)
    assert seeds_again == seeds[-5:] and not again.rows
    for policy, (_, kept), a, b in zip(policies[-5:], stored.policies, used[-5:], used_again, strict=True):
        for k, v in policy.items():  # the policy at hand imagines, each snapshot is its own, and the same five imagine again
            assert torch.equal(v, kept[k]) and torch.equal(v, a[k]) and torch.equal(v, b[k])


def test_batches_of_256_hold_12_and_128_real_rows(monkeypatch, tmp_path):
    for m, expected in ((mopo, 12), (combo, 128)):
        seen = []

        def update(self, obs, *rest, seen=seen):
            seen.append((obs[:, 0] != 7).tolist())
            return {}

        learner = m.SAC if m is mopo else m.COMBO
        monkeypatch.setattr(learner, "update", update)
        monkeypatch.setattr(m, "fitted_dynamics", lambda data, args, *a: m.Dynamics(11, 3, args))
        monkeypatch.setattr(m, "imagine", lambda *a: (torch.full((9, 27), 7.0), {}))
        m.main(m.Args(dataset="bundled", total_updates=3, eval_episodes=0, run_dir=str(tmp_path), num_threads=1))
        assert seen == [[True] * expected + [False] * (256 - expected)] * 3  # real rows first: COMBO's learner relies on it


# --- learner ---


def batch(n=40):
    return torch.randn(n, 2), 2 * torch.rand(n, 2) - 1, torch.randn(n), torch.randn(n, 2), (torch.rand(n) < 0.3).float()


def constant_q(agent, value, m):
    """Both Q functions and their targets give `value` everywhere."""
    for qf in (agent.qf, agent.target_qf):
        for q in (qf.q1, qf.q2):
            torch.nn.init.zeros_(q[-1].weight)
            torch.nn.init.constant_(q[-1].bias, value)


def learner(m, args):
    return (mopo.SAC if m is mopo else combo.COMBO)(2, 2, args, CPU)


def critic_loss(m, agent, rows):
    return agent.critic_loss(*rows, torch.tensor(0.5) if m is mopo else 20)


def set_q(qf, *values):
    for q, value in zip((qf.q1, qf.q2), values, strict=True):
        torch.nn.init.zeros_(q[-1].weight)
        torch.nn.init.constant_(q[-1].bias, value)


@both
def test_the_target_is_the_smaller_of_the_target_networks(m, args):
    agent, rows = learner(m, args), batch()
    set_q(agent.qf, 100.0, 200.0)
    metrics = []
    for values in ((3.0, 5.0), (5.0, 3.0), (3.0, 9.0)):
        set_q(agent.target_qf, *values)
        torch.manual_seed(1)
        metrics.append(critic_loss(m, agent, rows)[1]["q/target"].item())
    assert metrics[0] == metrics[1] == metrics[2]  # of both orders, and the larger one does not matter
    set_q(agent.target_qf, 4.0, 4.0)
    torch.manual_seed(1)
    rise = 0.99 * (1 - rows[4]).mean().item()  # one more in Q is gamma more in the target of rows that go on
    assert critic_loss(m, agent, rows)[1]["q/target"].item() == pytest.approx(metrics[0] + rise, rel=1e-4)


@both
def test_policy_loss_is_alpha_log_pi_minus_the_smaller_q(m, args):
    agent, obs = learner(m, args), torch.randn(40, 2)
    set_q(agent.qf, 2.0, 7.0)
    torch.manual_seed(1)
    loss, log_prob = agent.policy_loss(obs, torch.tensor(0.5))
    torch.manual_seed(1)
    mean, log_std = agent.policy(obs)
    expected = m.squash(mean, log_std, torch.randn_like(mean))[1].mean()
    assert log_prob.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * expected.item() - 2.0, rel=1e-5)


@both
def test_the_policy_climbs_q(m, args, monkeypatch):
    agent = learner(m, replace(args, policy_lr=1e-2))
    monkeypatch.setattr(agent.qf, "forward", lambda obs, act: -((act - 0.5) ** 2).sum(-1).expand(2, -1) * 100)
    obs = torch.randn(40, 2)
    for _ in range(300):
        m.descend(agent.policy_opt, agent.policy_loss(obs, torch.tensor(0.01))[0])
    assert (agent.act(obs) - 0.5).abs().max() < 0.1


@both
def test_targets_follow_by_tau(m, args):
    agent = learner(m, replace(args, tau=0.25))
    old = [p.clone() for p in agent.target_qf.parameters()]
    agent.update(*batch(), *([0] if m is mopo else [20, 0]))
    for before, target, online in zip(old, agent.target_qf.parameters(), agent.qf.parameters(), strict=True):
        torch.testing.assert_close(target, 0.75 * before + 0.25 * online)


def test_sac_target_is_the_soft_value_unless_the_state_was_terminal():
    agent = mopo.SAC(2, 2, MOPO, CPU)
    constant_q(agent, 3.0, mopo)
    obs, act, rew, next_obs, _ = batch()
    torch.nn.init.zeros_(agent.policy.net[-1].weight)
    torch.nn.init.constant_(agent.policy.net[-1].bias, 0.0)
    for ended in (0.0, 1.0):
        torch.manual_seed(1)
        loss, metrics = agent.critic_loss(obs, act, rew, next_obs, torch.full((40,), ended), torch.tensor(0.5))
        torch.manual_seed(1)
        log_prob = mopo.squash(torch.zeros(40, 2), torch.zeros(40, 2), torch.randn(40, 2))[1]
        target = rew + 0.99 * (1 - ended) * (3.0 - 0.5 * log_prob)
        assert loss.item() == pytest.approx(2 * (3.0 - target).square().mean().item(), rel=1e-5)
        assert metrics["q/target"].item() == pytest.approx(target.mean().item(), rel=1e-5)


@both
def test_temperature_rises_when_entropy_is_below_its_target(m, args):
    for target, sign in ((50.0, 1), (-50.0, -1)):
        agent = (mopo.SAC if m is mopo else combo.COMBO)(2, 2, replace(args, target_entropy=target), CPU)
        agent.update(*batch(), *([0] if m is mopo else [20, 0]))
        assert math.copysign(1, agent.log_alpha["sac"].item()) == sign


@both
def test_an_update_takes_its_steps_in_order_with_the_temperature_at_hand(m, args, monkeypatch):
    agent, order, alphas = learner(m, args), [], []
    torch.nn.init.constant_(agent.log_alpha["sac"], math.log(0.3))
    plain_critic, plain_policy = agent.critic_loss, agent.policy_loss
    stepped = {id(agent.qf_opt): "q", id(agent.policy_opt): "policy", id(agent.alpha_opt): "temperature"}
    plain_descend = m.descend
    monkeypatch.setattr(m, "descend", lambda opt, *a, **k: (order.append(stepped[id(opt)]), plain_descend(opt, *a, **k)))
    monkeypatch.setattr(agent, "critic_loss", lambda *rows: (alphas.append(rows[-1]), plain_critic(*rows))[1])
    monkeypatch.setattr(agent, "policy_loss", lambda obs, alpha: (alphas.append(alpha), plain_policy(obs, alpha))[1])
    metrics = agent.update(*batch(), *([0] if m is mopo else [20, 0]))
    assert order == ["q", "policy", "temperature"]
    alphas = alphas[m is combo :]  # COMBO's critic has none: no entropy in the backup
    assert [a.item() for a in alphas] == pytest.approx([0.3] * len(alphas)) and metrics["q/alpha"].item() == pytest.approx(0.3)


@both
def test_policy_rate_follows_its_cosine(m, args):
    agent = (mopo.SAC if m is mopo else combo.COMBO)(2, 2, replace(args, policy_lr_decay=100), CPU)
    for step, rate in ((0, 1.0), (50, 0.5), (100, 0.0), (150, 0.0)):
        agent.update(*batch(), *([step] if m is mopo else [20, step]))
        assert agent.policy_opt.param_groups[0]["lr"] == pytest.approx(rate * 1e-3)
    before = [p.clone() for p in agent.policy.parameters()]
    agent.update(*batch(), *([150] if m is mopo else [20, 150]))
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))


# --- conservative term (spec 2.3, 7d) ---


def test_soft_maximum_of_a_constant_is_the_volume_of_the_box():
    q, density = torch.full((2, 5, 12), 7.0), torch.full((5, 12), 3 * math.log(0.5))
    assert combo.soft_maximum(q, density)[0].tolist() == pytest.approx([7 + 3 * math.log(2) + math.log(12)] * 5)
    with pytest.raises(AssertionError):
        combo.soft_maximum(q.view(2, 20, 3), density)  # 3 terms where 3N belong


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_maximum_is_the_integral_over_actions(temperature):
    """Q(a) = sin 3a on [-1, 1], actions drawn uniformly and around 0.2: T log of the integral of exp(Q / T)."""
    grid = torch.linspace(-1, 1, 20_001)
    exact = temperature * (torch.trapezoid((torch.sin(3 * grid) / temperature).exp(), grid)).log().item()
    half = 100_000
    normal = torch.distributions.Normal(0.0, 0.5)
    u = normal.sample((half,))
    squashed = u.tanh()
    acts = torch.cat([2 * torch.rand(half) - 1, squashed])
    density = torch.cat([torch.full((half,), math.log(0.5)), normal.log_prob(u) - (1 - squashed**2).log()])
    estimate = combo.soft_maximum(torch.sin(3 * acts).expand(2, 1, -1), density[None], temperature)
    expected = [exact + temperature * math.log(2 * half)] * 2  # up to the log of the number of terms
    assert estimate[:, 0].tolist() == pytest.approx(expected, abs=0.02)


def test_bfloat16_leaves_targets_alone_and_changes_the_conservative_term_by_its_rounding():
    a, b = (combo.COMBO(2, 2, replace(COMBO, hidden=(16, 16, 16), bf16=bf16), CPU) for bf16 in (False, True))
    b.load_state_dict(a.state_dict())
    rows, out = batch(), []
    for agent in (a, b):
        torch.manual_seed(5)
        out.append(agent.critic_loss(*rows, 20)[1])
    assert torch.equal(out[0]["q/target"], out[1]["q/target"]) and torch.equal(out[0]["q/data"], out[1]["q/data"])
    full, rounded = (o["losses/conservative"].item() for o in out)
    assert full != rounded == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("where, rows", [("mix", 40), ("model", 30)])
def test_every_state_of_rho_is_pushed_down_with_3n_actions(monkeypatch, where, rows):
    agent, shapes = combo.COMBO(2, 2, replace(COMBO, rho_states=where), CPU), []
    plain = combo.soft_maximum

    def spy(q, density, temperature):
        shapes.append((q.shape, density.shape))
        return plain(q, density, temperature)

    monkeypatch.setattr(combo, "soft_maximum", spy)
    seen, plain_q, data = [], agent.qf.forward, batch()
    monkeypatch.setattr(agent.qf, "forward", lambda obs, act: (seen.append(obs), plain_q(obs, act))[1])
    agent.critic_loss(*data, 10)
    assert shapes == [((2, rows, 9), (rows, 9))]
    assert torch.equal(seen[1], data[0][40 - rows :, None].expand(-1, 9, -1))  # real rows stand first
    agent.critic_loss(*batch(), 40)  # no imagined rows at all: the states that there are
    assert shapes[1] == ((2, 40, 9), (40, 9))


def conservative(agent, args, rows, num_real):
    """The conservative term alone, both Q functions: the loss less that without it, on the same random numbers."""
    losses = []
    for beta in (args.beta, 0.0):
        agent.args = replace(args, beta=beta)
        torch.manual_seed(2)
        losses.append(agent.critic_loss(*rows, num_real)[0])
    agent.args = args
    return losses[0] - losses[1]


def test_only_real_rows_are_pushed_up_each_by_beta_over_their_number(monkeypatch):
    agent, rows, seen = combo.COMBO(2, 2, COMBO, CPU), batch(), []

    class Spy(torch.nn.Module):
        def __init__(self, qf):
            super().__init__()
            self.qf = qf

        def forward(self, obs, act):
            q = self.qf(obs, act)
            if q.requires_grad:
                q.retain_grad()
                seen.append(q)
            return q

    agent.qf = Spy(agent.qf)
    conservative(agent, COMBO, rows, 10).backward()
    on_rows = seen[0].grad + seen[2].grad  # TD gradients of the two losses cancel
    expected = torch.zeros(2, 40)
    expected[:, :10] = -3.0 / 10
    torch.testing.assert_close(on_rows, expected, atol=1e-6, rtol=0)
    down = seen[1].grad  # (2, B, 3N): a softmax for every state, so its gradient sums to beta
    assert (down >= 0).all() and down.sum((1, 2)).tolist() == pytest.approx([3.0, 3.0], rel=1e-4)


def test_a_step_on_the_term_alone_lowers_q_off_the_data_and_raises_it_on_the_data():
    agent, rows = combo.COMBO(2, 2, COMBO, CPU), batch()
    opt = torch.optim.SGD(agent.qf.parameters(), lr=1e-2)
    anywhere = 2 * torch.rand(40, 2) - 1
    before = agent.qf(rows[0], rows[1])[:, :10].mean().item() - agent.qf(rows[0], anywhere).mean().item()
    for _ in range(20):
        opt.zero_grad()
        conservative(agent, COMBO, rows, 10).backward()
        opt.step()
    assert agent.qf(rows[0], rows[1])[:, :10].mean().item() - agent.qf(rows[0], anywhere).mean().item() > before + 0.05


def test_without_beta_it_is_sac_on_the_mix_without_entropy_in_the_backup():
    agent = combo.COMBO(2, 2, replace(COMBO, beta=0.0), CPU)
    constant_q(agent, 3.0, combo)
    obs, act, rew, next_obs, terminated = batch()
    loss, _ = agent.critic_loss(obs, act, rew, next_obs, terminated, 10)
    target = rew + 0.99 * (1 - terminated) * 3.0
    assert loss.item() == pytest.approx(2 * (3.0 - target).square().mean().item(), rel=1e-5)


def test_without_model_rows_the_critic_loss_is_that_of_cql(monkeypatch):
    cql = importlib.import_module("romi_cql")
    other = cql.CQL(2, 2, replace(cql.Args(), hidden=(16,), cql_samples=3, cql_alpha=3.0), CPU)
    mine = combo.COMBO(2, 2, COMBO, CPU)
    for name in ("policy", "qf", "target_qf"):
        getattr(mine, name).load_state_dict(getattr(other, name).state_dict())
    noise = {}  # the two draw in another order: give every call of one shape the same numbers
    zeros = lambda *size, device=None: noise.setdefault(size, torch.zeros(*size))  # noqa: E731
    rows = batch()
    monkeypatch.setattr(torch, "randn", zeros)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.linspace(0, 1, math.prod(size)).view(size))
    td_loss, penalty, _ = other.critic_loss(*rows)
    loss, metrics = mine.critic_loss(*rows, 40)
    assert loss.item() == pytest.approx((td_loss + 3.0 * penalty).item(), rel=1e-5)
    assert metrics["losses/conservative"].item() == pytest.approx(penalty.item(), rel=1e-5)


# --- model error ---


@both
def test_model_error_is_measured_along_real_episodes(m, args):
    """Real states grow by 1 a step in dimension 0; the model says 0.9: errors 0.1 and 0.4 there, over two dimensions with deviation 2."""
    episodes = [torch.stack([torch.arange(9.0), torch.zeros(9)], 1).numpy(), torch.zeros(3, 2).numpy()]
    model = FixedModel(torch.full((7, 3), 1e-3), step=0.9)
    act = lambda obs: torch.zeros(len(obs), 2)  # noqa: E731
    errors = m.model_error(model, act, episodes[:1], 4)
    assert errors["model/true_error_1"].item() == pytest.approx(0.05 / 2**0.5, rel=1e-4)
    assert errors["model/true_error_4"].item() == pytest.approx(0.2 / 2**0.5, rel=1e-4)
    assert m.model_error(model, act, episodes[:1], 1).keys() == {"model/true_error_1"}
    assert "model/true_error_4" not in m.model_error(model, act, episodes[1:], 4)  # too short


@both
def test_model_error_follows_the_actions_of_the_episode(m, args):
    """The true system and the model both add the action: no error, unless actions and states get out of step."""

    class Adds(FixedModel):
        def __call__(self, x, members=None):
            mean = torch.zeros(len(x), x.shape[1], 3)
            mean[..., 1:] = self.raw(x)[..., 2:]
            return mean, mean

    states = [torch.randn(2)]
    act = lambda obs: torch.stack([obs[:, 1].sin(), obs[:, 0].cos()], 1)  # noqa: E731
    for _ in range(10):
        states.append(states[-1] + act(states[-1][None])[0])
    errors = m.model_error(Adds(torch.ones(7, 3)), act, [torch.stack(states).numpy()], 3)
    assert errors["model/true_error_1"] < 1e-6 and errors["model/true_error_3"] < 1e-6


# --- settings ---


def test_settings_come_from_preset_and_task():
    def resolved(m, *flags):
        args = tyro.cli(m.Args, args=flags)
        return m.resolve(args, parse_task(args.env))

    a = resolved(mopo)
    assert (a.horizon, a.penalty_coef, a.policy_lr, a.policy_lr_decay, a.total_updates) == (5, 2.5, 1e-4, 3_000_000, 3_000_000)
    assert a.target_entropy is None and a.exp_name == "mopo"
    a = resolved(mopo, "--preset", "v0", "--env", "halfcheetah-medium-expert")
    assert (a.horizon, a.penalty_coef, a.policy_lr, a.policy_lr_decay, a.total_updates) == (5, 5.0, 3e-4, 0, 1_000_000)
    assert a.target_entropy == -3
    assert resolved(mopo, "--penalty-coef", "0").exp_name == "mbpo" and resolved(mopo, "--model-ratio", "0").exp_name == "sac"
    assert resolved(mopo, "--total-updates", "7").policy_lr_decay == 3_000_000  # more updates later are the same run
    with pytest.raises(UserError, match="not one row"):
        resolved(mopo, "--model-ratio", "1e-9")
    a = resolved(combo, "--env", "hopper-medium")
    assert (a.horizon, a.beta, a.rollout_policy, a.rho_states, a.model_ratio) == (5, 5.0, "policy", "mix", 0.5)
    a = resolved(combo, "--preset", "v0", "--env", "walker2d-medium-expert")
    assert (a.horizon, a.beta, a.model_ratio, a.qf_lr, a.policy_lr) == (1, 5.0, 0.2, 1e-4, 1e-5)
    a = resolved(combo, "--preset", "v0", "--env", "hopper-medium-replay")
    assert (a.beta, a.rollout_policy, a.rho_states) == (1.0, "uniform", "model")
    assert a.exp_name == "combo_v0" and resolved(combo, "--beta", "0").exp_name == "combo_beta0"
    for m in (mopo, combo):  # past its decay the rate would be 0 while the temperature drifts on
        with pytest.raises(UserError, match="stands still"):
            resolved(m, "--total-updates", "3000001")
        assert resolved(m, "--total-updates", "3000001", "--policy-lr-decay", "0").policy_lr_decay == 0
    with pytest.raises(UserError, match="not one real row"):
        resolved(combo, "--model-ratio", "1")


def test_defaults_are_the_papers():
    for m, hidden in ((mopo, (256, 256)), (combo, (256, 256, 256))):
        args = m.resolve(m.Args(), HOPPER)
        assert (args.rollout_starts, args.rollout_every, args.rollouts_kept) == (50_000, 1_000, 5)
        assert (args.hidden, args.qf_lr, args.batch_size, args.gamma, args.tau) == (hidden, 3e-4, 256, 0.99, 0.005)
        assert (args.ensemble_size, args.num_elites, args.dynamics_hidden) == (7, 5, 200)
    assert mopo.Args().model_ratio == 0.95 and combo.Args().cql_samples == 10 and combo.resolve(combo.Args(), HOPPER).model_ratio == 0.5


def test_disagreement_needs_members_that_can_disagree():
    with pytest.raises(UserError, match="can disagree"):
        mopo.resolve(mopo.Args(penalty="pairwise_diff", ensemble_size=1, num_elites=1), HOPPER)


@both
def test_antmaze_without_an_end_at_the_goal_is_refused(m, args):
    obs, none = torch.zeros(5, 29), torch.zeros(5)
    rows = Dataset(obs, torch.zeros(5, 8), none, obs, none, torch.ones(5, dtype=torch.bool), none)
    with pytest.raises(UserError, match="ends at the goal"):
        m.termination_fn(parse_task("antmaze-medium-play"), rows)


TABLES = {  # spec/algorithms.md 6b, 7b: horizon and lambda; horizon and beta
    (mopo, "v0", "penalty_coef"): {
        "halfcheetah": ((5, 0.5), (1, 1), (5, 1), (5, 5)), "hopper": ((5, 1), (5, 5), (5, 1), (5, 1)),
        "walker2d": ((1, 1), (5, 5), (1, 1), (1, 2)),
    },
    (mopo, "v2", "penalty_coef"): {
        "halfcheetah": ((5, 0.5), (5, 0.5), (5, 0.5), (5, 2.5)), "hopper": ((5, 1), (5, 5), (5, 2.5), (5, 5)),
        "walker2d": ((1, 1), (5, 0.5), (1, 2.5), (1, 2.5)),
    },
    (combo, "v0", "beta"): {
        "halfcheetah": ((5, 0.5), (5, 0.5), (5, 0.5), (5, 0.5)), "hopper": ((5, 1), (5, 5), (5, 1), (5, 5)),
        "walker2d": ((1, 0.5), (1, 5), (1, 0.5), (1, 5)),
    },
    (combo, "v2", "beta"): {
        "halfcheetah": ((5, 0.5), (5, 0.5), (5, 0.5), (5, 5)), "hopper": ((5, 1), (5, 5), (5, 0.5), (5, 5)),
        "walker2d": ((1, 0.5), (1, 5), (1, 0.5), (1, 5)),
    },
}  # fmt: skip


@pytest.mark.parametrize("m, preset, weight", TABLES)
def test_every_task_of_the_tables_gets_its_settings(m, preset, weight):
    for robot, rows in TABLES[m, preset, weight].items():
        for kind, row in zip(("random", "medium", "medium-replay", "medium-expert"), rows, strict=True):
            args = m.resolve(m.Args(env=f"{robot}-{kind}", preset=preset), parse_task(f"{robot}-{kind}"))
            assert (args.horizon, getattr(args, weight)) == row, (robot, kind)


@both
def test_forward_model_is_fitted_on_rows_with_a_successor(m, args, monkeypatch, tmp_path):
    obs, act, rew, next_obs = toy(100)
    has_next = torch.arange(100) % 10 != 9
    next_obs[~has_next] = 1e6
    data, seen = Dataset(obs, act, rew, next_obs, (~has_next).float(), has_next, torch.arange(100) // 10), []

    class Stored(Stub):
        def save(self, phase, step, **parts):
            self.state |= parts | {"phase": phase}

    monkeypatch.setattr(m, "train_dynamics", lambda dynamics, cond, act, rew, pred, args, run: seen.extend((cond, pred)))
    run = Stored()
    m.fitted_dynamics(data, args, CPU, run, {"key": 1}, None)
    assert torch.equal(seen[0], obs[has_next]) and torch.equal(seen[1], next_obs[has_next])  # forwards
    assert run.state["phase"] == "policy" and json.dumps(run.state["model_key"]) == '{"key": 1}'


def test_bfloat16_changes_the_penalty_by_its_rounding_only():
    starts, model = torch.randn(50, 2), mopo.Dynamics(2, 2, MOPO)
    for p in model.weight:
        torch.nn.init.normal_(p, std=0.3)
    outcomes = []
    for bf16 in (False, True):
        torch.manual_seed(1)
        outcomes.append(mopo.imagine(starts, model, Straight(), never, replace(MOPO, bf16=bf16)))
    (a, x), (b, y) = outcomes
    changed = (mopo.unpack(a, 2, 2)[2] - mopo.unpack(b, 2, 2)[2]).abs()
    assert torch.equal(a[:, :4], b[:, :4]) and 0 < changed.max() < 0.05 * 2 * x["model/penalty_max"]
    assert y["model/penalty_mean"].item() == pytest.approx(x["model/penalty_mean"].item(), rel=0.02)
