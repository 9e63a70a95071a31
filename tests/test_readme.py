"""What the README prints works as printed: its Python blocks, and its commands at a small size."""

import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SMALL = dict(dynamics_max_epochs=1, dynamics_hidden=8, model_buffer_size=100, rollout_policy_updates=2, vae_hidden=8)
SMALL |= dict(hidden=(8, 8), total_updates=4, batch_size=16, bc_warmup=2, eval_episodes=1, num_threads=1)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def command(word):
    """Script and flags of the command that holds a word."""
    line = next(c for b in blocks("bash") for c in b.replace("\\\n", "").splitlines() if word in c)
    _, script, *flags = shlex.split(line)
    return importlib.import_module(Path(script).stem), flags


def train(word, **small):
    script, flags = command(word)
    script.main(replace(tyro.cli(script.Args, args=flags), **SMALL | small))


@pytest.mark.filterwarnings("ignore")  # Minari asks for author, code and more
def test_an_own_minari_data_set_is_recorded_and_trained_on(tmp_path):
    exec(next(b for b in blocks("python") if "DataCollector" in b), {})
    train("own/pendulum", run_dir=str(tmp_path))
    assert (tmp_path / "own-pendulum-random-v0__romi_cql__0__minari" / "result.json").exists()


def test_the_policy_of_the_quick_run_acts(tmp_path, monkeypatch, capsys):
    train("--exp-name quick", run_dir=str(tmp_path), model_ratio=0.0)
    monkeypatch.chdir(ROOT)
    snippet = next(b for b in blocks("python") if "Policy" in b)
    assert '"runs/' in snippet
    exec(snippet.replace('"runs/', f'"{tmp_path}/'), {})
    assert "tensor([[" in capsys.readouterr().out


def test_every_command_parses():
    for block in blocks("bash"):
        for line in block.replace("\\\n", "").splitlines():
            if line.startswith("python algorithms/"):
                script, flags = command(line.split("algorithms/")[1][:40])
                tyro.cli(script.Args, args=flags)


def test_it_is_a_page():
    assert len(README.encode()) <= 9_000
