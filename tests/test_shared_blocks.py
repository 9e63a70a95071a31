"""Blocks that repeat are identical in every script, so that a diff of two scripts shows their algorithms and nothing else."""

import ast
import difflib
from pathlib import Path

import pytest

SCRIPTS = {p.stem: p.read_text() for p in sorted((Path(__file__).resolve().parents[1] / "algorithms").glob("*.py"))}
OWN = {"Args", "resolve", "main", "Policy", "QFunctions", "CQL", "BCQ", "SAC", "COMBO", "imagine", "imagined_data"}  # allowed to differ


def blocks(source):
    """Name -> text of every function and class at the top of a script, decorators included."""
    lines, tree = source.splitlines(), ast.parse(source)
    begins = {n: min([n.lineno, *(d.lineno for d in n.decorator_list)]) for n in tree.body if hasattr(n, "decorator_list")}
    return {n.name: "\n".join(lines[begin - 1 : n.end_lineno]) for n, begin in begins.items()}


@pytest.mark.parametrize("name", sorted({name for s in SCRIPTS.values() for name in blocks(s)} - OWN))
def test_block_is_identical_wherever_it_stands(name):
    versions = {}
    for script, source in SCRIPTS.items():
        if name in blocks(source):
            versions.setdefault(blocks(source)[name], []).append(script)
    assert len(versions) == 1, f"{name} differs between {list(versions.values())}"


def test_arguments_of_one_name_mean_the_same():
    """Type and help are equal wherever an argument stands; defaults are the algorithm's."""
    seen = {}
    for script, source in SCRIPTS.items():
        for line in blocks(source)["Args"].splitlines()[2:]:
            if ":" in line and not line.strip().startswith("#"):
                name, rest = line.strip().split(":", 1)
                own = ("exp_name", "hidden", "bf16", "total_updates", "qf_lr", "policy_lr", "target_entropy", "model_ratio")
                if name not in own and (script, name) != ("armor", "horizon"):  # its H is in updates
                    seen.setdefault(name, {}).setdefault((rest.split("=")[0], rest.partition("#")[2]), []).append(script)
    differ = {name: list(v.values()) for name, v in seen.items() if len(v) > 1 and name not in ("rollout_policy", "vae_hidden")}
    assert not differ


def test_romi_and_fomi_differ_in_the_direction_only():
    a, b = (SCRIPTS[s].splitlines() for s in ("romi_bcq", "fomi_bcq"))
    changed = [line for line in difflib.unified_diff(a, b, n=0, lineterm="") if line[0] in "+-" and line[:3] not in ("+++", "---")]
    code = [line for line in changed if "cond" in line and "=" in line and "#" in line]
    assert len(changed) <= 46 and len(code) >= 6
    assert "+            obs, next_obs = cond, pred" in changed and "-            obs, next_obs = pred, cond" in changed


def test_romi_imagines_alike_with_both_learners():
    """Their tests run on romi_cql."""
    for name in ("imagine", "imagined_data"):
        assert blocks(SCRIPTS["romi_bcq"])[name] == blocks(SCRIPTS["romi_cql"])[name]


def test_the_difference_in_the_readme_is_the_difference():
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    shown = readme.split("```diff\n")[1].split("```")[0].splitlines()
    for sign, script in (("-", "romi_bcq"), ("+", "fomi_bcq")):
        lines, there = [line[1:] for line in shown if line[0] == sign], SCRIPTS[script].splitlines()
        assert [line for line in there if line in lines] == lines
        code, other = (ast.unparse(without_strings(SCRIPTS[s])).splitlines() for s in (script, *{"romi_bcq", "fomi_bcq"} - {script}))
        own = [line[2:].strip() for line in difflib.ndiff(other, code) if line.startswith("+ ")]
        assert len(own) >= 4 and set(own) <= {ast.unparse(without_strings(line.strip())) for line in lines}


def without_strings(source):
    """Syntax tree with all text in it (docstrings, messages, names of runs) but that of keys left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in ("reverse", "forward"):
            node.value = ""
    return tree
