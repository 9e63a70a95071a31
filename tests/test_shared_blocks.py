"""Blocks that repeat are identical in every script: a diff of two scripts shows their algorithms and nothing else."""

import ast
import difflib
import importlib
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {p.stem: p.read_text() for p in sorted((ROOT / "algorithms").glob("*.py"))}
OWN = {"Args", "resolve", "main", "imagine"}  # allowed to differ
FAMILIES = {  # one block for each family of scripts
    "draw": [{"mopo", "combo"}, {"sra_awac", "sra_iql", "sra_sacn", "sra_td3bc"}],
    "QFunctions": [SCRIPTS.keys() - {"sra_sacn"}, {"sra_sacn"}],  # SAC-N has N of them
}
OWN_MEANING = {"exp_name", "total_updates", "bf16", "hidden", "target_entropy", "qf_lr", "policy_lr", "rollout_every"}
OWN_MEANING |= {"rollout_policy", "vae_hidden", "model_ratio"}
LONGEST = {"romi": 680, "fomi": 680, "mopo": 660, "combo": 660, "sra": 730, "armor": 850}


def blocks(source):
    """Name -> text of every function and class at the top of a script, decorators included."""
    lines, tops = source.splitlines(), [n for n in ast.parse(source).body if hasattr(n, "decorator_list")]
    begins = {n: min([n.lineno, *(d.lineno for d in n.decorator_list)]) for n in tops}
    return {n.name: "\n".join(lines[begin - 1 : n.end_lineno]) for n, begin in begins.items()}


BLOCKS = {script: blocks(source) for script, source in SCRIPTS.items()}


@pytest.mark.parametrize("name", sorted({name for b in BLOCKS.values() for name in b} - OWN))
def test_block_is_identical_wherever_it_stands(name):
    versions = {}
    for script, texts in BLOCKS.items():
        if name in texts:
            versions.setdefault(texts[name], set()).add(script)
    assert len(versions) == 1 or list(versions.values()) == [s & set(SCRIPTS) for s in FAMILIES.get(name, [])]


def test_arguments_of_one_name_mean_the_same():
    """Type and help are equal wherever an argument stands; defaults are the algorithm's."""
    seen = {}
    for script, texts in BLOCKS.items():
        for line in texts["Args"].splitlines()[2:]:
            if ":" in line and not line.strip().startswith("#"):
                name, rest = line.strip().split(":", 1)
                if name not in OWN_MEANING and (script, name) != ("armor", "horizon"):  # its H is in updates
                    meaning = (rest.split("=")[0], rest.partition("#")[2])
                    seen.setdefault(name, {}).setdefault(meaning, []).append(script)
    assert not {name: list(v.values()) for name, v in seen.items() if len(v) > 1}


def test_arguments_of_one_name_decide_the_same():
    """What changes no update, and what decides a model, is named alike by all scripts, and exists."""
    modules = {script: importlib.import_module(script) for script in SCRIPTS}
    names = {script: {f.name for f in fields(m.Args)} for script, m in modules.items()}
    for a, m in modules.items():
        assert m.BOOKKEEPING <= names[a] and m.MODEL_FLAGS <= names[a] and not m.BOOKKEEPING & m.MODEL_FLAGS
        for b, other in modules.items():
            differ = (m.BOOKKEEPING ^ other.BOOKKEEPING) & names[a] & names[b]
            assert differ <= {"total_updates"}  # in SRA schedules depend on it
    romi, *others = (modules[script] for script in ("romi_bcq", "romi_cql", "fomi_bcq"))
    assert all(m.MODEL_FLAGS == romi.MODEL_FLAGS and m.SETTINGS == romi.SETTINGS for m in others)


def code(source):
    """Lines of the code alone, without comments; text (docstrings, messages) is left out, but for the directions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in ("reverse", "forward"):
            node.value = ""
    return ast.unparse(tree).splitlines()


def test_romi_and_fomi_differ_in_the_direction_only():
    assert BLOCKS["romi_bcq"]["imagine"] == BLOCKS["romi_cql"]["imagine"]  # which is tested in the latter
    difference = difflib.ndiff(code(SCRIPTS["romi_bcq"]), code(SCRIPTS["fomi_bcq"]))
    changed = [line[0] + line[1:].strip() for line in difference if line[0] in "+-"]
    describe = "run.log(0, describe_imagination(task, *unpack(imagined, obs_dim, act_dim), {}, run.folder))".format
    config = "config = plumbing.describe_run(__file__, args, task, data, device, '{}', MODEL_FLAGS)".format
    pairs = [("obs, next_obs = (pred, cond)", "obs, next_obs = (cond, pred)"), (config("reverse"), config("forward"))]
    pairs += [("cond, pred = (next_obs, obs)", "cond, pred = (obs, next_obs)")]
    pairs += [(describe("chains[::-1]"), describe("chains"))]
    assert sorted(changed) == sorted(f"{sign}{line}" for pair in pairs for sign, line in zip("-+", pair, strict=True))


def test_the_difference_in_the_readme_is_the_difference():
    _, begin, rest = (ROOT / "README.md").read_text().partition("```diff\n")
    if not begin:
        pytest.skip("README shows none")
    shown = rest.split("```")[0].splitlines()
    for sign, script in (("-", "romi_bcq"), ("+", "fomi_bcq")):
        lines = [line[1:] for line in shown if line[0] == sign]
        assert lines and [line for line in SCRIPTS[script].splitlines() if line in lines] == lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short(script):
    lines = SCRIPTS[script].splitlines()
    assert len(lines) <= LONGEST[script.split("_")[0]] and max(map(len, lines)) <= 120
    docstring = ast.get_docstring(ast.parse(SCRIPTS[script]))
    assert len(docstring.splitlines()) <= (50 if script == "armor" else 35)
    order = [name for name in BLOCKS[script] if name in ("Args", "descend", "Dynamics", "resolve", "Run", "main")]
    assert order[0] == "Args" and order[-3:] == ["resolve", "Run", "main"]  # the method first, plumbing last
