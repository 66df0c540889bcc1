"""sparse_lora: a LoRA of peft that trains, saves, loads and merges with every zero in place."""

import pytest
import torch
from families import save_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import budwood
from budwood.errors import RunError, UsageError
from budwood.models.linears import prunable, read
from budwood.pruning import prune

peft = pytest.importorskip("peft")

IDS = (torch.arange(600) ** 2 // 5 % 23 + 30)[None]
CALIBRATION = {
    "num_samples": 12,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    made = {}

    def folder(name, layout, dtype=torch.float32):
        key = f"{name}-{layout}-{dtype}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            save_model(name, made[key] / "dense", dtype=dtype)
            prune(made[key] / "dense", made[key] / "pruned", 'magnitude("2:4")', IDS, format=layout, **CALIBRATION)
        return made[key] / "pruned"

    return folder


def train(model, steps=4):
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(moving, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS[:, :48], labels=IDS[:, :48]).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


def zeros(model):
    return {name: read(linear) == 0 for name, linear in prunable(model).items()}


@pytest.mark.parametrize("layout", ["auto", "dense"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_trains_and_merges_with_every_zero(pruned, tmp_path, name, layout):
    folder = pruned(name, layout)
    before = zeros(AutoModelForCausalLM.from_pretrained(pruned(name, "dense")))
    loaded = budwood.load(folder)
    with torch.no_grad():
        plain = loaded(IDS[:, :24]).logits
    model = budwood.sparse_lora(loaded, rank=4)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[:, :24]).logits, plain, rtol=1e-5, atol=1e-5)
    losses = train(model)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model(IDS[:, :24]).logits
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    loaded_again = budwood.sparse_lora(budwood.load(folder), adapter=tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded_again(IDS[:, :24]).logits, trained, rtol=1e-5, atol=1e-5)
    assert any(parameter.requires_grad for parameter in loaded_again.parameters())
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS[:, :24]).logits, trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, plain, atol=1e-3)
    for key, mask in zeros(merged).items():
        assert torch.equal(mask, before[key]), key
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(again(IDS[:, :24]).logits, merged(IDS[:, :24]).logits)


def test_the_trainer_of_transformers(pruned, tmp_path):
    pytest.importorskip("accelerate")
    folder = pruned("llama", "auto")
    before = zeros(AutoModelForCausalLM.from_pretrained(pruned("llama", "dense")))
    model = budwood.sparse_lora(budwood.load(folder), rank=4)
    rows = [{"input_ids": row, "labels": row} for row in IDS[0, :576].view(24, 24)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        gradient_checkpointing=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    assert all(torch.equal(mask, before[key]) for key, mask in zeros(merged).items())


def test_bfloat16_and_unmerging(pruned):
    model = budwood.sparse_lora(budwood.load(pruned("llama", "dense", torch.bfloat16)), rank=4)
    linear = model.base_model.model.model.layers[0].self_attn.q_proj
    mask = linear.get_base_layer().weight == 0
    train(model)
    model.merge_adapter()
    assert torch.equal(linear.get_base_layer().weight == 0, mask)
    model.unmerge_adapter()
    assert torch.equal(linear.get_base_layer().weight == 0, mask)


def test_chosen_targets_and_disabled_adapters(pruned):
    loaded = budwood.load(pruned("llama", "dense"))
    with torch.no_grad():
        plain = loaded(IDS[:, :24]).logits
    name = "model.layers.1.mlp.up_proj"
    model = budwood.sparse_lora(loaded, rank=4, alpha=8, targets=[name])
    adapted = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(adapted) == 2
    assert all(name in key for key in adapted)
    train(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS[:, :24]).logits, plain)


def test_what_cannot_be_merged_is_refused(pruned, tmp_path):
    loaded = budwood.load(pruned("llama", "dense"))
    for options in ({"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(UsageError, match="cannot be merged into a masked matrix"):
            budwood.sparse_lora(loaded, **options)
    with pytest.raises(UsageError, match="no linear with zeros"):
        budwood.sparse_lora(loaded, targets=["model.layers.9.mlp.up_proj"])
    save_model("llama", tmp_path)
    with pytest.raises(UsageError, match="no linear of this model has zeros"):
        budwood.sparse_lora(budwood.load(tmp_path))
    model = budwood.sparse_lora(loaded, rank=2)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(RunError, match="one masked adapter"):
        model(IDS[:, :8])
