"""`budwood retrain` on the command line: progress with the loss, the result, refusals."""

import json

from families import save_model

from budwood.pruning import prune


def test_the_command_line_shows_loss_and_time(tmp_path, run_here):
    save_model("llama", tmp_path / "dense")
    prune(tmp_path / "dense", tmp_path / "pruned", 'magnitude("2:4")')
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    arguments = ("retrain", str(tmp_path / "pruned"), str(tmp_path / "out"), "--data", str(text))
    options = ("--steps", "4", "--batch", "2", "--num-samples", "8", "--seq-length", "24", "--compute-dtype", "float32")
    shown = run_here(*arguments, *options)
    assert shown.status == 0, shown.stderr
    assert "held-out loss" in shown.stdout
    assert "retraining: 4 of 4, loss " in shown.stderr
    again = run_here(*arguments, *options, "--json")
    assert json.loads(again.stdout)["training"][0]["steps"] == 4
    assert run_here(*arguments, *options, "--move", "all").status == 2
