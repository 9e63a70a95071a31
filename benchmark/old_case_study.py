"""A maze seen from above: data, what models imagine, what policies execute (ROMI Sec. 4.5, Figure 3), and how accurate reverse
and forward models are (the question of ROMI's Appendix C, which was not at hand: these measures of accuracy are ours).

    python case_study.py                                    # runs/maze2d-umaze-v1__{romi_bcq,fomi_bcq,bcq}__0*
    python case_study.py --env maze2d-large-dense
    python case_study.py --runs runs/a runs/b --labels reverse forward
    python case_study.py --publish                          # for benchmarks.md: into figures/ and results/

Takes runs of algorithms/romi_bcq.py and fomi_bcq.py, with and without a model, finished or not: what a run does not have yet is
said and left out; so are the figure's panels of MOPO. Writes case_study_<task>.png and case_study_<task>.json beside the runs and
prints the numbers as tables.

  discrepancy   D(D, tau) = 1/(H+1) sum_t min_(s in D) |s_t - s|_2                                                    ROMI Eq. 5
  accuracy      on held-out transitions of the data; of imagined transitions, against the true simulator

States are (x, y, vx, vy) in m and m/s. A reverse model is given s' and predicts s, a forward model is given s and predicts s'.
On held-out rows a model predicts means, chains follow them. Imagined transitions are as in training, with noise in state and
reward: the two kinds of error are not to be compared with one another.
Everything is seeded: the same command on the same runs gives the same numbers (same number of threads).
"""

import importlib
import json
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy.spatial import cKDTree

from maze2d_env import replay_error, view_trajectories, wall_distance
from report import case_study_table
from utils import UserError, evaluate, load_dataset, make_env, normalized_score, parse_task

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "algorithms"))
SCRIPTS = {"reverse": "romi_bcq", "forward": "fomi_bcq"}  # they differ in imagined_data and imagine only


@dataclass
class Args:
    env: str = "maze2d-umaze"  # task whose runs are taken where --runs is not given
    runs: tuple[Path, ...] = ()  # run folders of one task and data set; none: <run-dir>/<task>__{romi_bcq,fomi_bcq,bcq}__0*
    labels: tuple[str, ...] = ()  # names of these runs in tables and picture; none: their algorithm, and seed if need be
    run_dir: Path = ROOT / "runs"
    dataset: str | None = None  # --dataset as the scripts take it, if the file has moved since the runs
    out: Path | None = None  # folder of picture and JSON; None: <run-dir>
    publish: bool = False  # put them into figures/ and results/ instead, from which benchmarks.md is made
    episodes: int = 100  # executed with each policy, from the same start states, none of which a run was evaluated on
    chains: int = 500  # imagined with each model
    seed: int = 0
    num_threads: int | None = None  # None: all cores


# --- discrepancy ---


def discrepancy(tree, trajectories, workers=-1):
    """Eq. 5 for each of the trajectories, arrays (T, 4): (len(trajectories),). `tree`, a cKDTree, holds the states of all rows
    of the data, or their positions only. All T states count, the last one too, after which no action follows: an imagined chain
    has then one state of the data in either direction, the one it ends in or begins with."""
    nearest = tree.query(np.concatenate(trajectories)[:, : tree.m], workers=workers)[0]
    lengths = np.array([len(t) for t in trajectories])
    return np.add.reduceat(nearest, np.cumsum(lengths) - lengths) / lengths


def mean_se(values):
    """Mean and its standard error (None for a single value)."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None]


# --- accuracy ---


def held_out(data, args):
    """Row numbers that the run's model was not fitted to, (R,): the split of train_dynamics, drawn again from the run's settings.
    They did choose each member's best epoch and the elites, so errors on them are a little too small."""
    known = data.has_next.nonzero().squeeze(1)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(args.seed))
    return known[order[: max(1, min(int(args.holdout_ratio * len(known)), args.holdout_max))]]


def recorded_chains(data, rows, h, reverse):
    """Row numbers (C, h) of h consecutive transitions of one trajectory, in order of time, that begin (reverse: end) with one
    of the given rows (R,); rows with too few neighbours give none. Only that row is held out: the model may have been trained
    on the others, though from recorded states, not from its own predictions."""
    out = rows[:, None] + torch.arange(h) - (h - 1 if reverse else 0)
    out = out[(out[:, 0] >= 0) & (out[:, -1] < len(data))]
    return out[(data.trajectory[out[:, 0]] == data.trajectory[out[:, -1]]) & data.has_next[out].all(1)]


def elite_means(dynamics):
    """The model without its noise, each elite by itself: cond (C, O) or (E, C, O), act (C, A) -> pred (E, C, O), rew (E, C)."""
    E = len(dynamics.elites)

    @torch.no_grad()
    def predict(cond, act):
        mean, _ = dynamics(dynamics.inputs(cond.expand(E, -1, -1), act.expand(E, -1, -1)), dynamics.elites)
        return cond + mean[..., 1:], mean[..., 0]

    return predict


def accuracy(predict, data, chains, reverse):
    """Errors of `predict` (as elite_means) at the far end of recorded chains, row numbers (C, h) in order of time.

    Forward, it starts from the first state of a chain and ends, h recorded actions later, in a prediction of the last one;
    reverse, it starts from the last state and goes back to the first. h = 1 is the one-step error.
    rmse_state, rmse_position: root of the mean squared Euclidean distance to the recorded state (m and m/s mixed, as in Eq. 5)
    or position (m). rmse_reward: of the transition predicted last. explained: 1 - (sum of squared errors of the predicted end)
    / (sum of squared deviations of end - start from their mean), sums over chains and the four dimensions. Means are over
    chains and elites.
    """
    first, last = data.obs[chains[:, 0]], data.next_obs[chains[:, -1]]
    start, end = (last, first) if reverse else (first, last)
    pred = start
    for rows in chains.T.flip(0) if reverse else chains.T:
        pred, rew = predict(pred, data.act[rows])
    error, change = (pred - end).double(), (end - start).double()
    distances = {"state": error.norm(dim=-1), "position": error[..., :2].norm(dim=-1), "reward": (rew - data.rew[rows]).double()}
    spread = change.var(0, unbiased=False).sum().item()
    out = {"chains": len(chains)} | {f"rmse_{k}": v.square().mean().sqrt().item() for k, v in distances.items()}
    return out | {"explained": 1 - out["rmse_state"] ** 2 / spread if spread else None}


def imagined_chains(run, data, n, seed):
    """n chains of the run's own imagination as (C, h, ...) float64 arrays obs, act, next_obs, in order of time."""
    m, h = importlib.import_module(SCRIPTS[run.direction]), run.args.horizon
    torch.manual_seed(seed)  # start states are drawn first: runs that draw them alike begin with the same ones
    weights = m.priority_weights(data.trajectory_returns()) if run.args.priority_rollout else None
    starts, ends = m.Sampler(len(data), weights, torch.device("cpu")), m.termination_fn(run.task, data)
    small = replace(run.args, model_buffer_size=n * h, rollout_batch_size=n)  # a single call, n rows a step
    rewards = data.rew.min().item(), data.rew.max().item()
    rows, _ = m.imagine(data.obs, run.dynamics, run.rollout_policy, ends, starts, rewards, small)
    chains = rows.view(h, n, -1).transpose(0, 1)
    obs, act, _, next_obs, _ = m.unpack(chains.flip(1) if run.direction == "reverse" else chains, 4, 2)
    return [x.double().numpy() for x in (obs, act, next_obs)]


def wall_shares(maze, obs, next_obs):
    """Shares of transitions (..., 4) on whose straight way from s to s' the ball overlaps a wall (its centre comes closer than
    its radius, 0.1 m: so does the simulator's when it hits one, down to 0.04 m) and on whose way its centre enters a wall or
    leaves the maze (the simulator's never does)."""
    distance = wall_distance(maze, obs.reshape(-1, 4)[:, :2], next_obs.reshape(-1, 4)[:, :2])
    return {"overlaps_wall": float((distance < 0.1).mean()), "enters_wall": float((distance == 0).mean())}


# --- runs ---


class StoredRun:
    """A run folder. Of direction, dynamics, rollout_policy and agent, what the run does not have (yet) is None."""

    def __init__(self, folder):
        self.folder, self.missing = folder, []
        self.direction = self.dynamics = self.rollout_policy = self.agent = None
        try:
            self.config = json.loads((folder / "config.json").read_text())
            self.settings, self.sha256 = self.config["args"], self.config["dataset"]["sha256"]
            self.label, self.task = self.settings["exp_name"], parse_task(self.config["task"])
            if self.task.domain != "maze2d":
                raise UserError(f"{folder}: is a run on {self.task.id}, which is no maze")
            self.state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            self.phase, self.step = self.state["phase"], self.state["step"]
        except UserError:
            raise
        except (FileNotFoundError, NotADirectoryError) as e:
            raise UserError(f"{folder}: is no run, or has no checkpoint yet (no {Path(e.filename).name})") from None
        except Exception as e:  # a damaged file raises whatever its reader stumbles over
            raise UserError(f"{folder}: cannot be read as a run ({type(e).__name__}: {str(e)[:80]})") from None

    def load_networks(self, data):
        m = importlib.import_module(SCRIPTS["reverse"])
        try:
            args = self.args = m.Args(**{f.name: self.settings[f.name] for f in fields(m.Args) if f.name in self.settings})
            if args.model_ratio > 0 and self.phase == "dynamics":
                self.missing.append("model (in training)")
            elif args.model_ratio > 0:
                self.dynamics = m.Dynamics(4, 2, args)
                self.dynamics.load_state_dict(self.state["dynamics"])
                self.direction = self.find_direction(data)
                if self.phase == "policy":
                    policies = {"cvae": m.ConditionalVAE, "rbc": m.BehaviourCloning, "uniform": m.UniformPolicy}
                    self.rollout_policy = policies[args.rollout_policy](4, 2, args)
                    self.rollout_policy.load_state_dict(self.state["rollout_policy"])
                else:
                    self.missing.append("imagination (rollout policy in training)")
            if "agent" in self.state:
                self.agent = m.BCQ(4, 2, args, torch.device("cpu"))
                self.agent.load_state_dict(self.state["agent"])
            else:
                self.missing.append("policy (not trained yet)")
        except (KeyError, RuntimeError, TypeError, ValueError) as e:
            why = f"{type(e).__name__}: {str(e)[:80]}"
            raise UserError(f"{self.folder}: does not fit the networks of {' and '.join(SCRIPTS.values())} ({why})") from None

    def find_direction(self, data):
        """Where time runs in the model: what the checkpoint says, else what the algorithm's name says, else what fits better."""
        name, key = self.settings["exp_name"], self.state.get("model_key", {})
        if "direction" in key or name.startswith(("romi", "fomi")):
            return key.get("direction", "forward" if name.startswith("fomi") else "reverse")
        rows, predict = held_out(data, self.args)[:, None], elite_means(self.dynamics)
        return min(SCRIPTS, key=lambda direction: accuracy(predict, data, rows, direction == "reverse")["rmse_state"])


def load_runs(args):
    """The runs, all of one task and data set, each with a label of its own."""
    folders, lacking, slug = list(args.runs), [], parse_task(args.env).slug
    if not folders and parse_task(args.env).domain != "maze2d":
        raise UserError(f"--env {args.env}: is no maze; give one of maze2d-{{umaze,medium,large}}, with -dense or without")
    for name in () if folders else ("romi_bcq", "fomi_bcq", "bcq"):
        found = sorted(p for p in args.run_dir.glob(f"{slug}__{name}__0*") if p.name.split("__")[2] == "0")
        folders += found
        lacking += [] if found else [f"{slug}__{name}__0*"]
    if not folders:
        raise UserError(f"no runs on {slug} in {args.run_dir}; train one with: python algorithms/romi_bcq.py --env {slug}")
    if lacking:
        print(f"left out: {args.run_dir} has no {', no '.join(lacking)}", file=sys.stderr)
    runs = [StoredRun(f) for f in folders]
    for what, values in (("tasks", [r.task.id for r in runs]), ("data sets", [r.sha256 for r in runs])):
        if len(set(values)) > 1:
            raise UserError(f"{', '.join(r.folder.name for r in runs)}: are runs on different {what}; give --runs of one")
    names = [r.label for r in runs]
    for default in (names, [f"{r.label} {r.settings['seed']}" for r in runs], [str(f) for f in folders]):
        if len(set(default)) == len(runs):
            break
    labels = args.labels or default
    if not len(set(labels)) == len(labels) == len(runs):
        raise UserError(f"--labels {' '.join(labels)}: {len(runs)} runs need as many different names")
    for run, label in zip(runs, labels, strict=True):
        run.label = label
    return runs


def study(run, data, trees, args, workers):
    """All numbers of one run, and as trajectories what it imagines and what it executes (lists, empty where it cannot yet)."""
    run.load_networks(data)
    left_out = f"; left out: {', '.join(run.missing)}" if run.missing else ""
    print(f"{run.label}: step {run.step} of {run.phase} in {run.folder}{left_out}", file=sys.stderr)
    maze, h, reverse, imagined, executed = run.task.kind.split("-")[0], run.args.horizon, run.direction == "reverse", [], []
    out = {"folder": run.folder.name, "algorithm": run.args.exp_name, "seed": run.args.seed, "direction": run.direction}
    out |= {"updates": run.step if run.agent else 0, "left_out": run.missing, "git_commit": run.config.get("git_commit")}

    def distances(trajectories):
        return {k: mean_se(discrepancy(tree, trajectories, workers)) for k, tree in trees.items()}

    if run.dynamics:
        rows = held_out(data, run.args)
        chains = {steps: recorded_chains(data, rows, steps, reverse) for steps in sorted({1, h})}
        out["held_out"] = {k: accuracy(elite_means(run.dynamics), data, c, reverse) for k, c in chains.items() if len(c)}
    if run.rollout_policy:
        obs, act, next_obs = imagined_chains(run, data, args.chains, args.seed)
        imagined = list(np.concatenate([obs[:, :1], next_obs], 1))
        if not np.isfinite(imagined).all():
            raise UserError(f"{run.folder}: imagined states are not finite, its model has diverged")
        one, all_steps = replay_error(maze, obs, act, next_obs)
        out["imagined"] = {"trajectories": len(obs), "horizon": h, "replay_error_1": one, "replay_error_h": all_steps}
        out["imagined"] |= wall_shares(maze, obs, next_obs) | distances(imagined)
    if run.agent and args.episodes:
        envs = [make_env(run.task) for _ in range(args.episodes)]
        returns, _ = evaluate(envs, run.agent.act, seed=1_000_000 * (1 + args.seed), trajectories=executed)  # training: 1000 seed + 100
        out["executed"] = {"trajectories": len(executed), "return": mean_se(returns), "score": mean_se(normalized_score(run.task, returns))}
        out["executed"] |= distances(executed)
    return out, imagined, executed


# --- picture ---


def draw(path, maze, panels, runs):
    """panels: (title, trajectories) each as a top view, and the discrepancies as bars in what is left of the last row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(panels) + 1)
    lines = len(panels) // columns + 1
    figure = plt.figure(figsize=(3.4 * columns, 3.6 * lines), layout="constrained")
    grid = figure.add_gridspec(lines, columns)
    for i, (title, trajectories) in enumerate(panels):
        axes, view = figure.add_subplot(grid[i // columns, i % columns]), view_trajectories(maze, trajectories, 160)
        axes.imshow(view)
        axes.set(xlim=(90, view.width - 90), ylim=(view.height - 90, 90))  # of the outer walls less than half
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    axes = figure.add_subplot(grid[-1, len(panels) % columns :])
    for k, what in enumerate(("imagined", "executed")):
        if bars := [(i + 0.4 * k - 0.2, *r[what]["discrepancy"]) for i, r in enumerate(runs.values()) if what in r]:
            x, mean, error = zip(*bars, strict=True)
            axes.bar(x, mean, 0.38, yerr=[e or 0 for e in error], color=f"C{k}", capsize=3, label=what)
            axes.legend(fontsize=8)
    axes.set_xticks(range(len(runs)), runs, fontsize=8)
    axes.set_title("average trajectory discrepancy (Eq. 5)", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args):
    if args.episodes < 0 or args.chains < 1 or args.seed < 0 or (args.num_threads or 1) < 1:
        raise UserError("--episodes and --seed must be at least 0, --chains and --num-threads positive")
    runs, workers = load_runs(args), args.num_threads or os.cpu_count()
    torch.set_num_threads(workers)
    task, source = runs[0].task, args.dataset or runs[0].settings["dataset"]
    source = runs[0].config["dataset"]["source"] if source == "auto" and task.sources else source  # a Minari task has one
    data = load_dataset(task, source)
    if data.sha256 != runs[0].sha256:
        raise UserError(f"--dataset {source}: is not the file that {runs[0].folder.name} was trained on (another sha256)")
    maze, states, trajectory = task.kind.split("-")[0], data.obs.double().numpy(), data.trajectory.numpy()
    columns = {"discrepancy": states, "discrepancy_positions": states[:, :2]}
    trees = {k: cKDTree(x, balanced_tree=False) for k, x in columns.items()}  # 1e6 rows: a quarter of a second; far queries 10x faster
    rng, known = np.random.default_rng(args.seed), data.has_next.nonzero().squeeze(1).numpy()
    rows = rng.choice(known, min(len(known), 20_000), replace=False)
    result = {"task": task.id, "episodes": args.episodes, "chains": args.chains, "seed": args.seed, "torch": torch.__version__}
    result["data"] = data.facts() | {"wall_sample": len(rows)} | wall_shares(maze, states[rows], data.next_obs[rows].double().numpy())
    some = rng.choice(trajectory[-1] + 1, min(trajectory[-1] + 1, 100), replace=False)
    recorded = [states[a:b] for a, b in np.searchsorted(trajectory, [some, some + 1]).T]
    panels, result["runs"] = [[("data", recorded)], [], []], {}
    for run in runs:
        result["runs"][run.label], imagined, executed = out, *_ = study(run, data, trees, args, workers)
        if imagined:
            panels[1].append((f"{run.label}: imagined, {run.direction}", imagined))
        if executed:
            panels[2].append((f"{run.label}: executed, score {out['executed']['score'][0]:.1f}", executed))
    print(f"\n{case_study_table(result)}")
    folders = (ROOT / "figures", ROOT / "results") if args.publish else 2 * (args.out or args.run_dir,)
    picture, numbers = (folder / f"case_study_{task.slug}.{end}" for folder, end in zip(folders, ("png", "json"), strict=True))
    for file in (picture, numbers):
        file.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, maze, [panel for group in panels for panel in group], result["runs"])
    numbers.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{picture}\n{numbers}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except UserError as e:
        sys.exit(e.report())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
