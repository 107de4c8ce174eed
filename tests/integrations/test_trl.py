"""TRL's trainers with our losses: supervised fine-tuning through fuse_lm_head, preferences through LinearDPOLoss."""

import pytest
import torch
import torch.nn.functional as F
import transformers

import fused_losses

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # TRL's use of it
]
WORDS = 60


def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def text(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, WORDS, (length,), generator=generator).tolist())


def settings(kind, folder, **options):
    return kind(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, bf16=False,
        activation_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip


def trained(trainer):
    """Trained parameters and the loss of every step."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(losses)) == 2
    return dict(trainer.model.named_parameters()), losses


def test_supervised_fine_tuning(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class FusedSFTTrainer(SFTTrainer):
        def compute_loss(self, *arguments, **options):
            return transformers.Trainer.compute_loss(self, *arguments, **options)

    rows = Dataset.from_dict({"text": [text(4 + i, i) for i in range(8)]})
    options = {"args": settings(SFTConfig, tmp_path), "train_dataset": rows, "processing_class": tokenizer()}
    theirs = trained(SFTTrainer(model(), **options))
    ours = trained(FusedSFTTrainer(fused_losses.fuse_lm_head(model()), **options))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_preferences(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class FusedDPOTrainer(DPOTrainer):
        loss = fused_losses.LinearDPOLoss(beta=0.5)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                reference = self.ref_model.base_model(**inputs).last_hidden_state
            return self.loss(
                model.base_model(**inputs).last_hidden_state,
                model.lm_head.weight,
                F.pad(labels, (0, 1), value=-100)[:, 1:],
                reference_input=reference,
                reference_weight=self.ref_model.lm_head.weight,
            )

    columns = {"prompt": 0, "chosen": 20, "rejected": 40}
    rows = Dataset.from_dict({name: [text(3 + i % 4, i + seed) for i in range(8)] for name, seed in columns.items()})
    options = {"args": settings(DPOConfig, tmp_path, beta=0.5), "train_dataset": rows, "processing_class": tokenizer()}
    theirs = trained(DPOTrainer(model(), model(), **options))
    ours = trained(FusedDPOTrainer(model(), model(), **options))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
