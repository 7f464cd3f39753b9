"""What both training scripts carry is the same text: train_dti_sdxl.py is the original, the other says what it copies.

`python tests/test_copies.py` copies the original's text over every copy that has drifted.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
ORIGINAL, COPY = ROOT / "train_dti_sdxl.py", ROOT / "train_dti_sana.py"

# What differs: which class the model's is. Everything else that both scripts define must be the same text.
OWN = {"MODEL_CLASS"}
CLASSES = {ORIGINAL: "StableDiffusionXL", COPY: "Sana"}
OWN_OPTIONS = {"--validation_inference_steps", "--validation_guidance_scale"}  # by the model


def definitions(path: Path) -> dict[str, tuple[int, int]]:
    """First and last line (from 1, decorators included) of every top-level function, class and constant."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = (node.lineno, node.end_lineno)
    return found


def text(path: Path, lines: tuple[int, int]) -> str:
    return "\n".join(path.read_text(encoding="utf-8").split("\n")[lines[0] - 1 : lines[1]])


def drifted() -> dict[str, str]:
    """Differences, by name, between the original's definitions and their copies."""
    original, copy = definitions(ORIGINAL), definitions(COPY)
    differences = {}
    for name in sorted((original.keys() & copy.keys()) - OWN):
        ours, theirs = text(ORIGINAL, original[name]), text(COPY, copy[name])
        if ours != theirs:
            diff = difflib.unified_diff(ours.split("\n"), theirs.split("\n"), ORIGINAL.name, COPY.name, lineterm="")
            differences[name] = "\n".join(diff)
    return differences


def copy_over() -> list[str]:
    """Replace what has drifted in the copy by the original's text. Returns the names."""
    names = list(drifted())
    for name in names:
        first, last = definitions(COPY)[name]
        lines = COPY.read_text(encoding="utf-8").split("\n")
        lines[first - 1 : last] = text(ORIGINAL, definitions(ORIGINAL)[name]).split("\n")
        COPY.write_text("\n".join(lines), encoding="utf-8")
    return names


def test_what_both_scripts_carry_is_the_same_text():
    differences = drifted()
    assert not differences, (
        "\n\n".join(differences.values()) + "\n\n`python tests/test_copies.py` copies the original."
    )


def test_every_copy_is_marked_and_every_mark_is_true():
    source = COPY.read_text(encoding="utf-8")
    common = definitions(ORIGINAL).keys() & definitions(COPY).keys()
    common = {name for name in common if not name.isupper()} - {"logger", "interruption"}  # functions and classes
    marked = re.findall(r"^# Copied from train_dti_sdxl\.(\w+)\n(?:@.*\n)*(?:def|class) (\w+)", source, re.M)
    assert all(said == defined for said, defined in marked)
    assert {said for said, _ in marked} == common - OWN
    assert source.count("# Copied from train_dti_sdxl.") == len(marked)


def test_the_models_class_is_all_that_a_script_has_of_its_own():
    original, copy = definitions(ORIGINAL), definitions(COPY)
    assert original.keys() - copy.keys() == {CLASSES[ORIGINAL]}
    assert copy.keys() - original.keys() == {CLASSES[COPY]}
    for path, found in ((ORIGINAL, original), (COPY, copy)):
        assert text(path, found["MODEL_CLASS"]) == f"MODEL_CLASS = {CLASSES[path]}"


def test_common_options_have_the_same_defaults_and_help():
    import train_dti_sana
    import train_dti_sdxl

    def table(script):
        return {
            a.option_strings[0]: (a.default, a.help, a.required)
            for a in script.make_parser(script.MODEL_CLASS)._actions
        }

    ours, theirs = table(train_dti_sdxl), table(train_dti_sana)
    for option in (ours.keys() & theirs.keys()) - OWN_OPTIONS:
        assert ours[option] == theirs[option], option


def test_a_drift_is_found_and_mended(tmp_path, monkeypatch):
    drift = tmp_path / COPY.name
    source = COPY.read_text(encoding="utf-8")
    drift.write_text(source.replace("    # g - (g . v) v\n", "", 1), encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "COPY", drift)
    with pytest.raises(AssertionError, match="project_to_tangent"):
        test_what_both_scripts_carry_is_the_same_text()
    assert copy_over() == ["project_to_tangent"]
    assert drift.read_text(encoding="utf-8") == source


if __name__ == "__main__":
    print("copied:", ", ".join(copy_over()) or "nothing, all is the same")
