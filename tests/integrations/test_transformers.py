"""fuse_lm_head on models of transformers: the same losses and gradients, and no logits."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import fused_losses
from fused_losses.integrations.transformers import DeferredLogits
from fused_losses.testing import peak_bytes

CLASSES = 300
SIZES = {
    "vocab_size": CLASSES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": CLASSES, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
DROPOUTS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def build(kind, **changes):
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, SIZES),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, SIZES),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, SIZES),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {**GPT2, **DROPOUTS}),
        "gemma2": (
            transformers.Gemma2Config,
            transformers.Gemma2ForCausalLM,
            {**SIZES, "final_logit_softcapping": 0.2},
        ),
        "cohere": (transformers.CohereConfig, transformers.CohereForCausalLM, {**SIZES, "logit_scale": 0.25}),
        "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM, {**SIZES, "logits_scaling": 8.0}),
    }
    config_class, model_class, sizes = classes[kind]
    eos = {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return model_class(config_class(**{**sizes, **eos, **changes}))


def tokens(shape=(3, 20)):
    made = torch.randint(3, CLASSES, shape, generator=torch.Generator().manual_seed(1))
    labels = made.clone()
    labels[0, :7] = -100
    return {"input_ids": made, "labels": labels}


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_alike(model, fused, tolerance=2e-5, **inputs):
    (expected, wanted), (loss, made) = gradients(model, **inputs), gradients(fused, **inputs)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    assert made.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(made[name], gradient, rtol=0, atol=tolerance * max(scale, 1e-6), msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "cohere", "granite"])
def test_loss_and_gradients_are_those_of_the_model(kind, tied):
    model = build(kind, tie_word_embeddings=tied)
    fused = fused_losses.fuse_lm_head(copy.deepcopy(model))
    assert fused.state_dict().keys() == model.state_dict().keys()
    head, embedding = fused.get_output_embeddings(), fused.get_input_embeddings()
    assert (head.weight is embedding.weight) is tied
    assert_alike(model, fused, **tokens())
    assert_alike(model, fused, **tokens(), num_items_in_batch=torch.tensor(100))
    assert_alike(model, fused, **tokens(), num_items_in_batch=100)


def test_shifted_labels_are_taken_as_they_are():
    model = build("llama")
    fused = fused_losses.fuse_lm_head(copy.deepcopy(model))
    inputs = tokens()
    assert_alike(model, fused, **inputs, shift_labels=inputs["labels"].roll(3, dims=1))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_logits_are_made_where_they_are_used(kind):
    model = build(kind)
    fused, inputs = fused_losses.fuse_lm_head(copy.deepcopy(model)), tokens()
    expected, logits = model(**inputs).logits, fused(**inputs).logits
    assert isinstance(logits, DeferredLogits) and (logits.shape, logits.dtype) == (expected.shape, expected.dtype)
    close = torch.testing.assert_close
    close(logits.detach(), expected.detach())
    close(logits[:, -1], expected[:, -1])
    close(torch.softmax(logits, dim=-1), torch.softmax(expected, dim=-1))
    close(torch.cat([logits, logits]), torch.cat([expected, expected]))
    assert isinstance(fused(input_ids=inputs["input_ids"]).logits, torch.Tensor)


def test_no_logits_are_made():
    wide = 30_000
    model = build("llama", vocab_size=wide, tie_word_embeddings=True)
    inputs = {key: value.repeat(1, 3) for key, value in tokens((8, 20)).items()}
    rows = inputs["input_ids"].numel()

    def step(model):
        model.zero_grad()
        return lambda: model(**inputs).loss.backward()

    plain = peak_bytes(step(model), "cpu")
    fused = peak_bytes(step(fused_losses.fuse_lm_head(model, max_workspace_mb=4)), "cpu")
    assert fused < plain - rows * wide * 4


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"z_loss": 1e-2}])
def test_options_reach_the_loss(options):
    model, inputs = build("llama"), tokens()
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = fused_losses.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten(), **options)
    torch.testing.assert_close(fused_losses.fuse_lm_head(model, **options)(**inputs).loss, expected)


def test_bf16_losses_are_fp32():
    model = build("llama").bfloat16()
    fused = fused_losses.fuse_lm_head(copy.deepcopy(model))
    assert fused(**tokens()).loss.dtype is torch.float32
    assert_alike(model, fused, tolerance=2e-2, **tokens())


def test_autocast_and_accelerates_fp32_outputs_make_no_logits():
    from accelerate.utils import convert_outputs_to_fp32

    model = build("gemma2")
    fused = fused_losses.fuse_lm_head(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**tokens())
        output = convert_outputs_to_fp32(fused.forward)(**tokens())
    assert isinstance(output.logits, DeferredLogits) and output.logits.dtype is torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(output.logits.detach(), expected.logits.detach().float())


def test_generation_and_files_are_as_before(tmp_path):
    model = build("llama", tie_word_embeddings=True).eval()
    fused = fused_losses.fuse_lm_head(copy.deepcopy(model))
    prompt = tokens()["input_ids"][:1, :5]
    length = {"max_new_tokens": 6, "do_sample": False}
    assert fused.generate(prompt, **length).equal(model.generate(prompt, **length))
    fused.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(loaded(**tokens()).loss, fused(**tokens()).loss)
    fused_losses.fuse_lm_head(loaded)
    torch.testing.assert_close(loaded(**tokens()).loss, fused(**tokens()).loss)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(copied):
    fused = fused_losses.fuse_lm_head(build("llama"))
    other = copied(fused)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(**tokens()).loss.item() == pytest.approx(torch.tensor(CLASSES).log().item())
    assert fused(**tokens()).loss.item() != other(**tokens()).loss.item()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    fused = fused_losses.fuse_lm_head(build("llama", use_cache=False))
    compiled = torch.compile(
        lambda **inputs: fused(**inputs).loss, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(**tokens()), fused(**tokens()).loss)


def test_the_signature_stays():
    from inspect import signature

    assert signature(fused_losses.fuse_lm_head(build("llama")).forward) == signature(build("llama").forward)


def test_what_cannot_be_fused_says_so():
    model = build("llama")
    with pytest.raises(TypeError, match="takes the options label_smoothing"):
        fused_losses.fuse_lm_head(model, softcap=3.0)
    fused_losses.fuse_lm_head(model)
    with pytest.raises(TypeError, match="fused already"):
        fused_losses.fuse_lm_head(model)
    model.resize_token_embeddings(CLASSES + 10)
    with pytest.raises(RuntimeError, match="replaced after fuse_lm_head"):
        model(**tokens())
    wrapped = build("llama")
    wrapped.lm_head = nn.Sequential(wrapped.lm_head)
    with pytest.raises(TypeError, match=r"plain nn\.Linear"):
        fused_losses.fuse_lm_head(wrapped)
    custom = build("llama")
    custom.loss_function = lambda *arguments, **options: None
    with pytest.raises(TypeError, match="causal-LM loss"):
        fused_losses.fuse_lm_head(custom)


def test_unknown_operations_on_logits_are_done_and_said():
    model = build("llama")
    fused = copy.deepcopy(model)
    inner = type(model).forward

    class Shifted(type(model)):
        def forward(self, *arguments, labels=None, **options):
            output = inner(self, *arguments, **options)
            logits = output.logits + torch.linspace(0, 1, CLASSES)
            output.loss = self.loss_function(logits, labels, vocab_size=CLASSES) if labels is not None else None
            return output

    fused.__class__ = model.__class__ = Shifted
    fused_losses.fuse_lm_head(fused)
    with pytest.warns(UserWarning, match="its own loss is used"):
        loss = fused(**tokens()).loss
    torch.testing.assert_close(loss, model(**tokens()).loss)


class TestHead:
    def test_is_a_linear_layer_with_a_loss(self):
        head = fused_losses.LinearCrossEntropyHead(8, 30)
        hidden, labels = torch.randn(2, 5, 8), torch.randint(30, (2, 5))
        assert head.state_dict().keys() == nn.Linear(8, 30).state_dict().keys()
        expected = nn.functional.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        torch.testing.assert_close(head(hidden, labels, label_smoothing=0.1), expected)
        torch.testing.assert_close(
            head(hidden, labels, reduction="none"),
            fused_losses.functional.cross_entropy(head(hidden).movedim(-1, 1), labels, reduction="none"),
        )

    def test_shares_the_parameters_it_is_made_from(self):
        linear = nn.Linear(8, 30).eval()
        head = fused_losses.LinearCrossEntropyHead.from_linear(linear)
        assert head.weight is linear.weight and head.bias is linear.bias and not head.training
        assert fused_losses.LinearCrossEntropyHead.from_linear(nn.Linear(8, 30, bias=False)).bias is None

    def test_options_without_labels_raise(self):
        with pytest.raises(TypeError, match="label_smoothing belong to the loss"):
            fused_losses.LinearCrossEntropyHead(8, 30)(torch.zeros(2, 8), label_smoothing=0.1)
