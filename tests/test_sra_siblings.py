"""Facts about TD3+BC, AWAC and SAC-N in the place of IQL in SRA: their updates by hand; their runs, without the model and resumed."""

import ast
import importlib
import json
import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sra_iql
import torch
import tyro
from test_runs import assert_same_run, data_file, leaves, metrics  # noqa: F401 - a fixture among them
from test_sra_iql import ARGS, NAME, batch, flags_for, without_rewards
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from utils import UserError, load_dataset, load_expert, parse_task

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# script -> class of the learner, its networks that are trained, flags that make it small, settings that none of them takes from IQL
SCRIPTS = {
    "sra_td3bc": ("TD3BC", ("policy", "confidence", "qf"), (), {}),
    "sra_awac": ("AWAC", ("policy", "qf"), (), {"temperature": 0.5}),
    "sra_sacn": ("SACN", ("policy", "qf", "log_alpha"), ("--num-critics", "3"), {"num_critics": 3}),
}
SHARED = ("hidden", "batch_size", "learning_rate", "learning_rate_drop", "cosine_updates", "weight_decay")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


def agent(script, **changes):
    """A small learner whose targets are targets of their own."""
    m = importlib.import_module(script)
    own = {k: getattr(ARGS, k) for k in SHARED} | SCRIPTS[script][3] | changes
    normalizer = m.Normalizer(torch.zeros(2, 4))  # mean 0, std 0.001
    normalizer.mean.fill_(5.0)
    normalizer.std.fill_(2.0)
    a = getattr(m, SCRIPTS[script][0])(normalizer, 4, 2, m.Args(**own), CPU)
    for name in ("target_qf", "target_policy"):
        for p in getattr(a, name).parameters() if hasattr(a, name) else ():
            p.add_(0.1)
    return a


def parameters(a, *names):
    return {name: [p.detach().clone() for p in getattr(a, name).parameters()] for name in names}


def moved(before, a):
    return {k for k in before if any(not x.equal(y) for x, y in zip(before[k], getattr(a, k).parameters(), strict=True))}


def assert_close(a, b, names):
    for name in names:
        for x, y in zip(getattr(a, name).parameters(), getattr(b, name).parameters(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def compute_losses_twice(agent, monkeypatch, *names):
    """Every loss once more, with bfloat16 copies made anew of the weights: a stale copy would give another gradient."""
    learnt = [p for part in vars(agent).values() if isinstance(part, torch.nn.Module) for p in part.parameters() if p.requires_grad]

    def gradients(loss):
        loss = loss[0] if isinstance(loss, tuple) else loss
        found = torch.autograd.grad(loss.sum(), learnt, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    def twice(loss, *args):
        state, first = torch.get_rng_state(), loss(*args)
        after = torch.get_rng_state()
        torch.set_autocast_cache_enabled(False)
        torch.set_rng_state(state)
        second = loss(*args)
        torch.set_autocast_cache_enabled(True)
        torch.set_rng_state(after)
        assert torch.equal(gradients(first), gradients(second))
        return first

    for name in names:
        monkeypatch.setattr(agent, name, partial(twice, getattr(agent, name)))


def assert_bfloat16_is_close(full, half, networks, monkeypatch):
    """Over updates with large steps; every weight gets a gradient, no update works with stale copies of weights."""
    half.load_state_dict(full.state_dict())
    losses = [name for name in vars(type(half)) if name.endswith("_loss")]
    assert len(losses) >= 2
    compute_losses_twice(half, monkeypatch, *losses)
    rows = batch(40)
    for step in range(4):
        out = []
        for a in (full, half):
            torch.manual_seed(step)
            out.append(torch.stack(list(a.update(*rows, step).values())))
        torch.testing.assert_close(*out, rtol=0.05, atol=0.05)
        assert (out[0] != out[1]).any() and out[1].dtype == torch.float32
    for name in networks:
        assert all(p.grad.abs().sum() > 0 for p in getattr(half, name).parameters() if p.dim())
    with half.autocast():
        q = half.qf(*rows[:2])
    assert q.dtype == torch.float32 and (q != q.bfloat16()).any()  # the last layer is not rounded
    x = torch.tensor([[9.0] * 4, [9.01] * 4])
    with half.autocast():
        near = half.qf(x, torch.zeros(2, 2))
    assert (near[:, 0] != near[:, 1]).any()  # nor is the first


def adam(*networks):
    return [torch.optim.Adam(f.parameters(), lr=0.05, weight_decay=5e-3, fused=True) for f in networks]


def follow(target, online, tau=0.005):
    for slow, p in zip(target.parameters(), online.parameters(), strict=True):
        slow.copy_(slow + tau * (p.detach() - slow))


def gradients(loss, network):
    return torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)


# --- what is shared ---


def parts(script):
    """Names and sources of a script: its text without docstring, settings, learner and what belongs to it."""
    source = (ROOT / "algorithms" / f"{script}.py").read_text()
    tree, lines = ast.parse(source), source.splitlines()
    imports = [ast.get_source_segment(source, n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    body = {n.name: ast.get_source_segment(source, n) for n in tree.body if hasattr(n, "name")}
    comments = [line for line in lines if line.startswith("# ---")]
    bottom = lines[tree.body[-1].lineno - 1 :]
    return imports, body, comments, bottom


def test_siblings_differ_in_the_learner_only(script):
    learner = SCRIPTS[script][0]
    (imports, ours, comments, bottom), theirs = parts(script), parts("sra_iql")
    assert (imports, comments, bottom) == (theirs[0], theirs[2], theirs[3])
    own = {"Args", "resolve", learner, "IQL", "expectile_loss"} | ({"QFunctions"} if script == "sra_sacn" else set())
    assert ours.keys() ^ theirs[1].keys() == {learner, "IQL", "expectile_loss"}
    assert ours["main"].replace(f"agent, step = {learner}(", "agent, step = IQL(") == theirs[1]["main"]
    assert not [name for name in ours.keys() - own - {"main"} if ours[name] != theirs[1][name]]
    a, b = (parts(s)[1]["Args"].splitlines() for s in (script, "sra_iql"))
    same = [importlib.import_module(s).__doc__ for s in (script, "sra_iql")]
    assert len({doc[doc.index("Half of a batch") : doc.index("0.3 to 0.3 + 0.7 / k")] for doc in same}) == 1
    until = next(line for line in b if "# --- learner ---" in line)  # no flag above the learner's differs, but for the names of runs
    assert [x for x, y in zip(a[: a.index(until)], b, strict=False) if x != y] == [a[3]] and "exp_name" in a[3]


def resolved(script, env, **changes):
    m = importlib.import_module(script)
    return m.resolve(m.Args(**changes), parse_task(env))


def test_settings_are_sras_but_for_the_learners_own(script):
    for env in ("maze2d-umaze", "maze2d-large-dense", "hopper-medium", "halfcheetah-medium", "walker2d-medium", "ant-medium"):
        a, b = resolved(script, env), resolved("sra_iql", env)
        shared = vars(a).keys() & vars(b).keys() - {"exp_name"}
        assert len(shared) > 50 and {k: getattr(a, k) for k in shared} == {k: getattr(b, k) for k in shared}
    tables = [importlib.import_module(s).SETTINGS for s in (script, "sra_iql")]
    assert {key: row[:6] for key, row in tables[0].items()} == tables[1]  # that of any other environment too
    lmbda = {"maze2d-large": 0.1, "hopper-medium": 0.3333, "walker2d-medium": 0.3333, "ant-medium": 1.0}
    num = {"maze2d-umaze": 25, "hopper-medium": 500, "halfcheetah-medium": 10, "walker2d-medium": 20}
    for values, name in ((lmbda, "temperature"), (num, "num_critics")):
        if name in SCRIPTS[script][3]:
            assert {env: getattr(resolved(script, env), name) for env in values} == values
            assert getattr(resolved(script, "hopper-medium", **{name: 7}), name) == 7


def test_names_of_runs(script, capsys):
    assert resolved(script, "maze2d-umaze").exp_name == script
    assert resolved(script, "maze2d-umaze", model_ratio=0.0).exp_name == script.replace("sra_", "uds_")
    assert resolved(script, "hopper-medium", total_updates=200_000).exp_name == script.replace("sra_", "uds_")
    assert resolved(script, "maze2d-umaze", exp_name="mine").exp_name == "mine"


@pytest.mark.parametrize(
    "script, changes, flag",
    [
        ("sra_awac", dict(temperature=0.0), "--temperature 0"),
        ("sra_sacn", dict(num_critics=0), "--num-critics 0"),
        ("sra_sacn", dict(target_entropy=math.nan), "--target-entropy nan"),
        ("sra_td3bc", dict(policy_delay=0), "--policy-delay 0"),
        ("sra_td3bc", dict(policy_noise=-0.1), "--policy-noise -0.1"),
        ("sra_td3bc", dict(batch_size=511), "--batch-size 511"),
    ],
)
def test_settings_that_cannot_work(script, changes, flag):
    with pytest.raises(UserError, match=flag.replace("-", "[-]")):
        resolved(script, "maze2d-umaze", **changes)


# --- all learners ---


def test_every_optimizer_moves_its_own_parameters(script):
    names = SCRIPTS[script][1]
    for frozen in names:
        a = agent(script)
        a.set_rates = lambda step: None
        getattr(a, f"{'alpha' if frozen == 'log_alpha' else frozen}_opt").param_groups[0]["lr"] = 0.0
        before = parameters(a, *names)
        a.update(*batch(), 1)
        assert moved(before, a) == set(names) - {frozen}
    assert not any(p.requires_grad for f in ("target_qf", "target_policy") if hasattr(a, f) for p in getattr(a, f).parameters())


def test_the_clone_is_of_the_expert_half(script):
    """Its value by hand; and the rows of the other half have no part in it."""
    a, (obs, act, *_) = agent(script), batch()
    extra = (torch.tensor(0.5),) if script == "sra_sacn" else ()
    clone = a.policy_loss(obs, act, *extra)[1]
    if script == "sra_td3bc":
        by_hand = sum((a.policy(obs[i]) - act[i]).square().sum().item() for i in range(6)) / 12
    else:
        mean, log_std = a.policy(obs[:6])
        by_hand = -TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()).log_prob(act[:6]).sum(1).mean().item()
    assert clone.item() == pytest.approx(by_hand, rel=1e-4)
    others = torch.cat([act[:6], torch.rand(6, 2)])
    assert a.policy_loss(torch.cat([obs[:6], torch.randn(6, 4)]), others, *extra)[1].item() == pytest.approx(clone.item(), rel=1e-5)
    without = deepcopy(a)
    without.args = replace(a.args, bc_weight=0.0)
    losses = []
    for x in (a, without):
        torch.manual_seed(1)
        losses.append(x.policy_loss(obs, act, *extra)[0])
    torch.testing.assert_close(losses[0] - losses[1], clone)  # with weight 1


def test_standing_by_hand_and_without_random_numbers(script):
    a, (obs, act, *_) = agent(script), batch(3)
    state = torch.get_rng_state()
    standing = a.standing(obs, act)
    assert torch.get_rng_state().equal(state)  # or --log-every would change the run
    advantage = []
    for i in range(3):
        pi_act = a.policy(obs[i]) if script == "sra_td3bc" else a.policy.net(obs[i])[:2].clamp(-9, 9).tanh()
        q, v = (a.qf(obs[i : i + 1], x[None]).min().item() for x in (act[i], pi_act))
        advantage.append(q - v)
    assert standing["advantage"].item() == pytest.approx(sum(advantage) / 3, abs=1e-5)
    weight = [min(math.exp(u / 0.5), 100) for u in advantage]
    assert standing.keys() == ({"advantage", "weight"} if script == "sra_awac" else {"advantage"})
    assert script != "sra_awac" or standing["weight"].item() == pytest.approx(sum(weight) / 3, rel=1e-4)


def test_acting_is_deterministic_and_normalises_what_the_environment_shows(script):
    a, obs = agent(script), torch.randn(3, 4)
    mean = a.policy((obs - 5) / 2)
    torch.testing.assert_close(a.act(obs), mean if script == "sra_td3bc" else mean[0].tanh())
    b = agent(script)
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(b.act(obs), a.act(obs))


def test_learning_rates_are_those_of_iql(script):
    iql = importlib.import_module("sra_iql")
    changes = dict(cosine_updates=50, learning_rate_drop=10)
    a, b = agent(script, **changes), iql.IQL(iql.Normalizer(torch.zeros(2, 4)), 4, 2, replace(ARGS, **changes), CPU)
    policies = [opt for opt in ("policy_opt", "confidence_opt", "alpha_opt") if hasattr(a, opt)]
    for step in (0, 5, 9, 10, 30, 100):
        a.update(*batch(), step)
        b.set_rates(step)
        assert a.qf_opt.param_groups[0]["lr"] == b.qf_opt.param_groups[0]["lr"]
        assert {getattr(a, opt).param_groups[0]["lr"] for opt in policies} == {b.policy_opt.param_groups[0]["lr"]}


# --- AWAC ---


def test_awac_critic_by_hand_and_a_terminal_row_does_not_bootstrap():
    a, (obs, act, rew, next_obs, terminated) = agent("sra_awac"), batch(4)
    terminated[3] = 1
    torch.manual_seed(1)
    loss, stats = a.critic_loss(obs, act, rew, next_obs, terminated)
    torch.manual_seed(1)
    mean, log_std = a.policy(next_obs)
    next_act = (mean + log_std.exp() * torch.randn(4, 2)).tanh()
    target = [r + 0.99 * a.target_qf(s[None], x[None]).min().item() for r, s, x in zip((1, 1, 0), next_obs, next_act, strict=False)] + [0.0]
    q = a.qf(obs, act).tolist()
    assert loss.item() == pytest.approx(sum((q[j][i] - target[i]) ** 2 for i in range(4) for j in (0, 1)) / 8, rel=1e-4)
    assert stats["q/largest"].item() == pytest.approx(max(*q[0], *q[1]))


def test_awac_weights_are_clipped_at_100_and_have_no_gradient():
    a, (obs, act, *_) = agent("sra_awac", temperature=0.1), batch()
    q = torch.linspace(-0.5, 0.9, 12)
    a.qf = torch.nn.Module()
    a.qf.forward = lambda _, x: torch.stack([q, q + 1]) if x is act else torch.zeros(2, 12)  # of given actions, of the policy's
    by_hand = [min(math.exp(u / 0.1), 100) for u in q.tolist()]
    assert by_hand[-1] == 100 and by_hand[0] < 0.01
    advantage, weight = a.weight(obs, act, -act)
    assert weight.tolist() == pytest.approx(by_hand, rel=1e-4) and advantage.tolist() == pytest.approx(q.tolist())
    loss, _ = a.policy_loss(obs, act)
    mean, log_std = a.policy(obs)
    log_prob = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()).log_prob(act).sum(1)
    expected = -log_prob[:6].mean() - (torch.tensor(by_hand) * log_prob).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for x, y in zip(gradients(loss, a.policy), gradients(expected, a.policy), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)  # as if the weights were numbers


def test_awac_policy_loss_reaches_no_critic():
    a, (obs, act, *_) = agent("sra_awac"), batch()
    a.policy_loss(obs, act)[0].backward()
    assert a.policy.net[0].weight.grad.any() and all(p.grad is None for p in [*a.qf.parameters(), *a.target_qf.parameters()])


def test_awac_advantage_is_over_a_sample_of_the_policy():
    a, (obs, act, *_) = agent("sra_awac"), batch()
    torch.manual_seed(1)
    loss, clone = a.policy_loss(obs, act)
    torch.manual_seed(1)
    mean, log_std = a.policy(obs)
    pi_act = (mean + log_std.exp() * torch.randn(12, 2)).tanh()
    weight = ((a.qf(obs, act).amin(0) - a.qf(obs, pi_act).amin(0)) / 0.5).exp().detach()
    log_prob = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()).log_prob(act).sum(1)
    torch.testing.assert_close(loss, clone - (weight * log_prob).mean(), rtol=1e-4, atol=1e-4)


def test_awac_updates_critics_then_policy():
    m, rows = importlib.import_module("sra_awac"), batch()
    a, b = (agent("sra_awac", weight_decay=5e-3, learning_rate=0.05) for _ in range(2))
    b.load_state_dict(a.state_dict())
    qf_opt, policy_opt = adam(b.qf, b.policy)
    torch.manual_seed(1)
    for _ in range(3):
        m.descend(qf_opt, b.critic_loss(*rows)[0])
        m.descend(policy_opt, b.policy_loss(*rows[:2])[0])
        follow(b.target_qf, b.qf)
    torch.manual_seed(1)
    for step in range(3):
        out = a.update(*rows, step)
    assert_close(a, b, ("policy", "qf", "target_qf"))
    assert {f"losses/{k}" for k in ("critic", "policy", "clone")} <= out.keys() and not any(v.requires_grad for v in out.values())


# --- TD3+BC ---


def test_td3bc_weight_of_q_is_a_number_without_gradient():
    a, (obs, act, *_) = agent("sra_td3bc"), batch()
    loss, _ = a.policy_loss(obs, act)
    pi_act = a.policy(obs)
    q = a.qf(obs, pi_act)[0]
    size = sum(abs(x) for x in q.tolist()) / 12
    mse = (pi_act - act).square()
    expected = -2.5 / size * q.mean() + mse.mean() + mse[:6].mean()  # all rows, and the expert rows again
    torch.testing.assert_close(loss, expected)
    for x, y in zip(gradients(loss, a.policy), gradients(expected, a.policy), strict=True):
        torch.testing.assert_close(x, y)  # a gradient through mean |Q| would leave next to nothing of Q's
    double = agent("sra_td3bc", alpha=5.0)
    double.load_state_dict(a.state_dict())
    torch.testing.assert_close(double.policy_loss(obs, act)[0] - loss, -2.5 / size * q.mean())


def test_td3bc_targets_have_clipped_noise_on_clipped_actions():
    a, (obs, act, rew, next_obs, _) = agent("sra_td3bc", policy_noise=1000.0), batch(4)
    terminated, seen = torch.tensor([0.0, 0.0, 0.0, 1.0]), []
    plain = a.target_qf.forward
    a.target_qf.forward = lambda o, x: seen.append(x) or plain(o, x)
    loss, stats = a.critic_loss(obs, act, rew, next_obs, terminated)
    clean, noisy = a.target_policy(next_obs), seen[0]
    assert noisy.abs().max() <= 1 and ((noisy - clean).abs() <= 0.5 + 1e-6).all()
    inside = noisy.abs() < 1
    torch.testing.assert_close((noisy - clean).abs()[inside], torch.full_like(noisy[inside], 0.5))
    target = rew + 0.99 * torch.tensor([1.0, 1, 1, 0]) * plain(next_obs, noisy).amin(0)
    q = a.qf(obs, act)
    torch.testing.assert_close(loss, (q[0] - target).square().mean() / 2 + (q[1] - target).square().mean() / 2)
    assert stats["q/largest"] == q.max()
    some = agent("sra_td3bc", policy_noise=0.1, noise_clip=0.15)
    some.target_qf.forward = lambda o, x: seen.append(x) or plain(o, x)
    torch.manual_seed(1)
    some.critic_loss(obs, act, rew, next_obs, terminated)
    torch.manual_seed(1)
    noise = [min(max(0.1 * x, -0.15), 0.15) for x in torch.randn(8).tolist()]
    assert 0.15 in map(abs, noise) and any(abs(x) < 0.1 for x in noise)
    torch.testing.assert_close(seen[-1], (some.target_policy(next_obs) + torch.tensor(noise).view(4, 2)).clamp(-1, 1))


@pytest.mark.parametrize("delay", [2, 3])
def test_td3bc_updates_policy_and_targets_every_second_time(delay):
    m, rows = importlib.import_module("sra_td3bc"), batch()
    obs, act, *_ = rows
    a, b = (agent("sra_td3bc", weight_decay=5e-3, learning_rate=0.05, policy_delay=delay) for _ in range(2))
    b.load_state_dict(a.state_dict())
    qf_opt, policy_opt, confidence_opt = adam(b.qf, b.policy, b.confidence)
    slow = ("policy", "target_policy", "target_qf")
    for step in range(6):
        before = parameters(a, *slow)
        torch.manual_seed(step)
        out = a.update(*rows, step)
        torch.manual_seed(step)
        m.descend(qf_opt, b.critic_loss(*rows)[0])
        m.descend(confidence_opt, b.confidence_loss(obs[:6], act[:6]))
        if last := step % delay == delay - 1:
            m.descend(policy_opt, b.policy_loss(obs, act)[0])
            follow(b.target_qf, b.qf)
            follow(b.target_policy, b.policy)
        assert moved(before, a) == (set(slow) if last else set()) and ("losses/policy" in out) == last
    assert_close(a, b, (*slow, "qf", "confidence"))


def test_td3bc_confidence_is_of_a_clone_of_the_expert_half_that_serves_nothing_else():
    a, rows = agent("sra_td3bc"), batch()
    b, c = deepcopy(a), deepcopy(a)
    for p in c.confidence.parameters():
        p.data += 1.0
    b_rows = [torch.cat([x[:6], torch.rand_like(x[6:])]) for x in rows]
    for x, y in ((a, rows), (b, b_rows), (c, rows)):
        torch.manual_seed(1)
        x.update(*y, 1)
    same = lambda x, y, name: all(p.equal(q) for p, q in zip(getattr(x, name).parameters(), getattr(y, name).parameters(), strict=True))  # noqa: E731
    assert same(a, b, "confidence") and not same(a, b, "policy")  # another second half
    assert same(a, c, "policy") and same(a, c, "qf") and not same(a, c, "confidence")  # another confidence
    mean, log_std = a.confidence(rows[0][:6])
    by_hand = -TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()).log_prob(rows[1][:6]).sum(1).mean()
    torch.testing.assert_close(a.confidence_loss(rows[0][:6], rows[1][:6]), by_hand, rtol=1e-4, atol=1e-4)


# --- SAC-N ---


def test_sacn_critics_are_networks_of_their_own():
    m = importlib.import_module("sra_sacn")
    qf, obs, act = m.QFunctions(4, 2, (16, 8), 5), torch.randn(3, 4), torch.randn(3, 2)
    q = qf(obs, act)
    assert q.shape == (5, 3) and len({round(x, 6) for x in q[:, 0].tolist()}) == 5
    for e, one in enumerate(separate(m, qf)):
        torch.testing.assert_close(one(torch.cat([obs, act], 1)).squeeze(1), q[e])
    q[2].sum().backward()
    assert all(p.grad[2].any() and not p.grad[[0, 1, 3, 4]].any() for p in qf.parameters())
    bound = max(p.abs().max() * p.shape[1] ** 0.5 for p in qf.weight)
    assert 0.9 < bound <= 1  # as nn.Linear begins: uniform up to 1 / sqrt(inputs)


def separate(m, qf):
    """The Q functions of the ensemble as networks, one by one."""
    for e in range(qf.num_critics):
        sizes = [qf.weight[0].shape[1], *(w.shape[2] for w in qf.weight)]
        one = m.mlp(*sizes)
        for layer, w, b in zip(one[::2], qf.weight, qf.bias, strict=True):
            layer.weight.data, layer.bias.data = w[e].T.detach().clone(), b[e, 0].detach().clone()
        yield one


def test_sacn_with_two_critics_is_sac():
    """Haarnoja et al. with two networks, two targets and an optimizer for each, in the order temperature, policy, Q functions."""
    m, (obs, act, rew, next_obs, terminated) = importlib.import_module("sra_sacn"), batch()
    terminated[3] = 1
    a = agent("sra_sacn", num_critics=2, bc_weight=0.0, backup_entropy=True, weight_decay=5e-3, learning_rate=0.05)
    policy, log_alpha = deepcopy(a.policy), torch.zeros((), requires_grad=True)
    q, slow = list(separate(m, a.qf)), list(separate(m, a.target_qf))
    policy_opt, *q_opts = adam(policy, *q)
    alpha_opt = torch.optim.Adam([log_alpha], lr=0.05)

    def sample(s):
        mean, log_std = policy(s)
        dist = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
        x = (mean + log_std.exp() * torch.randn(12, 2)).tanh()
        return x, dist.log_prob(x).sum(1)

    def smallest(networks, s, x):
        return torch.minimum(*(f(torch.cat([s, x], 1)).squeeze(1) for f in networks))

    torch.manual_seed(1)
    for _ in range(3):
        log_prob = sample(obs)[1].detach()
        m.descend(alpha_opt, -(log_alpha * (log_prob - 2)).mean())  # H: minus 2 dimensions
        alpha = log_alpha.exp().item()
        x, log_prob = sample(obs)
        m.descend(policy_opt, (alpha * log_prob - smallest(q, obs, x)).mean())
        with torch.no_grad():
            x, log_prob = sample(next_obs)
            target = rew + 0.99 * (1 - terminated) * (smallest(slow, next_obs, x) - alpha * log_prob)
        for f, opt, g in zip(q, q_opts, slow, strict=True):
            m.descend(opt, 0.5 * (f(torch.cat([obs, act], 1)).squeeze(1) - target).square().mean())
            g.requires_grad_(False)
            follow(g, f)
    torch.manual_seed(1)
    for step in range(3):
        out = a.update(obs, act, rew, next_obs, terminated, step)
    assert a.log_alpha["value"].item() == pytest.approx(log_alpha.item(), abs=1e-4)
    assert out["q/alpha"].item() == pytest.approx(math.exp(log_alpha.item()), rel=1e-4)
    for x, y in zip(a.policy.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
    for mine, theirs in ((a.qf, q), (a.target_qf, slow)):
        for x, y in zip(separate(m, mine), theirs, strict=True):
            for p, r in zip(x.parameters(), y.parameters(), strict=True):
                torch.testing.assert_close(p, r, atol=1e-3, rtol=1e-3)


def test_sacn_takes_the_smallest_of_all_critics():
    a, (obs, act, rew, next_obs, terminated) = agent("sra_sacn"), batch(4)
    a.target_qf.forward = lambda *_: torch.tensor([[5.0, 5, 5, 5], [7, 1, 7, 7], [6, 6, 2, 6]])
    terminated[3] = 1
    _, stats = a.critic_loss(obs, act, rew, next_obs, terminated, torch.tensor(0.0))
    assert stats["q/target"].item() == pytest.approx((1 + 0.99 * 5 + 1 + 0.99 * 1 + 0 + 0.99 * 2 + 0) / 4)
    assert stats["q/largest"] == a.qf(obs, act).max() and stats["q/largest_target"].item() == pytest.approx(1 + 0.99 * 5)
    assert stats["q/spread"].item() == pytest.approx(a.qf(obs, act).std(0, unbiased=False).mean().item())
    assert stats["q/spread_policy"].item() == pytest.approx((2 * (2 / 3) ** 0.5 + (14 / 3) ** 0.5 + (38 / 9) ** 0.5) / 4)
    a.qf.forward = lambda *_: torch.tensor([[5.0, 5, 5, 5], [7, 1, 7, 7], [6, 6, 2, 6]])
    loss, clone = a.policy_loss(obs, act, torch.tensor(0.0))
    torch.testing.assert_close(loss - clone, torch.tensor(-(5 + 1 + 2 + 5) / 4))


def test_sacn_temperature_grows_below_the_target_entropy():
    for target, sign in ((50.0, 1), (-50.0, -1)):
        a = agent("sra_sacn", target_entropy=target)
        loss, entropy = a.alpha_loss(batch()[0])
        assert -50 < entropy < 50 and not entropy.requires_grad
        (gradient,) = gradients(loss, a.log_alpha)
        torch.testing.assert_close(-gradient, torch.tensor(target) - entropy)
        a.update(*batch(), 0)
        assert a.log_alpha["value"].sign() == sign and not a.alpha_opt.param_groups[0]["weight_decay"]


def test_sacn_counts_entropy_in_its_target_where_asked():
    obs, act, rew, next_obs, terminated = batch(4)
    terminated[3] = 1
    a, targets = agent("sra_sacn"), {}
    for counted in (False, True):
        a.args = replace(a.args, backup_entropy=counted)
        torch.manual_seed(3)  # of the sampled action
        targets[counted] = a.critic_loss(obs, act, rew, next_obs, terminated, torch.tensor(0.5))[1]["q/target"]
    torch.manual_seed(3)
    log_prob = importlib.import_module("sra_sacn").squash(*(p := a.policy(next_obs)), torch.randn_like(p[0]))[1]
    torch.testing.assert_close(targets[True] - targets[False], (0.99 * (1 - terminated) * -0.5 * log_prob).mean(), rtol=1e-3, atol=1e-4)


# --- runs ---


def here(script, data_file, run_dir, *flags):  # noqa: F811
    """The run in this process; its folder."""
    m = importlib.import_module(script)
    args = tyro.cli(m.Args, args=[*flags_for(data_file, run_dir, *flags), *SCRIPTS[script][2]])
    m.main(args)
    return Path(run_dir) / NAME.format(m.resolve(args, parse_task("hopper-medium")).exp_name)


def test_a_run_cut_and_resumed_equals_a_run_left_alone(script, data_file, tmp_path, monkeypatch):  # noqa: F811
    whole = here(script, data_file, tmp_path / "whole")
    config, result = (json.loads((whole / f"{n}.json").read_text()) for n in ("config", "result"))
    assert config["args"]["exp_name"] == result["algorithm"] == script and result["updates"] == 60
    assert math.isfinite(result["normalized_score"]) and whole.name == NAME.format(script)
    rows = metrics(whole)
    assert [r["update"] for r in rows if "model/goals" in r] == [0, 15, 30, 45]
    assert [r["update"] for r in rows if "losses/policy" in r] == [10, 20, 30, 40, 50, 60]
    groups = {f"q/advantage_{g}" for g in ("expert", "supplementary", "imagined")} | {"q/largest", "losses/clone"}
    assert all(groups <= r.keys() for r in rows if "losses/policy" in r)
    m = importlib.import_module(script)
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    learner = getattr(m, SCRIPTS[script][0])
    assert state["agent"].keys() == set(learner.PARTS) and [step for step, _ in state["rollout_policies"]] == [0, 15, 30, 45]

    class Cut(Exception):
        pass

    for at in (30, 50):  # with work done since the last checkpoint that is lost; a round of imagination in between
        plain, at = m.Run.log, at

        def log(self, update, row, plain=plain, at=at):
            plain(self, update, row)
            if update == at and "losses/policy" in row:
                raise Cut

        monkeypatch.setattr(m.Run, "log", log)
        with pytest.raises(Cut):
            here(script, data_file, tmp_path / "cut")
        monkeypatch.setattr(m.Run, "log", plain)
    assert_same_run(whole, here(script, data_file, tmp_path / "cut"))


def test_without_augmentation_it_is_the_learner_alone_bit_for_bit(script, data_file, tmp_path):  # noqa: F811
    m, flags = importlib.import_module(script), ("--eval-episodes", "0", "--model-ratio", "0")
    control = here(script, without_rewards(data_file, tmp_path / data_file.name), tmp_path, *flags)
    assert control.name == NAME.format(script.replace("sra_", "uds_"))
    assert not any(k.startswith(("model/", "eval/")) for row in metrics(control) for k in row)
    task = parse_task("hopper-medium")
    args = m.resolve(tyro.cli(m.Args, args=[*flags_for(data_file, tmp_path, *flags), *SCRIPTS[script][2]]), task)
    data = load_dataset(task, str(data_file))
    expert = load_expert(task, str(data_file), 5, data)
    normalizer = m.Normalizer(torch.cat([d.obs[d.has_next & (d.terminated == 0)] for d in (expert, data)]))
    torch.manual_seed(3)
    alone = getattr(m, SCRIPTS[script][0])(normalizer, 11, 3, args, CPU)
    rows = [m.labelled(d, label, normalizer, CPU) for d, label in ((expert, 1.0), (data, 0.0))]
    for step in range(60):
        alone.update(*m.unpack(torch.cat([x[torch.randint(len(x), (10,))] for x in rows]), 11, 3), step)
    saved = leaves(torch.load(control / "checkpoint.pt", weights_only=True)["agent"])
    mine = {k: v for k, v in leaves(alone.state_dict()).items() if isinstance(v, torch.Tensor)}
    assert len(mine) > 30 and all(torch.equal(v, saved[k]) for k, v in mine.items())


def test_a_network_that_is_not_finite_ends_the_run_with_status_3(script, data_file, tmp_path, monkeypatch):  # noqa: F811
    m, flags = importlib.import_module(script), ("--model-ratio", "0", "--eval-episodes", "0")
    folder = here(script, data_file, tmp_path, *flags, "--learning-rate-drop", "0", "--total-updates", "40")
    good, learner = (folder / "checkpoint.pt").read_bytes(), getattr(m, SCRIPTS[script][0])
    plain = learner.update

    def update(self, *args):
        out = plain(self, *args)
        if args[-1] == 59:
            self.target_qf.requires_grad_(False).apply(lambda f: [p.fill_(math.nan) for p in f.parameters()])  # as if it had diverged
        return out

    monkeypatch.setattr(learner, "update", update)
    with pytest.raises(UserError, match=r"not finite at update 60") as e:
        here(script, data_file, tmp_path, *flags, "--learning-rate-drop", "0", "--checkpoint-every", "100")
    assert e.value.status == 3 and (folder / "checkpoint.pt").read_bytes() == good


def test_bfloat16_is_close_update_after_update(script, monkeypatch):
    large = dict(hidden=(16, 16, 16), learning_rate=0.01, cosine_updates=0)
    full, half = (agent(script, **large, bf16=bf16) for bf16 in (False, True))
    assert_bfloat16_is_close(full, half, SCRIPTS[script][1], monkeypatch)


def test_bfloat16_is_close_with_iql(monkeypatch):
    large = replace(ARGS, hidden=(16, 16, 16), learning_rate=0.01, cosine_updates=0)
    full, half = (sra_iql.IQL(sra_iql.Normalizer(torch.randn(9, 4)), 4, 2, replace(large, bf16=bf16), CPU) for bf16 in (False, True))
    assert_bfloat16_is_close(full, half, ("policy", "vf", "qf"), monkeypatch)
