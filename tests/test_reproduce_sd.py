"""examples/reproduce_sd.py: which script trains which row, and the whole of it."""

import baselines
import pytest
import reproduce
import reproduce_sd
import train_dti_sd
from export import UserError

import train_dti_sdxl as script


def options(miniature_models, tmp_path, *more: str):
    return reproduce_sd.parse_args(["--models", str(miniature_models), "--output_dir", str(tmp_path / "out"), *more])


def test_every_training_is_one_that_its_script_understands(miniature_models, tmp_path):
    args = options(miniature_models, tmp_path)
    runs = reproduce_sd.plan(args)
    trained = [run for run in runs if run.method.trained]
    # Four concepts: two seeds of six methods, and one of the three that also have one vector.
    assert len(trained) == 4 * (2 * 6 + 3) and len({run.folder(args) for run in runs}) == len(runs)
    parsed = {}
    for run in trained:
        module = baselines if reproduce_sd.script_of(run.method).stem == "baselines" else train_dti_sd
        words = [f"--{k}={v}" for k, v in run.row(args).items() if k != "name"]
        model_class = baselines.METHODS.get(run.row(args).get("method"), module.MODEL_CLASS)
        given = script.parse_args([*words, "--output_dir=x", "--pretrained_model_name_or_path=x"], model_class)
        script.check_options(model_class(given))
        parsed[run.method.name] = given
    assert parsed["TI"].magnitude == "free" and parsed["TI"].learning_rate == 0.02 and parsed["TI"].num_vectors == 4
    assert parsed["DTI"].learning_rate == 0.04 and parsed["DTI, one vector"].num_vectors == 1
    assert parsed["P+"].train_batch_size == 8 and parsed["NeTI"].max_train_steps == 1000
    assert parsed["CoRe"].max_train_steps == 300 and parsed["CoRe"].num_vectors == 4


def test_a_folder_without_stable_diffusion_is_refused(miniature_models, tmp_path):
    (miniature_models / "sd").unlink()
    with pytest.raises(UserError, match="has no sd/model_index.json"):
        options(miniature_models, tmp_path)


def test_a_folder_with_runs_of_another_model_is_refused(miniature_models, tmp_path, monkeypatch):
    argv = ["--models", str(miniature_models), "--output_dir", str(tmp_path / "out")]
    for module in (reproduce, reproduce_sd):
        monkeypatch.setattr(module, "plan", lambda args: 1 / 0)  # behind the check
    with pytest.raises(ZeroDivisionError):
        reproduce.main(argv)
    with pytest.raises(UserError, match="--model sd: the runs in .* had sdxl"):
        reproduce_sd.main(argv)


@pytest.mark.slow
def test_the_whole_of_it_and_again(tmp_path):
    argv = ["--output_dir", str(tmp_path / "out"), "--prompts", "world-half"]
    argv += "--concepts 2 --seeds 1 --max_train_steps 2 --num_inference_steps 1 --guidance_scales 5".split()
    reproduce_sd.main(argv)
    report = (tmp_path / "out" / "report.md").read_text()
    for name in (*reproduce_sd.SHOWN, "P+", "TI-rescaled, one vector", "described in words, not trained"):
        assert f"| {name} | 2 |" in report
    assert "0.408 / 0.579" in report and "| DTI, our default - NeTI |" in report
    sheet = reproduce.open_picture(tmp_path / "out" / "sheet-zebra_star-guidance-5.png")
    assert sheet.width > 7 * 2 * 64  # a column for each method
    (tmp_path / "out" / "report.md").unlink()
    reproduce_sd.main(argv)  # finds everything done
    assert (tmp_path / "out" / "report.md").read_text() == report
