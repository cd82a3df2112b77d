"""PEFT adapters on a frozen model: every adapter parameter, against the float64 loop."""

import pytest
import torch
from gradients import model_zoo, zoo_check

peft = pytest.importorskip("peft")

LLAMA = next(entry for entry in model_zoo.ZOO if entry.name == "Llama")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1},
        {"target_modules": "all-linear", "use_rslora": True, "lora_bias": True},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"], "use_dora": True},
    ],
    ids=["lora", "all linear", "embedding and saved head", "dora"],
)
def test_lora_parameters_agree_with_the_loop(options):
    config = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model_zoo.build(LLAMA), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # B starts at zero, where A has no gradient
                parameter.add_(0.1 * torch.randn_like(parameter))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    outcome = zoo_check.compare(model, LLAMA.batch(5), torch.float64)
    assert outcome.loss.name == "causal"
    assert outcome.captured == outcome.trainable > 0
    assert outcome.worst < 1e-10
    assert outcome.report.coverage_parameters == 1.0
    assert outcome.report.per_sample == ()
    assert outcome.report.excluded == dict.fromkeys(frozen, "frozen")
    rules = {name: p.rule for name, p in outcome.report.parameters.items()}
    assert all(rule == "linear" for name, rule in rules.items() if ".lora_A." in name), rules
