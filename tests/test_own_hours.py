"""A person's own pictures: a run that fits the hours."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from test_own_pictures import hjepa, many

import hjepa_mlx as hj
from hjepa_mlx.bench import fit
from hjepa_mlx.bench.fit import _length


def test_the_recipe_my_folder_chooses_by_size_and_hours_and_the_users_settings_stay(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(fit, "LONGEST", 0.1)  # seconds of measuring
    folder = tmp_path / "📷 #1: [2024]"  # a name that YAML would take apart
    many(folder, 40)
    asked = ["train", "my-folder", "--data-dir", folder, "--hours", "8"]
    ended = hjepa(*asked, "--set", "model.size=nano", "--dry-run")
    assert ended.exit_code == 0, ended.output
    assert "36 images, short side 20 to 24 pixels" in ended.stderr
    assert "optim.epochs=" in ended.stderr
    assert "size: nano" in ended.stdout
    assert "image_size: 32" in ended.stdout
    assert "folder pretrain: 36 images" in hjepa("datasets", "check", folder).stdout
    (tmp_path / "own.yaml").write_text(ended.stdout)
    assert hj.load_config(tmp_path / "own.yaml").data.dir == str(folder)
    with monkeypatch.context() as several:
        several.setattr("hjepa_mlx.world.size", lambda: 2)
        assert "Let one choose, with --dry-run > own.yaml" in hjepa(*asked).stderr
    ended = hjepa(*asked, "--run-dir", "run one", "--resume")
    assert ended.exit_code == 2
    assert "Resume it by: hjepa-mlx train 'run one' --resume" in ended.stderr
    ended = hjepa(*asked[:-1], "1e-9", "--dry-run")
    assert ended.exit_code == 2
    assert re.search(r"too short for .* one step; give at least \d", ended.stderr)


@given(st.floats(0.3, 500), st.integers(64, 5000))
@settings(max_examples=60)
def test_epochs_and_limit_together_are_the_passes_that_the_hours_allow(passes, images):
    config = hj.load_config("my-folder", ["data.batch_size=8"])
    chosen = dict(setting.split("=") for setting in _length(config, passes, images))
    seen = int(chosen["optim.epochs"]) * int(chosen.get("data.limit", images))
    assert abs(seen - passes * images) <= max(0.1 * passes * images, 8 * passes + 8)
    assert float(chosen["optim.warmup_epochs"]) < int(chosen["optim.epochs"])
